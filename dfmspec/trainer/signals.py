"""Stopping on a signal: the iteration in hand is finished, the state saved, and every rank stops at the same one."""

from __future__ import annotations

import ctypes
import signal
from typing import Any

import torch
import torch.distributed as dist

_PR_SET_PDEATHSIG = 1


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1 until an iteration asks."""

    def __init__(self) -> None:
        self._received = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self._received = self._received or number

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; the same on every rank."""
        flag = torch.tensor([self._received], device="cuda")
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)


def die_with_parent() -> None:
    """Ask the kernel (Linux) for a SIGTERM when the launcher dies, so that no rank is left behind."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):  # another system: torchrun's own clean-up must do
        pass
