"""Runs a plan: opens or continues its run directory, launches, watches, and writes down what happened.

Success is progress, not an exit code: the target iteration was reached and the last checkpoint is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmspec.errors import FINDINGS, OK, RESUMABLE, CheckpointError, StalePlanError, UsageError
from dfmspec.files import write_aside
from dfmspec.plan.plan import Plan, config_text, guards
from dfmspec.record.checkpoints import committed, iteration_of, newest_described
from dfmspec.record.manifest import (
    Attempt,
    Manifest,
    NodeProcess,
    git_state,
    launch_host,
    now,
    read_manifest,
    write_manifest,
)
from dfmspec.record.progress import Identity, Progress, check_start, plan_id_of
from dfmspec.record.run_dir import RunDir
from dfmspec.record.runs import broken_runs, latest_of, link_latest, new_run_id, owned, runs_of
from dfmspec.record.verdict import conclude, span
from dfmspec.run.bundle import at, programs, write_files
from dfmspec.run.launch import Handle, Launcher, Place, launcher
from dfmspec.spec.digest import config_digest
from dfmspec.spec.iterations import iteration_folders
from dfmspec.spec.paths import PATH_KEYS, RUN_DIR, local_path
from dfmspec.spec.resume import Resume
from dfmspec.targets import CONFIG, target_module

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120.0
_SECONDS_TO_OPEN = 60.0
_SECONDS_FOR_THE_OTHERS = 10
"""Once one node has failed, the others wait for it in vain."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Request:
    """What is run, and from what."""

    plan: Plan
    spec_file: str | None
    spec_text: str | None
    overrides: tuple[str, ...]
    talk: Callable[[str], None]
    """Where progress goes."""
    detach: bool = False
    """Start it and leave it to its scheduler."""


@dataclass(frozen=True)
class Launch:
    """A request as it is launched: what follows from the plan, worked out once."""

    request: Request
    config: dict[str, Any]
    """The configuration with absolute paths; `${RUN_DIR}` is still a symbol."""
    resume: Resume
    folder: Path
    """The runs of the plan's name."""

    @classmethod
    def of(cls, request: Request) -> Launch:
        """What follows from a request's plan."""
        plan = request.plan
        output_dir = Path(plan.located(plan.run["output_dir"]))
        return cls(
            request=request,
            config=_config_at_launch(plan),
            resume=Resume.parse(plan.run["resume"]),
            folder=output_dir / plan.name,
        )

    @property
    def plan_id(self) -> str:
        """As the manifest has it."""
        return f"sha256:{self.request.plan.plan_id}"

    def config_text(self, starts_from: Mapping[str, Any]) -> str:
        """config.yaml of a run; `starts_from`: keys of section `checkpoint` that are the run's own."""
        config = dict(self.config)
        config["checkpoint"] = config["checkpoint"] | dict(starts_from)
        return config_text(config)

    def plan_text(self, run: RunDir) -> str:
        """plan.json of a run."""
        stored = at(self.request.plan, run.path).as_json()
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"

    def checkpoints(self, run: RunDir) -> Path:
        """Where a run of the plan saves."""
        save = str(self.config["checkpoint"]["save"])
        return local_path(save.replace(RUN_DIR, str(run.path)))

    @property
    def checkpoints_elsewhere(self) -> Path | None:
        """The folder of the checkpoints, where it is not the run's own: another run may have named it too."""
        save = str(self.config["checkpoint"]["save"])
        return None if save.startswith(RUN_DIR) else local_path(save)


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
            found = _earlier(launch)
            if found is not None and _has_finished(launch, *found):
                run, _ = found
                request.talk(f"Run {run.path} has finished already; nothing to do (run.resume=never starts a new one)")
                return OK, run.path
            elsewhere = _made(launch.checkpoints_elsewhere)
            if elsewhere is not None:
                held.enter_context(owned(elsewhere, "checkpoint.save"))
            run, _ = found or _new_run(launch)
            held.enter_context(owned(run.path, "run"))
            link_latest(run)
        supervisor = _Supervisor(launch, run, read_manifest(run))
        return supervisor.run(), run.path


def guards_now(plan: Plan) -> dict[str, str]:
    """The guards that the plan would have, made at this moment."""
    return guards({"dataset.path": _data_of(plan)}, plan.target)


def _data_of(plan: Plan) -> str | None:
    path = plan.config.get("dataset", {}).get("path")
    return plan.located(path) if path else None


def check_guards(plan: Plan) -> None:
    """Refuse a saved plan whose code or data is no longer what it was made with.

    Data that is still to be drawn has no guard yet.

    Raises:
        StalePlanError: it is stale.
    """
    current = guards_now(plan)
    is_drawn = plan.config.get("data", {}).get("source") == "embedded"
    if is_drawn and "dataset" not in current and "dataset" in plan.guards:
        current["dataset"] = plan.guards["dataset"]
    if target_module(plan.target).OWN and "code" not in plan.guards:
        raise StalePlanError("the plan is stale: it has no guard of dfmspec's own code; make the plan again")
    for name, digest in plan.guards.items():
        if current.get(name) == digest:
            continue
        what = "dfmspec's own code"
        if name != "code":
            what = f"the metadata of dataset {_data_of(plan)}"
        raise StalePlanError(f"the plan is stale: {what} has changed since it was made; make the plan again")


def _earlier(launch: Launch) -> tuple[RunDir, Manifest] | None:
    """The unfinished or finished run that a plan goes on with; None: it is to begin a new one.

    Raises:
        UsageError: there is nothing to resume from, or `never` meets checkpoints.
        StalePlanError: the run to continue was started on other data.
        CheckpointError: a run of the plan has lost its record.
    """
    resume = launch.resume
    _refuse_broken(launch)

    # Go on with the newest run of this plan from this source; one that started elsewhere is not started there twice.
    for run, manifest in _of_the_plan(launch):
        if manifest.resumed_from != resume.source:
            continue
        is_over = resume.source is not None and manifest.verdict == "succeeded"
        if resume.kind == "never" or is_over:
            break
        _check_same_data(run, manifest, launch.request.plan)
        return run, manifest

    # Else a new one, where that is allowed.
    if resume.kind == "require":
        raise UsageError(f"run.resume is require, but {launch.folder} has no run of this plan")
    elsewhere = launch.checkpoints_elsewhere
    if resume.kind == "never" and elsewhere is not None and iteration_folders(elsewhere):
        raise UsageError(f"run.resume is never, but {elsewhere} has checkpoints; give checkpoint.save another folder")
    return None


def _has_finished(launch: Launch, run: RunDir, manifest: Manifest) -> bool:
    """Whether a run has reached its last iteration, and still has what it committed.

    Raises:
        CheckpointError: its checkpoints are gone.
    """
    if manifest.verdict != "succeeded":
        return False
    if not _is_credible(manifest):
        launch.request.talk(f"[WARNING] {run.manifest} says succeeded, and its last attempt did not finish: it goes on")
        return False
    _check_progress(launch, run)
    return True


def _is_credible(manifest: Manifest) -> bool:
    """Whether a record that says succeeded has an attempt that did."""
    return not manifest.attempts or manifest.attempts[-1].outcome == "finished"


def _check_progress(launch: Launch, run: RunDir) -> None:
    """See that what a run has committed is there, and its plan's; what may be meant is told by the ranks.

    Raises:
        CheckpointError: it is gone, or another plan's.
    """
    folder = launch.checkpoints(run)
    if not folder.parent.exists():  # it is a disk of the nodes
        return
    identity = Identity(launch.config, launch.plan_id)
    check_start(newest_described(folder), Progress.of(run, folder, launch.resume.source), identity, report=_unheard)


def _unheard(line: str) -> None:
    """A line that somebody else tells."""


def _of_the_plan(launch: Launch) -> list[tuple[RunDir, Manifest]]:
    """The runs of a plan: first the one that was opened last, then by their names, the newest first."""
    found = [(run, manifest) for run, manifest in runs_of(launch.folder) if manifest.plan_id == launch.plan_id]

    # A copy has the id of what it was copied from.
    names = {run.path.name for run, _ in found}
    own = []
    for run, manifest in found:
        if manifest.run_id != run.path.name and manifest.run_id in names:
            launch.request.talk(f"{run} is a copy of run {manifest.run_id} and is left alone")
        else:
            own.append((run, manifest))
    latest = latest_of(launch.folder)
    return sorted(own, key=lambda pair: latest is None or pair[0].path.resolve() != latest.path)


def _refuse_broken(launch: Launch) -> None:
    """See that no run that may be this plan's has lost its record.

    Raises:
        CheckpointError: one has.
    """
    if launch.resume.kind not in ("auto", "require"):
        return
    for run, fault in broken_runs(launch.folder):
        if plan_id_of(run) in (None, launch.plan_id):
            raise CheckpointError(
                f"the {run.manifest.name} of run {run} {fault}; put it back, or move the run away, "
                "or begin anew with run.resume=never"
            )


def _new_run(launch: Launch) -> tuple[RunDir, Manifest]:
    """Make a run directory, with everything in it that was asked and compiled."""
    request = launch.request
    plan = request.plan
    starts_from = _start_elsewhere(launch)
    run_id = new_run_id(plan)
    run = RunDir(launch.folder / run_id)
    _check_progress(launch, run)
    _check_something_to_train(launch, starts_from)
    _tell_of_another(launch, run)

    # What was asked, and what it was compiled to.
    run.path.mkdir()
    if request.spec_text is not None:
        write_aside(run.spec, request.spec_text)
    write_aside(run.plan, launch.plan_text(run))
    write_aside(run.path / CONFIG, launch.config_text(starts_from))

    # The record.
    manifest = Manifest(
        run_id=run_id,
        name=plan.name,
        plan_id=launch.plan_id,
        spec_file=request.spec_file,
        spec_digest=None if request.spec_text is None else _digest(request.spec_text),
        config_digest=config_digest(plan.config),
        overrides=list(request.overrides),
        guards=dict(plan.guards),
        resumed_from=launch.resume.source,
        starts_from=starts_from,
        created=now(),
        git=git_state(Path.cwd()),
        environment=launch_host(),
    )
    write_manifest(run, manifest)
    return run, manifest


def _start_elsewhere(launch: Launch) -> dict[str, Any]:
    """The keys of section `checkpoint` by which a new run starts where run.resume says."""
    resume = launch.resume
    if resume.iteration is not None:
        return {"load": _folder_with(resume.iteration, launch), "ckpt_step": resume.iteration}
    if resume.folder is not None:
        named = RunDir(local_path(resume.folder))
        folder = named.checkpoints if named.manifest.exists() else named.path  # a run directory will do
        return {"load": os.path.realpath(folder)}  # `latest` leads elsewhere once this run is opened
    return {}


def _check_something_to_train(launch: Launch, starts_from: Mapping[str, Any]) -> None:
    """See that the iteration that a new run sets out from is not its last already.

    Raises:
        UsageError: it is.
    """
    if not starts_from:
        return
    iteration = starts_from.get("ckpt_step")
    if iteration is None:
        newest = newest_described(Path(starts_from["load"]))
        iteration = 0 if newest is None else iteration_of(newest)
    last = launch.config["train"]["train_iters"]
    if iteration >= last:
        raise UsageError(
            f"run.resume sets out from iteration {iteration}, and train.train_iters is {last}: nothing would be "
            "trained; raise train.train_iters"
        )


def _folder_with(iteration: int, launch: Launch) -> str:
    """The checkpoint folder of the newest run of this plan that has an iteration.

    By the disk: also where nobody lived to write it down.
    """
    for run, _ in _of_the_plan(launch):
        saved = launch.checkpoints(run)
        if any(iteration_of(path) == iteration for path in committed(saved)):
            return str(saved)
    raise UsageError(
        f"run.resume is {iteration}, but no run of this plan in {launch.folder} has a checkpoint of that iteration"
    )


def _tell_of_another(launch: Launch, new: RunDir) -> None:
    """A new run of a name that has an unfinished one: a change of the spec, however small, has made it another.

    By the disk: also where nobody lived to write it down.
    """
    if launch.resume.kind != "auto":
        return
    for run, manifest in runs_of(launch.folder):
        if manifest.plan_id == launch.plan_id:
            continue
        saved = committed(launch.checkpoints(run))
        if manifest.verdict != "succeeded" and saved:
            iteration = iteration_of(saved[0])
            launch.request.talk(
                f"A new run, {new}: {run}, at iteration {iteration}, has another plan "
                f"(dfmspec plan --diff {run} tells what differs); run.resume={run} goes on from there"
            )
            return


def _check_same_data(run: RunDir, manifest: Manifest, plan: Plan) -> None:
    before = manifest.guards.get("dataset")
    is_unfinished = manifest.verdict != "succeeded"
    if is_unfinished and before is not None and before != plan.guards.get("dataset"):
        raise StalePlanError(
            f"run {run.path} cannot go on: its dataset's metadata has changed since it was started; "
            "put it back, or start anew with run.resume=never"
        )


def _config_at_launch(plan: Plan) -> dict[str, Any]:
    """The configuration with absolute paths."""
    located: dict[str, Any] = json.loads(json.dumps(plan.config))
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        value = located.get(section, {}).get(name)
        if value and not value.startswith(RUN_DIR):
            located[section][name] = plan.located(value)
    return located


def _made(folder: Path | None) -> Path | None:
    """A folder that is there now; None where it cannot be: the ranks will say so."""
    if folder is not None:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    return None


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class _Supervisor:
    """One run, from its launch to its end: one attempt, and more when a scheduler starts it again."""

    launch: Launch
    run_dir: RunDir
    manifest: Manifest
    signals: list[int] = field(default_factory=list)

    def run(self) -> int:
        request = self.launch.request
        module = launcher(request.plan.launcher["kind"])
        place = Place(self.run_dir, self._next_attempt(), request.talk)
        previous = self._catch_signals()
        handle: Handle | None = None
        detached = False
        try:
            # An attempt that goes on is taken up; those that nobody watched are judged first.
            handle = module.attach(request.plan, place)
            self._conclude_earlier(handle.attempt if handle else 0)
            succeeded = self.manifest.verdict == "succeeded" and _is_credible(self.manifest)
            if handle is None and succeeded:  # while nobody watched
                return OK

            # One attempt, and those that a scheduler starts after it.
            handle = handle or self._start(module, place)
            while True:
                attempt = self._begin(handle)
                if request.detach:
                    detached = True
                    return OK
                codes = self._watch(handle)
                if None in codes:
                    handle.kill()  # what is judged has ended
                self._conclude(attempt, codes, handle.last_word())
                if not handle.again():
                    return self._exit_code()
        finally:
            if handle is not None and not detached:
                handle.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _next_attempt(self) -> int:
        return self.run_dir.next_attempt(attempt.number for attempt in self.manifest.attempts)

    def _catch_signals(self) -> dict[int, Any]:
        """Remember signals from now on, but for those that the parent ignores; the handlers that were there."""
        caught = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        return {number: signal.signal(number, self._remember) for number in caught}

    def _remember(self, number: int, frame: Any) -> None:
        # Ranks know no terminal that could close.
        self.signals.append(signal.SIGTERM if number == signal.SIGHUP else number)

    def _start(self, module: Launcher, place: Place) -> Handle:
        plan = self.launch.request.plan
        self._renew_plan()
        _check_progress(self.launch, self.run_dir)
        place.attempt_dir.path.mkdir(parents=True)
        if module.RUNS_SCRIPTS:
            write_files(programs(at(plan, self.run_dir.path)), self.run_dir.path)
        return module.launch(plan, place)

    def _renew_plan(self) -> None:
        """Write plan.json and config.yaml anew where they are lost or changed; a changed configuration is told."""
        if plan_id_of(self.run_dir) != self.launch.plan_id:
            write_aside(self.run_dir.plan, self.launch.plan_text(self.run_dir))
        if self.manifest.resumed_from is not None and not self.manifest.starts_from:
            return  # an earlier version wrote it, and nothing else says where the run starts
        text = self.launch.config_text(self.manifest.starts_from)
        file = self.run_dir.path / CONFIG
        try:
            found = file.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            found = ""
        if found == text:
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
                _, ended = span(self.run_dir, attempt.number)
                self._conclude(attempt, codes, "its supervisor was gone", ended=ended)

    def _add_unrecorded(self, before: int) -> None:
        """Add to the manifest the attempts, up to a number, that a scheduler began after the last one in it."""
        if not self.manifest.attempts:
            return
        last = self.manifest.attempts[-1]
        for begun in self.run_dir.begun_attempts():
            if not last.number < begun < before:
                continue
            # A scheduler refused one that is empty, or ended it before it began.
            if not any(self.run_dir.attempt(begun).path.glob("*")):
                continue
            nodes = []
            for node in last.nodes:
                nodes.append(NodeProcess(node=node.node, host=node.host, argv=node.argv, env=node.env))
            began, _ = span(self.run_dir, begun)
            self.manifest.attempts.append(Attempt(number=begun, started=began, nodes=nodes))

    def _conclude(self, attempt: Attempt, codes: list[int | None], word: str, ended: str | None = None) -> None:
        attempt.ended = ended or now()
        folder = self.launch.checkpoints(self.run_dir)
        conclude(self.manifest, attempt, self.run_dir, folder, codes, signals=self.signals, word=word)
        write_manifest(self.run_dir, self.manifest)

    def _watch(self, handle: Handle) -> list[int | None]:
        """Pass on rank 0's lines until every node has ended.

        A signal asks the ranks to save and stop, a second ends them.
        """
        talk = self.launch.request.talk
        node = self.run_dir.attempt(handle.attempt).node(0)
        tail = _Tail(node.rank(0).stdout, talk)
        asked = 0
        deadline = float("inf")
        while True:
            codes = handle.poll()
            tail.forward()
            if None not in codes:
                return codes
            if any(codes):
                deadline = min(deadline, time.monotonic() + _SECONDS_FOR_THE_OTHERS)

            # Signals that came since the last look.
            if len(self.signals) > asked:
                asked = len(self.signals)
                if asked > 1:
                    return codes
                talk("Stopping: the iteration is finished and saved first (a second signal ends it at once)")
                handle.stop(self.signals[0])
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
        return 128 + self.signals[0] if self.signals else FINDINGS


class _Tail:
    """Whole new lines of a growing file."""

    def __init__(self, path: Path, talk: Callable[[str], None]) -> None:
        self._path = path
        self._talk = talk
        self._offset = 0

    def forward(self) -> None:
        """Pass on the lines that were written since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as handle:
            handle.seek(self._offset)
            data = handle.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].decode(errors="replace").splitlines():
            self._talk(line)


def talk_to_stderr(line: str) -> None:
    """Progress goes to stderr; stdout is data. Where nobody reads it any more, a run goes on all the same."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
