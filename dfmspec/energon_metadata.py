"""What Energon's metadata says of a dataset, without Energon: the samples of each split."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml


def split_shards(folder: Path) -> dict[str, dict[str, int]] | None:
    """The shards of each split and how many samples each has; None when that cannot be told."""
    try:
        counts = _info(folder / ".nv-meta")["shard_counts"]
        parts = yaml.safe_load((folder / ".nv-meta" / "split.yaml").read_text())["split_parts"]
        return {
            name: {shard: counts.get(shard, 0) for pattern in patterns for shard in _expanded(pattern)} for name, patterns in parts.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def split_counts(folder: Path) -> dict[str, int] | None:
    """Samples of each split; None when that cannot be told."""
    shards = split_shards(folder)
    return None if shards is None else {name: sum(counts.values()) for name, counts in shards.items()}


def _info(metadata: Path) -> Any:
    """Energon 7 writes JSON, Energon 6 YAML."""
    if (metadata / ".info.json").exists():
        return json.loads((metadata / ".info.json").read_text())
    return yaml.safe_load((metadata / ".info.yaml").read_text())


def _expanded(pattern: str) -> list[str]:
    """Energon's `shard-{000003..000005}.tar`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    low, high = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for i in range(int(low), int(high) + 1) for name in _expanded(f"{head}{i:0{len(low)}d}{tail}")]
