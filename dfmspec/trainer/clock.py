"""Points in a device's work: when it got there, learnt without holding up what it was given since."""

from __future__ import annotations

import time

import torch


class Mark:
    """The point that this process's device reaches when it has done all that it was given so far; a CPU is there already."""

    def __init__(self, device: str) -> None:
        """`device`: "cuda" or "cpu"."""
        self._event = torch.cuda.Event(enable_timing=True) if device == "cuda" else None
        if self._event:
            self._event.record()
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Until the device is there."""
        if self._event:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds between two marks that were reached, by the device's clock."""
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event) / 1e3
        return self._time - earlier._time
