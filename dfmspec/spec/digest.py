"""Digests as records have them; of a configuration there is one, whatever order its keys stand in."""

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
    return text_digest(canonical(config))


def text_digest(text: str) -> str:
    """sha256 of a text, in which the name of a file may have bytes that are no UTF-8."""
    return bytes_digest(text.encode("utf-8", "surrogateescape"))


def bytes_digest(data: bytes) -> str:
    """sha256 of the content of a file."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
