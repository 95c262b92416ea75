"""Stopping on a signal: the iteration in hand is finished, the state saved, and every rank stops at the same one."""

from __future__ import annotations

import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class StopSignal:
    """Remembers SIGTERM, SIGINT, SIGUSR1 or SIGHUP until an iteration asks."""

    def __init__(self, file: Path | None, timeout: timedelta) -> None:
        """Listen from now on.

        Args:
            file: where a launcher of other machines leaves the number of a signal; rank 0 looks for it.
            timeout: how long ranks wait for one another.
        """
        self._received = 0
        self._file = file if dist.get_rank() == 0 else None
        # A question between hosts: the GPUs are not waited for.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

        # A connection that closes ends what it began; nohup says otherwise.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        """Keep the first signal; Python calls this between two instructions."""
        self._received = self._received or number

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; the same on every rank."""
        if self._file and not self._received and self._file.exists():
            number = self._file.read_text()
            self._received = int(number or signal.SIGTERM)
        flag = torch.tensor([self._received])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)
