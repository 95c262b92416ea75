"""What a run says: console lines as in the how-to, events for the supervisor, TensorBoard scalars. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist

from dfmspec.record.checkpoints import manifest_digest

_NEEDED = ("started", "stopped", "finished")
"""Events without which a run cannot be judged."""


class Reporter:
    """The voice of rank 0; silent on the others. A full disk costs what it says, not the run."""

    def __init__(self, *, train_iters: int, tensorboard_dir: str | None, events: Path | None) -> None:
        self._loud = dist.get_rank() == 0
        self._train_iters = train_iters
        self._events: BinaryIO | None = None
        self._board: Any = None
        if not self._loud:
            return
        if events:
            self._events = _for_lines(events)
        if tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard_dir)

    def say(self, line: str) -> None:
        """One console line."""
        if self._loud:
            with suppress(OSError):
                print(line, flush=True)

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl: type, time (seconds since the epoch), and the type's own fields.

        On the disk when this returns, except for an iteration's: beside a checkpoint that is being written, that would
        take as long as iterations do. On a full disk an event waits in memory, but for those that are needed.

        Raises:
            OSError: an event that is needed cannot be written.
        """
        if not self._events:
            return
        event = {"type": kind, "time": round(time.time(), 3), **fields}
        line = json.dumps(event, allow_nan=False).encode() + b"\n"
        may_wait = kind not in _NEEDED
        with suppress(OSError) if may_wait else nullcontext():
            self._events.write(line)
            self._events.flush()
            if kind != "iteration":
                os.fsync(self._events.fileno())

    def iteration(self, iteration: int, *, console: bool, **scalars: float) -> None:
        """What one iteration measured; on the `console` too, if that is asked for.

        `scalars` are the fields of the event, with loss, lr, grad_norm and tokens_per_second among them.
        """
        self.event("iteration", iteration=iteration, **scalars)
        drawn = {f"train/{name}": value for name, value in scalars.items()}
        self._draw(iteration, drawn)
        if not console:
            return
        width = len(str(self._train_iters))
        loss = scalars["loss"]
        lr = scalars["lr"]
        grad_norm = scalars["grad_norm"]
        speed = scalars["tokens_per_second"]
        self.say(
            f"[INFO] Iteration {iteration:>{width}}/{self._train_iters}, Loss: {loss:.3f}, "
            f"LR: {lr:.3g}, grad norm: {grad_norm:.3f}, {speed:,.0f} tokens/s"
        )

    def evaluation(self, iteration: int, loss: float) -> None:
        """The evaluation loss after an iteration."""
        if not math.isfinite(loss):
            self.event("evaluation", iteration=iteration, loss=None)
            self.say(f"[WARNING] Evaluation at iteration {iteration}: the loss is {loss}, which is no figure")
            return
        self.event("evaluation", iteration=iteration, loss=loss)
        self._draw(iteration, {"eval/loss": loss})
        self.say(f"[INFO] Evaluation at iteration {iteration}, Loss: {loss:.3f}")

    def checkpoint(self, iteration: int, path: Path, seconds: float, blocked: float) -> None:
        """A checkpoint that is committed; the training stood still for `blocked` of its seconds."""
        if not self._loud:
            return
        self.event(
            "checkpoint",
            iteration=iteration,
            path=str(path),
            manifest_digest=manifest_digest(path),
            seconds=round(seconds, 3),
            blocked=round(blocked, 3),
        )
        self.say(f"[INFO] Checkpoint saved: {path}/")

    def close(self) -> None:
        """Write what still waits, and end."""
        if self._board:
            with suppress(OSError):
                self._board.close()
        if self._events:
            self._events.close()

    def _draw(self, iteration: int, scalars: dict[str, float]) -> None:
        """Give some values to TensorBoard."""
        if not self._board:
            return
        with suppress(OSError):  # of its writing thread
            for name, value in scalars.items():
                self._board.add_scalar(name, value, iteration)


def _for_lines(path: Path) -> BinaryIO:
    """A file to append to, from the beginning of a line on: one that was cut short takes no other with it.

    Raises:
        OSError: a link stands in its place.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    file = os.fdopen(handle, "ab+")
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file
