"""Stopping on a signal: the iteration in hand is finished, the state saved, and every rank stops at the same one."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as dist


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
