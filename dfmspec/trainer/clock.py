"""Where time goes: points in a device's work, and the stages of a start.

A point's time is learnt without holding up what the device was given since.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


class Mark:
    """The point that this process's device reaches when it has done all that it was given so far.

    A CPU is there already.
    """

    def __init__(self, device: str) -> None:
        """`device`: "cuda" or "cpu"."""
        self._event = torch.cuda.Event(enable_timing=True) if device == "cuda" else None
        if self._event:
            self._event.record()
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device has reached this point."""
        if self._event:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds between two marks that were reached, by the device's clock."""
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event) / 1e3
        return self._time - earlier._time


class Stages:
    """Seconds of each stage of a start, from the start of this process on."""

    def __init__(self) -> None:
        self._since = time.perf_counter() - _age()
        self.seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        """Note the seconds of the stage that has just ended, under its name."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._since, 2)
        self._since = now


def _age() -> float:
    """Seconds since this process was started; 0 where the system does not say."""
    try:
        # Field 22 of proc(5), in ticks since the system started; the third follows the program's name.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
