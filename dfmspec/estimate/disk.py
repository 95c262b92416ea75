"""What a checkpoint takes on disk."""

from __future__ import annotations

_BYTES_A_PARAMETER = 14
"""bf16 weight 2, fp32 main weight 4, two moments of Adam 8."""
_BYTES_OF_AN_AVERAGE = 4


def checkpoint_bytes(parameters: int, *, averaged: bool) -> int:
    """About the bytes of one checkpoint; `averaged`: with the averaged weights too."""
    each = _BYTES_A_PARAMETER
    if averaged:
        each += _BYTES_OF_AN_AVERAGE
    return parameters * each
