"""Runs a plan: opens or continues its run directory, launches, watches, and writes down what happened.

Success is progress, not an exit code: the target iteration was reached and the last checkpoint is whole.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmspec.errors import FINDINGS, OK, PREFLIGHT, RESUMABLE
from dfmspec.files import write_aside
from dfmspec.plan.containers import engine_of
from dfmspec.plan.scripts import stops_by
from dfmspec.record.answers import CONFIGURATION, record_answer
from dfmspec.record.bridge_checkpoints import LATEST_TRAIN_STATE, own_folder
from dfmspec.record.events import read_events
from dfmspec.record.manifest import (
    Attempt,
    Manifest,
    NodeProcess,
    now,
    read_manifest,
    write_manifest,
)
from dfmspec.record.progress import Progress, Start, committed_before, plan_id_of
from dfmspec.record.run_dir import RunDir
from dfmspec.record.runs import link_latest, owned
from dfmspec.record.scrub import scrub
from dfmspec.record.verdict import Ended, Saved, conclude, span
from dfmspec.run.bundle import at, programs, write_files
from dfmspec.run.launch import Handle, Launcher, Place, launcher
from dfmspec.run.opening import check_progress, earlier, has_finished, is_credible, is_seen_here, new_run
from dfmspec.run.preflight import write_preflight
from dfmspec.run.rank import GOES_ON
from dfmspec.run.request import Launch, Request
from dfmspec.run.watch import Watch, watch
from dfmspec.targets import CONFIG

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 180.0
"""Longer than torchrun waits for its ranks."""
_SECONDS_TO_OPEN = 60.0
_SECONDS_FOR_THE_OTHERS = 10
"""Once one node has failed, the others wait for it in vain."""
_STOPPING = "Stopping: the iteration is finished and saved first (a second signal ends it at once)"
_HEEDLESS = (
    "Stopping: the script has no handler (train.exit_signal_handler), so what follows its last checkpoint is lost"
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def execute(request: Request) -> tuple[int, Path]:
    """Run a plan to its end: (exit code, run directory).

    Raises:
        StalePlanError: the run to continue was started on other data.
        LockedError: another process runs it, or saves its checkpoints in the same folder.
        UsageError: there is nothing to resume from, or `never` meets checkpoints.
    """
    launch = Launch.of(request)
    launch.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        # One process at a time finds or makes the run: of several that start at once, all but one find it.
        with owned(launch.folder, "the folder of the runs", _SECONDS_TO_OPEN):
            found = earlier(launch)
            if found is not None and has_finished(launch, *found):
                run, _ = found
                request.talk(f"Run {run.path} has finished already; nothing to do (run.resume=never starts a new one)")
                return OK, run.path
            elsewhere = _made(launch.checkpoints_elsewhere)
            if elsewhere is not None:
                held.enter_context(owned(elsewhere, "checkpoint.save"))
            run, _ = found or new_run(launch)
            held.enter_context(owned(run.path, "run"))
            link_latest(run)
        supervisor = _Supervisor(launch, run, read_manifest(run))
        return supervisor.run(), run.path


def _made(folder: Path | None) -> Path | None:
    """A folder that is there now; None where it cannot be: the ranks will say so."""
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    return None


@dataclass
class _Supervisor:
    """One run, from its launch to its end: one attempt, and more when a scheduler starts it again."""

    launch: Launch
    run_dir: RunDir
    manifest: Manifest
    signals: list[int] = field(default_factory=list)
    _committed: dict[int, int] = field(default_factory=dict)
    """Attempt that was started here -> the iteration that had been committed by then."""

    def run(self) -> int:
        request = self.launch.request
        module = launcher(request.plan.launcher["kind"])
        start = self.launch.place_of_start(self.manifest.starts_from)
        place = Place(self.run_dir, self._next_attempt(), request.talk, start)
        previous = self._catch_signals()
        handle: Handle | None = None
        detached = False
        try:
            # An attempt that goes on is taken up; those that nobody watched are judged first.
            handle = module.attach(request.plan, place)
            self._conclude_earlier(handle.attempt if handle else 0)
            succeeded = self.manifest.verdict == "succeeded" and is_credible(self.manifest)
            if handle is None and succeeded:  # while nobody watched
                request.talk(f"Run {self.run_dir.path} has finished while nobody watched it")
                return OK

            # One attempt, and those that a scheduler starts after it.
            goes_on = handle is not None
            handle = handle or self._launched(module, place)
            while True:
                attempt = self._begin(handle)
                if request.detach:
                    detached = True
                    return OK
                seen = self._seen(attempt.number)
                if goes_on:
                    seen.forward(is_live=False)  # what was said while nobody listened
                codes = self._watch(handle, seen)
                if None in codes:
                    handle.kill()  # what is judged has ended
                seen.forward(is_last=True)
                self._conclude(attempt, codes, handle.last_word(), seen)
                if not handle.again():
                    return self._exit_code()
        finally:
            if handle is not None and not detached:
                handle.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _seen(self, attempt: int) -> Watch:
        """What looks at an attempt."""
        committed = committed_before(read_events(self.run_dir.events), attempt)
        named = self.launch.place_of_start(self.manifest.starts_from)
        start = Start(max(committed, self._committed.get(attempt, 0)), named, is_exact=not self.launch.own)
        return watch(self.launch, self.run_dir, attempt, start)

    def _next_attempt(self) -> int:
        return self.run_dir.next_attempt(attempt.number for attempt in self.manifest.attempts)

    def _catch_signals(self) -> dict[int, Any]:
        """Remember signals from now on, but for those that the parent ignores; the handlers that were there."""
        caught = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        return {number: signal.signal(number, self._remember) for number in caught}

    def _remember(self, number: int, frame: Any) -> None:
        # Ranks know no terminal that could close.
        self.signals.append(signal.SIGTERM if number == signal.SIGHUP else number)

    def _launched(self, module: Launcher, place: Place) -> Handle:
        """The next attempt, started."""
        plan = self.launch.request.plan
        self._renew_plan()
        check_progress(self.launch, self.run_dir, self.manifest.starts_from)
        folder = self.launch.checkpoints(self.run_dir)
        self._committed[place.attempt] = Progress.of(self.run_dir, folder).iteration
        if not self.launch.own and self.launch.saves and is_seen_here(self.launch):
            own_folder(folder, self.launch.plan_id)
        record_answer(self.manifest, self.launch.request.found)
        place.attempt_dir.path.mkdir(parents=True)
        if module.RUNS_SCRIPTS or engine_of(plan) is not None:
            write_files(programs(at(plan, self.run_dir.path)), self.run_dir.path)
            write_preflight(plan, self.launch.request.preflight, self.run_dir)
        return module.launch(plan, place)

    def _start(self) -> Mapping[str, Any]:
        """The keys of section `checkpoint` by which the next attempt starts; our trainer finds its own progress."""
        folder = self.launch.checkpoints(self.run_dir)
        is_begun = self.launch.saves and Progress.of(self.run_dir, folder).iteration > 0
        if self.launch.own or not is_begun:
            return self.manifest.starts_from
        return self.launch.goes_on()

    def _write_what_goes_on(self) -> None:
        """Leave what a rank reads in place of config.yaml once the run has saved: a scheduler may start it again."""
        elsewhere = self.launch.place_of_start(self.manifest.starts_from)
        if self.launch.own or not self.launch.saves or not elsewhere:
            return
        folder = self.launch.checkpoints(self.run_dir)
        file = self.run_dir.path / f"goes_on.{CONFIG}"
        write_aside(file, self.launch.config_text(self.launch.goes_on()))
        known = {"tracker": str(folder / LATEST_TRAIN_STATE), "config": str(file)}
        write_aside(self.run_dir.path / GOES_ON, json.dumps(known))

    def _renew_plan(self) -> None:
        """Write plan.json and config.yaml anew where they are lost or changed; a changed configuration is told."""
        if plan_id_of(self.run_dir) != self.launch.plan_id:
            write_aside(self.run_dir.plan, self.launch.plan_text(self.run_dir))
        if self.manifest.resumed_from is not None and not self.manifest.starts_from:
            return  # an earlier version wrote it, and nothing else says where the run starts
        text = self.launch.config_text(self._start())
        file = self.run_dir.path / CONFIG
        self._write_what_goes_on()
        try:
            found = file.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            found = ""
        if found == text:
            return
        if found == self.launch.config_text(self.manifest.starts_from):  # it has come to a start of its own
            write_aside(file, text)
            return
        meant = set(text.splitlines())
        changed = [line.strip() for line in found.splitlines() if line not in meant]
        shown = "; ".join(changed[:3]) or "lines are missing"
        self.launch.request.talk(f"[WARNING] {file} is not what the plan gives ({shown}); it is written anew")
        write_aside(file, text)

    def _begin(self, handle: Handle) -> Attempt:
        """Write down that an attempt runs; one that an earlier supervisor began is taken up."""
        number = handle.attempt
        attempt = next((attempt for attempt in self.manifest.attempts if attempt.number == number), None)
        if attempt is None:
            nodes = []
            for node, (host, argv, env) in enumerate(handle.described()):
                nodes.append(NodeProcess(node=node, host=host, argv=argv, env=env))
            began, _ = span(self.run_dir, number)
            attempt = Attempt(number=number, started=began, nodes=nodes)
            self.manifest.attempts.append(attempt)
        self.manifest.verdict = "running"
        self.manifest.reason = ""
        write_manifest(self.run_dir, self.manifest)
        self.launch.request.talk(f"Run {self.run_dir.path}, attempt {number}")
        return attempt

    def _conclude_earlier(self, number: int) -> None:
        """Judge attempts whose supervisor did not live to do it, and those that a scheduler began after it.

        number: of the attempt that goes on; 0: none does.
        """
        self._add_unrecorded(number or self._next_attempt())
        for attempt in self.manifest.attempts:
            if attempt.outcome == "running" and attempt.number != number:
                codes: list[int | None] = [None] * len(attempt.nodes)
                seen = self._seen(attempt.number)
                seen.forward(is_live=False, is_last=True)
                _, ended = span(self.run_dir, attempt.number)
                self._conclude(attempt, codes, "its supervisor was gone", seen, ended=ended)

    def _add_unrecorded(self, before: int) -> None:
        """Add to the manifest the attempts, up to a number, that a scheduler began after the last one in it."""
        recorded = self.manifest.attempts
        last = recorded[-1].number if recorded else 0
        like = recorded[-1].nodes if recorded else self._unknown_nodes()
        for begun in self.run_dir.begun_attempts():
            if not last < begun < before:
                continue
            # A scheduler refused one that is empty, or ended it before it began.
            if not any(self.run_dir.attempt(begun).path.glob("*")):
                continue
            nodes = []
            for node in like:
                nodes.append(NodeProcess(node=node.node, host=node.host, argv=node.argv, env=node.env))
            began, _ = span(self.run_dir, begun)
            self.manifest.attempts.append(Attempt(number=begun, started=began, nodes=nodes))

    def _unknown_nodes(self) -> list[NodeProcess]:
        """The nodes of an attempt whose supervisor did not live to write them down."""
        return [NodeProcess(node=node, host="?", argv=[], env=[]) for node in range(self.launch.request.plan.nnodes)]

    def _conclude(
        self,
        attempt: Attempt,
        codes: list[int | None],
        word: str,
        seen: Watch,
        ended: str | None = None,
    ) -> None:
        attempt.ended = ended or now()
        for file in scrub(self.run_dir.attempt(attempt.number).path):
            self.launch.request.talk(f"[WARNING] {file} is too long to be searched for secrets, and stays as it is")
        folder = self.launch.checkpoints(self.run_dir) if self.launch.saves else None
        saved = Saved(folder, self.launch.own, self.launch.place_of_start(self.manifest.starts_from))
        conclude(self.manifest, attempt, self.run_dir, saved, Ended(codes, self.signals, word, seen.remark))
        write_manifest(self.run_dir, self.manifest)

    def _watch(self, handle: Handle, seen: Watch) -> list[int | None]:
        """Pass on what is seen until every node has ended, or what still runs is to be.

        A signal asks the ranks to save and stop, a second ends them.
        """
        talk = self.launch.request.talk
        asked = 0
        deadline = float("inf")
        while True:
            codes = handle.poll()
            seen.forward()
            if None not in codes:
                return codes
            why = seen.over()
            if why is not None:
                talk(why)
                return codes
            if any(codes):
                deadline = min(deadline, time.monotonic() + _SECONDS_FOR_THE_OTHERS)

            # Signals that came since the last look.
            if len(self.signals) > asked:
                is_second = asked > 0  # those of one moment are one
                asked = len(self.signals)
                if is_second:
                    return codes
                # A script knows one signal alone.
                number = self.signals[0] if self.launch.own else stops_by(self.launch.request.plan)
                talk(_HEEDLESS if number is None else _STOPPING)
                handle.stop(number or signal.SIGTERM)
                deadline = time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                return codes
            time.sleep(_POLL_SECONDS)

    def _exit_code(self) -> int:
        verdict = self.manifest.verdict
        if verdict == "succeeded":
            return OK
        if verdict == "stopped":
            return RESUMABLE
        failure = self.manifest.attempts[-1].failure
        if failure is not None and failure.error_type == CONFIGURATION:
            return PREFLIGHT
        return 128 + self.signals[0] if self.signals else FINDINGS


def talk_to_stderr(line: str) -> None:
    """Progress goes to stderr; stdout is data. Where nobody reads it any more, a run goes on all the same."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
