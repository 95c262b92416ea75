"""Events of a run that writes none: taken from what the ranks of a script print, by what its target knows of the lines.

They are the events that dfmspec's own trainer writes, so that curves, comparisons and verdicts have one source. The
same lines give the same events whenever they are read: also after an attempt that nobody watched.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from heapq import merge
from pathlib import Path
from typing import NamedTuple

from dfmspec.files import write_aside
from dfmspec.record.events import Event
from dfmspec.record.files import json_object
from dfmspec.record.growing import GrowingLog
from dfmspec.record.run_dir import AttemptDir, RunDir
from dfmspec.spec.iterations import folder_of
from dfmspec.targets import Told

_AFTER_THE_END = ("validation", "test")
"""The splits that are evaluated once training is done, where the script evaluates at all."""


class Facts(NamedTuple):
    """What of a plan the lines do not say."""

    told: Callable[[str], Told | None]
    train_iters: int
    tokens: int
    """Of one sample of the global batch, padding included."""
    saves: bool
    """Whether the script saves at its end."""


class Transcript:
    """The events of one attempt."""

    def __init__(self, run: RunDir, attempt: int, ranks: int, nodes: int, facts: Facts) -> None:
        """`ranks`: of the whole run. Those that an earlier reader made of the attempt are made anew."""
        self._run = run
        self._attempt = attempt
        self._facts = facts
        folder = run.attempt(attempt)
        self._logs = [_Log(path) for path in _sources(folder, ranks, nodes)]
        self._has_started = False
        self._held: list[Told] = []
        self._is_trained = False
        self._open_saves: dict[int, float] = {}
        self._saved_at_the_end = False
        self._last = 0
        self._evaluated: set[str] = set()
        self._time: float | None = None
        self._waiting = ""
        self.remark = ""
        """What the script said of why it ends; "": nothing."""
        self.ended: str | None = None
        """finished or stopped, once it is; then the script has nothing left to do but evaluate."""
        self._begin_anew()

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluations after the end have been told."""
        return self._evaluated.issuperset(_AFTER_THE_END)

    def size(self) -> int:
        """Bytes that the ranks have printed so far."""
        return sum(log.offset for log in self._logs)

    def forward(self, *, is_live: bool = True, is_last: bool = False) -> list[Event]:
        """The events of the lines since the last call, which are in events.jsonl when this returns.

        Args:
            is_live: the lines were just written; otherwise they say their time, or have that of the line before.
            is_last: nobody writes any more: a line without an end is one.
        """
        # Each log in its own order; of one iteration the last rank's first, which tells of the iteration itself.
        told = [self._told(log, is_last=is_last) for log in reversed(self._logs)]
        events: list[Event] = []
        for each in merge(*told, key=lambda each: each.iteration or 0):
            self._held.append(each)
            if self._has_started or each.kind == "started":
                events += self._released(is_live=is_live)
        if is_last:
            events += self._released(is_live=is_live)
        self._write(events)
        if is_last and self._waiting:
            self.remark = self.remark or f"its events could not be written to {self._run.events}"
        return events

    def _released(self, *, is_live: bool) -> Iterator[Event]:
        """The events of what was held back until somebody told of a start, or until nobody can any more."""
        held = sorted(self._held, key=lambda each: each.kind != "started")
        self._held = []
        for each in held:
            self._time = time.time() if is_live else each.time or self._time or self._logs[0].begun_at()
            if each.kind == "iteration":  # where the line of the start is lost
                yield from self._start((each.iteration or 1) - 1)
            yield from self._events(each)

    def _told(self, log: _Log, *, is_last: bool) -> Iterator[Told]:
        """What the new lines of a log say."""
        for line in log.lines(is_last=is_last):
            told = self._facts.told(line)
            if told is not None:
                # A line that names no iteration is of the last that one did.
                log.iteration = told.iteration if told.iteration is not None else log.iteration
                yield told._replace(iteration=log.iteration)

    def _events(self, told: Told) -> Iterator[Event]:
        """What a line comes to."""
        iteration = told.iteration or 0
        if told.kind == "started":
            yield from self._start(iteration)
        elif told.kind == "iteration":
            yield from self._iterate(told, iteration)
        elif told.kind == "evaluation":
            self._evaluated.add(told.fields["split"])
            yield self._event("evaluation", iteration=iteration, **told.fields)
        elif told.kind == "saving":
            self._open_saves[iteration] = self._now
        elif told.kind == "saved":
            yield from self._save(iteration, told.fields["path"])
        elif told.kind == "trained":
            self._is_trained = True
        elif told.kind == "stopped":
            self.ended = self.ended or "stopped"
            yield self._event("stopped", iteration=self._last, signal=None)
        elif told.kind == "nothing_to_load":
            self.remark = "it found no checkpoint to load, and checkpoint.exit_on_missing_checkpoint had it end"

        # The end: trained, and saved once more.
        is_saved = self._saved_at_the_end or not self._facts.saves
        if self._is_trained and is_saved and not self._open_saves and self.ended is None:
            self.ended = "finished"
            yield self._event("finished", iteration=self._facts.train_iters, signal=None)

    def _start(self, iteration: int) -> Iterator[Event]:
        if self._has_started:
            return
        self._has_started = True
        self._last = iteration
        yield self._event("started", iteration=iteration, train_iters=self._facts.train_iters, attempt=self._attempt)

    def _iterate(self, told: Told, iteration: int) -> Iterator[Event]:
        self._last = max(self._last, iteration)
        fields = dict(told.fields)
        seconds = fields["seconds"]
        tokens = fields.pop("samples") * self._facts.tokens
        if seconds > 0:
            yield self._event("iteration", iteration=iteration, tokens_per_second=round(tokens / seconds, 1), **fields)

    def _save(self, iteration: int, path: str) -> Iterator[Event]:
        began = self._open_saves.pop(iteration, self._now)
        self._last = max(self._last, iteration)
        self._saved_at_the_end = self._is_trained
        folder = Path(path) / folder_of(iteration)
        yield self._event("checkpoint", iteration=iteration, path=str(folder), seconds=round(self._now - began, 3))

    @property
    def _now(self) -> float:
        return time.time() if self._time is None else self._time

    def _event(self, kind: str, **fields: object) -> Event:
        return {"type": kind, "time": round(self._now, 3), **fields}

    def _write(self, events: Iterable[Event]) -> None:
        """Append events to the run's, on the disk when this returns; on a full disk they wait for the next time."""
        self._waiting += "".join(json.dumps(event, allow_nan=False) + "\n" for event in events)
        if not self._waiting:
            return
        with suppress(OSError), self._run.events.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                written = file.write(self._waiting.encode())
                if written < len(self._waiting):
                    raise OSError(errno.ENOSPC, "a part was written")
                os.fsync(file.fileno())
                self._waiting = ""
            except OSError:
                file.truncate(end)

    def _begin_anew(self) -> None:
        """Take back the events that an earlier reader made of this attempt's lines, where the lines are still there."""
        file = self._run.events
        if not file.exists() or not any(log.path.exists() for log in self._logs):
            return
        kept = []
        of_the_attempt = False
        lines = file.read_bytes().splitlines(keepends=True)
        for line in lines:
            started = _started_in(line)
            if started is not None:
                of_the_attempt = started == self._attempt
            if not of_the_attempt:
                kept.append(line)
        if len(kept) < len(lines):
            write_aside(file, b"".join(kept).decode("utf-8", "surrogateescape"))


def _started_in(line: bytes) -> int | None:
    """The attempt of which an event tells that it has started; None: it tells something else."""
    if b'"started"' not in line:
        return None
    try:
        event = json_object(line)
    except ValueError:
        return None
    return event.get("attempt") if event.get("type") == "started" else None


def _sources(folder: AttemptDir, ranks: int, nodes: int) -> list[Path]:
    """Where the lines are: rank 0 tells of checkpoints, the last rank of iterations."""
    first = folder.node(0).rank(0).stdout
    last = folder.node(nodes - 1).rank(ranks - 1).stdout
    return [first] if ranks == 1 else [first, last]


class _Log(GrowingLog):
    """What a rank prints."""

    iteration: int | None = None
    """The last that a line named."""

    def begun_at(self) -> float:
        """When the rank began, by the file of its process id, which is written then; now, where there is none."""
        try:
            return self.path.with_name("pid").stat().st_mtime
        except OSError:
            return time.time()
