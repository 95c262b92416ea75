"""What a supervisor sees of an attempt: the lines of dfmspec's own trainer, or what a script's lines come to."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from dfmspec.record.events import Event
from dfmspec.record.growing import GrowingLog
from dfmspec.record.progress import Start, fault_of_start, flat
from dfmspec.record.run_dir import RunDir
from dfmspec.record.transcript import Facts, Transcript
from dfmspec.run.request import Launch
from dfmspec.targets import target_module

SECONDS_AFTER_THE_END = 60.0
"""Without a new line or byte, once a script has nothing left to do: some never exit by themselves."""
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_OF_EVALUATION = 600.0
"""The same, while an evaluation after the end has not been told."""


class Watch(Protocol):
    """An attempt, as it is seen."""

    @property
    def remark(self) -> str:
        """Why it was ended, or what it says of its end; "": nothing."""

    def forward(self, *, is_live: bool = True, is_last: bool = False) -> None:
        """Pass on what is new.

        Args:
            is_live: it was just said.
            is_last: nothing more will be.
        """

    def over(self) -> str | None:
        """Why what still runs is to be ended; None: it is not."""


def watch(launch: Launch, run: RunDir, attempt: int, start: Start) -> Watch:
    """What looks at an attempt.

    Args:
        launch: what was launched.
        run: its directory.
        attempt: its number.
        start: where it was to begin.
    """
    plan = launch.request.plan
    upstream = target_module(plan.target).UPSTREAM
    if upstream is None:
        node = run.attempt(attempt).node(0)
        return OwnWatch(node.rank(0).stdout, launch.request.talk)
    return ScriptWatch(launch, run, attempt, start)


class OwnWatch:
    """Whole new lines of what rank 0 prints."""

    def __init__(self, path: Path, talk: Callable[[str], None]) -> None:
        self.remark = ""
        self._log = GrowingLog(path)
        self._talk = talk

    def forward(self, *, is_live: bool = True, is_last: bool = False) -> None:
        """Pass on the lines that were written since the last call; those of before are news as well."""
        for line in self._log.lines():
            self._talk(line)

    def over(self) -> str | None:
        """Never: the trainer ends by itself."""
        return None


class ScriptWatch:
    """A script that knows nothing of dfmspec: its lines as events, and an end where it does not find its own."""

    def __init__(self, launch: Launch, run: RunDir, attempt: int, start: Start) -> None:
        plan = launch.request.plan
        self._start = start
        self._talk = launch.request.talk
        self._folder = launch.checkpoints(run)
        self._facts = _facts(launch)
        self._transcript = Transcript(run, attempt, _world_size(launch), plan.nnodes, self._facts)
        self._started: int | None = None
        self._first: int | None = None
        self._saved: int | None = None
        self._seen: object = None
        self._changed = time.monotonic()
        self._next_look = 0.0
        self._says_evaluations = bool(launch.config["train"].get("eval_iters"))
        self._fault = ""

    @property
    def ended(self) -> str | None:
        """finished or stopped, once the script's lines say so."""
        return self._transcript.ended

    @property
    def remark(self) -> str:
        """Why the attempt was ended, or what the script said of its end."""
        return self._fault or self._transcript.remark

    def forward(self, *, is_live: bool = True, is_last: bool = False) -> None:
        """Write the events of new lines, and tell them as dfmspec's own trainer would."""
        for event in self._transcript.forward(is_live=is_live, is_last=is_last):
            is_news = event["type"] != "checkpoint" or event["iteration"] != self._saved
            if event["type"] == "checkpoint":  # the last one is saved twice
                self._saved = event["iteration"]
            if event["type"] == "started" and self._started is None:
                self._started = event["iteration"]
            if event["type"] == "iteration" and self._first is None:
                self._first = event["iteration"]
            line = _line(event, self._facts.train_iters)
            if line and is_live and is_news:
                self._talk(line)

    def over(self) -> str | None:
        """Why the script is to be ended: it began anew in silence, or has nothing left to do and does not exit."""
        fault = self._misbegun()
        if fault is not None:
            self._fault = fault
            return f"[WARNING] It is ended: {fault}"
        if self.ended is None:
            return None

        # Never while a line or a file still grows.
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        seen = (self._transcript.size(), _sizes(self._folder))
        if seen != self._seen:
            self._seen = seen
            self._changed = now
        is_evaluating = self._says_evaluations and self.ended == "finished" and not self._transcript.is_evaluated
        quiet = now - self._changed
        if quiet < (_SECONDS_OF_EVALUATION if is_evaluating else SECONDS_AFTER_THE_END):
            return None
        self._fault = f"its processes did not exit, and were ended {quiet:.0f} s after their last word"
        return f"The script has {self.ended}, and {self._fault}"

    def _misbegun(self) -> str | None:
        """Why what is trained is not the run's."""
        if self._started is None:
            return None
        return fault_of_start(self._start, started=self._started, first=self._first)


def _world_size(launch: Launch) -> int:
    """The number of ranks of a launch."""
    plan = launch.request.plan
    flags = list(plan.command)
    nproc = int(flags[flags.index("--nproc-per-node") + 1])
    return nproc * plan.nnodes


def _facts(launch: Launch) -> Facts:
    """What the lines of a script do not say."""
    plan = launch.request.plan
    module = target_module(plan.target)
    assert module.UPSTREAM is not None
    return Facts(
        told=module.UPSTREAM.told,
        train_iters=launch.train_iters,
        tokens=module.work(_values(launch)).tokens,
        saves=launch.saves,
    )


def _values(launch: Launch) -> dict[str, Any]:
    """The configuration by dotted keys; what it leaves out is None."""
    plan = launch.request.plan
    values: dict[str, Any] = defaultdict(lambda: None, flat(launch.config))
    values["data.source"] = "mock" if "--mock" in plan.command else "webdataset"
    return values


def _sizes(folder: Path) -> tuple[tuple[str, int], ...]:
    """Every file of the newest checkpoints, and its bytes."""
    try:
        return tuple(sorted((str(path), path.stat().st_size) for path in folder.rglob("*") if path.is_file()))
    except OSError:  # one was removed meanwhile
        return (("", time.monotonic_ns()),)


def _line(event: Event, train_iters: int) -> str:
    """An event in the words of dfmspec's own trainer; "": it needs none."""
    iteration = event["iteration"]
    kind = event["type"]
    if kind == "started":
        return f"[INFO] The script trains from iteration {iteration}"
    if kind == "checkpoint":
        return f"[INFO] Checkpoint saved: {event['path']}/"
    if kind == "evaluation":
        loss = event["loss"]
        shown = "no number" if loss is None else f"{loss:.3f}"
        return f"[INFO] Evaluation at iteration {iteration} on the {event['split']} split, Loss: {shown}"
    if kind != "iteration":
        return ""
    width = len(str(train_iters))
    words = [f"Iteration {iteration:>{width}}/{train_iters}"]
    words.append("Loss: no number" if event["loss"] is None else f"Loss: {event['loss']:.3f}")
    if "lr" in event:
        words.append(f"LR: {event['lr']:.3g}")
    if "grad_norm" in event:
        words.append(f"grad norm: {event['grad_norm']:.3f}")
    words.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    if event.get("skipped"):
        words.append(f"skipped: {event['skipped']:.0f}")
    if event.get("nan"):
        words.append(f"NaN: {event['nan']}")
    level = "WARNING" if event["loss"] is None or event.get("nan") else "INFO"
    return f"[{level}] {', '.join(words)}"
