"""What Energon's metadata says of a dataset, without Energon: the samples of each split."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml


def split_counts(folder: Path) -> dict[str, int] | None:
    """Samples of each split, from Energon's metadata; None when that cannot be told."""
    info, split = folder / ".nv-meta" / ".info.json", folder / ".nv-meta" / "split.yaml"
    try:
        counts = json.loads(info.read_text())["shard_counts"]
        parts = yaml.safe_load(split.read_text())["split_parts"]
        return {
            name: sum(counts.get(shard, 0) for pattern in patterns for shard in _expanded(pattern))
            for name, patterns in parts.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _expanded(pattern: str) -> list[str]:
    """Energon's `shard-{000003..000005}.tar`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    low, high = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for i in range(int(low), int(high) + 1) for name in _expanded(f"{head}{i:0{len(low)}d}{tail}")]
