"""Digests of configurations: one text for one configuration, whatever order its keys stand in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration."""
    return "sha256:" + hashlib.sha256(canonical(config).encode()).hexdigest()
