"""Checkpoints as files, without a training: what `record` looks at, and nothing more."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

from dfmspec.record.checkpoints import FORMAT_VERSION
from dfmspec.spec.checkpoints import MANIFEST
from dfmspec.spec.digest import config_digest
from dfmspec.spec.iterations import folder_of

CONFIG = {"data": {"num_streams": 1}, "optimizer": {"lr": 1e-4}, "train": {"train_iters": 8}}


def zipped(value: Any) -> bytes:
    """A value as torch.save writes it, without its storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
    return file.getvalue()


FILES = {
    ".metadata": pickle.dumps({"state_dict_metadata": {}}),
    "common.pt": zipped({"scheduler": {"num_steps": 4}}),
    "metadata.json": b'{"sharded_backend": "torch_dist"}',
    "streams/stream_00000.pt": zipped({"ordinal": 4}),
    "__0_0.distcp": bytes(range(256)),
}


def checkpoint(
    folder: Path,
    iteration: int,
    *,
    plan_id: str | None = None,
    config: Mapping[str, Any] = CONFIG,
    files: Mapping[str, bytes] = FILES,
) -> Path:
    """A whole checkpoint in a folder of them."""
    path = folder / folder_of(iteration)
    listed = {}
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
        listed[name] = {"size": len(data), "crc32": f"{crc32(data):08x}"}
    manifest = {
        "format_version": FORMAT_VERSION,
        "iteration": iteration,
        "plan_id": plan_id,
        "config_digest": config_digest(config),
        "config": config,
        "files": listed,
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return path


def event(kind: str, iteration: int, **fields: Any) -> str:
    """A line of events.jsonl."""
    return json.dumps({"type": kind, "time": 1.0, "iteration": iteration, **fields}) + "\n"
