"""What a run says: console lines as in the how-to, events for the supervisor, TensorBoard scalars. Rank 0 only."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist


class Reporter:
    """The voice of rank 0; silent on the others."""

    def __init__(self, *, train_iters: int, tensorboard_dir: str | None, events: str | None) -> None:
        self._loud = dist.get_rank() == 0
        self._train_iters = train_iters
        self._events: TextIO | None = None
        self._board: Any = None
        if not self._loud:
            return
        if events:
            self._events = Path(events).open("a")
        if tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard_dir)

    def say(self, line: str) -> None:
        """One console line."""
        if self._loud:
            print(line, flush=True)

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl: type, time (seconds since the epoch), and the type's own fields.

        On the disk when this returns, except for an iteration's: beside a checkpoint that is being written, that would take as long as iterations do.
        """
        if self._events:
            self._events.write(json.dumps({"type": kind, "time": round(time.time(), 3), **fields}) + "\n")
            self._events.flush()
            if kind != "iteration":
                os.fsync(self._events.fileno())

    def iteration(self, iteration: int, *, console: bool, **scalars: float) -> None:
        """What one iteration measured."""
        self.event("iteration", iteration=iteration, **scalars)
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(f"train/{name}", value, iteration)
        if console:
            width = len(str(self._train_iters))
            self.say(
                f"[INFO] Iteration {iteration:>{width}}/{self._train_iters}, Loss: {scalars['loss']:.3f}, "
                f"LR: {scalars['lr']:.3g}, grad norm: {scalars['grad_norm']:.3f}, {scalars['tokens_per_second']:,.0f} tokens/s"
            )

    def evaluation(self, iteration: int, loss: float) -> None:
        """The evaluation loss after an iteration."""
        self.event("evaluation", iteration=iteration, loss=loss)
        if self._board:
            self._board.add_scalar("eval/loss", loss, iteration)
        self.say(f"[INFO] Evaluation at iteration {iteration}, Loss: {loss:.3f}")

    def checkpoint(self, iteration: int, path: Path, seconds: float, blocked: float) -> None:
        """A checkpoint that is committed; the training stood still for `blocked` of its seconds."""
        self.event("checkpoint", iteration=iteration, path=str(path), seconds=round(seconds, 3), blocked=round(blocked, 3))
        self.say(f"[INFO] Checkpoint saved: {path}/")

    def close(self) -> None:
        """Flush everything."""
        if self._board:
            self._board.close()
        if self._events:
            self._events.close()
