"""Adds to a dataset's metadata what another major version of Energon reads, without a look at the shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dfmspec.data.energon_metadata import INFO, SPLIT, contents, faults
from dfmspec.errors import DataError
from dfmspec.files import write_aside

_OF_ENERGON_6 = {INFO: (".info.yaml", ("shard_counts",)), SPLIT: ("split.yaml", ("split_parts", "exclude"))}
"""Where a part of the metadata may be -> the file in which Energon 6 looks for it, and the keys that it knows there."""


def lacking(folder: Path, energon: int) -> list[str]:
    """The files of metadata that a major version of Energon does not find in a dataset."""
    if energon > 6:
        return []
    names = [name for name, _ in _OF_ENERGON_6.values()]
    return [name for name in names if not (folder / ".nv-meta" / name).is_file()]


def disagrees(folder: Path) -> bool:
    """Whether the counts of shards differ between the two forms, of which each Energon reads one."""
    newer, older = (contents(folder, (name,)).get("shard_counts") for name in INFO)
    return newer is not None and older is not None and newer != older


def upgrade(folder: Path) -> list[Path]:
    """Write what is lacking; returns the files that were written.

    Raises:
        DataError: there is no metadata to take it from, or it is damaged.
        OSError: it cannot be written.
    """
    found = next(faults(folder), None)
    if found is not None:
        raise DataError(f"{found}; run: energon prepare --sample-type CrudeWebdataset {folder}")
    written = []
    for places, (name, keys) in _OF_ENERGON_6.items():
        file = folder / ".nv-meta" / name
        if not file.is_file():
            write_aside(file, _text(contents(folder, places), keys))
            written.append(file)
    return written


def _text(values: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The keys that are known, as YAML."""
    return str(yaml.safe_dump({key: values[key] for key in keys if key in values}, sort_keys=False))
