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
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmspec.errors import FINDINGS, OK, RESUMABLE, StalePlanError, UsageError
from dfmspec.plan.plan import Plan, config_digest, config_text, guards
from dfmspec.record.checkpoints import committed, iteration_of
from dfmspec.record.manifest import Attempt, Manifest, NodeProcess, environment, git_state, now, read_manifest, write_aside, write_manifest
from dfmspec.record.runs import link_latest, new_run_id, owned, runs_of
from dfmspec.record.verdict import conclude, span
from dfmspec.run.bundle import at, programs, write_files
from dfmspec.run.launch import Handle, Launcher, Place, launcher
from dfmspec.spec.paths import PATH_KEYS, local_path
from dfmspec.targets import CONFIG, target_module

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120.0
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


def execute(request: Request) -> tuple[int, Path]:
    """Run a plan to its end: (exit code, run directory).

    Raises:
        StalePlanError: the run to continue was started on other data.
        LockedError: another process runs it, or saves its checkpoints in the same folder.
    """
    plan = request.plan
    folder = Path(plan.located(plan.run["output_dir"])) / plan.name
    run_dir, manifest = _open(folder, request)
    if manifest.verdict == "succeeded":
        request.talk(f"Run {run_dir} has finished already; nothing to do (run.resume=never starts a new one)")
        return OK, run_dir
    elsewhere = _checkpoints_elsewhere(plan)
    with owned(run_dir, "run"), owned(elsewhere, "checkpoint.save") if elsewhere else nullcontext():
        manifest = read_manifest(run_dir)  # another process may have gone on with it meanwhile
        link_latest(run_dir)
        supervisor = _Supervisor(request, run_dir, manifest)
        return supervisor.run(), run_dir


def guards_now(plan: Plan) -> dict[str, str]:
    """The guards that the plan would have, made at this moment."""
    return guards({"dataset.path": _data_of(plan)}, plan.target)


def _data_of(plan: Plan) -> str | None:
    path = plan.config.get("dataset", {}).get("path")
    return path and plan.located(path)


def check_guards(plan: Plan) -> None:
    """Refuse a saved plan whose code or data is no longer what it was made with; data that is still to be drawn is none yet.

    Raises:
        StalePlanError: it is stale.
    """
    current = guards_now(plan)
    if plan.config.get("data", {}).get("source") == "embedded" and "dataset" not in current:
        current |= {name: digest for name, digest in plan.guards.items() if name == "dataset"}
    if target_module(plan.target).OWN and "code" not in plan.guards:
        raise StalePlanError("the plan is stale: it has no guard of dfmspec's own code; make the plan again")
    for name, digest in plan.guards.items():
        if current.get(name) != digest:
            what = "dfmspec's own code" if name == "code" else f"the metadata of dataset {_data_of(plan)}"
            raise StalePlanError(f"the plan is stale: {what} has changed since it was made; make the plan again")


def _open(folder: Path, request: Request) -> tuple[Path, Manifest]:
    """The run directory of a plan: that of its unfinished or finished run, else a new one.

    Raises:
        UsageError: there is nothing to resume from, or `never` meets checkpoints.
        StalePlanError: the run to continue was started on other data.
    """
    plan, resume = request.plan, request.plan.run["resume"]
    source = None if resume in ("auto", "require", "never") else str(resume)
    earlier = list(runs_of(folder))
    same_plan = [(run_dir, manifest) for run_dir, manifest in earlier if manifest.plan_id == f"sha256:{plan.plan_id}"]
    same = [(run_dir, manifest) for run_dir, manifest in same_plan if manifest.resumed_from == source]
    if resume != "never" and same and (source is None or same[0][1].verdict != "succeeded"):
        _check_same_data(*same[0], plan)
        return same[0]
    if resume == "require":
        raise UsageError(f"run.resume is require, but {folder} has no run of this plan")
    config = _config_at_launch(plan)
    if resume == "never" and not config["checkpoint"]["save"].startswith("${") and list(Path(config["checkpoint"]["save"]).glob("iter_*")):
        raise UsageError(f"run.resume is never, but {config['checkpoint']['save']} has checkpoints; give checkpoint.save another folder")
    if isinstance(resume, int):  # a new run, from that iteration of an earlier one
        config["checkpoint"] |= {"load": _folder_with(resume, plan, [run_dir for run_dir, _ in same_plan], folder), "ckpt_step": resume}
    elif source is not None:
        named = local_path(source)
        config["checkpoint"]["load"] = os.path.abspath(named / "checkpoints" if (named / "manifest.json").exists() else named)  # a run directory will do
    run_id = new_run_id(plan)
    run_dir = folder / run_id
    run_dir.mkdir(parents=True)
    if request.spec_text is not None:
        (run_dir / "spec.yaml").write_text(request.spec_text, encoding="utf-8", errors="surrogateescape")
    write_aside(run_dir / "plan.json", json.dumps(at(plan, run_dir).as_json(), indent=2, sort_keys=True) + "\n")
    write_aside(run_dir / CONFIG, config_text(config))
    manifest = Manifest(
        run_id=run_id, name=plan.name, plan_id=f"sha256:{plan.plan_id}", spec_file=request.spec_file,
        spec_digest=_digest(request.spec_text) if request.spec_text is not None else None, config_digest=config_digest(plan.config),
        overrides=list(request.overrides), guards=dict(plan.guards), resumed_from=source, created=now(),
        git=git_state(Path.cwd()), environment=environment(),
    )  # fmt: skip
    write_manifest(run_dir, manifest)
    _tell_of_another(earlier, request)
    return run_dir, manifest


def _tell_of_another(earlier: list[tuple[Path, Manifest]], request: Request) -> None:
    """A new run of a name that has an unfinished one: a change of the spec, however small, has made it another."""
    left = next(((run_dir, manifest) for run_dir, manifest in earlier if manifest.verdict in ("stopped", "failed") and manifest.checkpoints), None)
    if left and request.plan.run["resume"] == "auto":
        run_dir, manifest = left
        request.talk(
            f"A new run: {run_dir}, at iteration {manifest.checkpoints[-1].iteration}, has another plan (dfmspec plan --diff {run_dir} tells what differs); "
            f"run.resume={run_dir} goes on from there"
        )


def _check_same_data(run_dir: Path, manifest: Manifest, plan: Plan) -> None:
    before, current = manifest.guards.get("dataset"), plan.guards.get("dataset")
    if manifest.verdict != "succeeded" and before is not None and before != current:
        raise StalePlanError(
            f"run {run_dir} cannot go on: its dataset's metadata has changed since it was started; put it back, or start anew with run.resume=never"
        )


def _folder_with(iteration: int, plan: Plan, runs: list[Path], folder: Path) -> str:
    """The checkpoint folder of the newest run of this plan that has an iteration: on the disk, also where nobody lived to write it down."""
    for run_dir in runs:
        saved = _checkpoint_folder(plan, run_dir)
        if any(iteration_of(path) == iteration for path in committed(saved)):
            return str(saved)
    raise UsageError(f"run.resume is {iteration}, but no run of this plan in {folder} has a checkpoint of that iteration")


def _config_at_launch(plan: Plan) -> dict[str, Any]:
    """The configuration with absolute paths."""
    located = json.loads(json.dumps(plan.config))
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        value = located.get(section, {}).get(name)
        if value and not value.startswith("${RUN_DIR}"):
            located[section][name] = plan.located(value)
    return located  # type: ignore[no-any-return]


def _checkpoint_folder(plan: Plan, run_dir: Path) -> Path:
    return local_path(str(_config_at_launch(plan)["checkpoint"]["save"]).replace("${RUN_DIR}", str(run_dir)))


def _checkpoints_elsewhere(plan: Plan) -> Path | None:
    """The folder of the checkpoints, where it is not the run's own: another run may have named it too."""
    save = str(_config_at_launch(plan)["checkpoint"]["save"])
    if save.startswith("${RUN_DIR}"):
        return None
    folder = local_path(save)
    with suppress(OSError):  # the ranks will say so
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return None


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class _Supervisor:
    """One run, from its launch to its end: one attempt, and more when a scheduler starts it again."""

    request: Request
    run_dir: Path
    manifest: Manifest
    signals: list[int] = field(default_factory=list)

    def run(self) -> int:
        plan, module = self.request.plan, launcher(self.request.plan.launcher["kind"])
        place = Place(str(self.run_dir), _next_attempt(self.run_dir / "attempts"), self.request.talk)
        previous = {name: signal.signal(name, self._remember) for name in _SIGNALS if signal.getsignal(name) != signal.SIG_IGN}
        handle, detached = None, False
        try:
            handle = module.attach(plan, place)
            self._conclude_earlier(handle.attempt if handle else 0)
            if handle is None and self.manifest.verdict == "succeeded":  # while nobody watched
                return OK
            handle = handle or self._launch(module, place)
            while True:
                attempt = self._begin(handle)
                if self.request.detach:
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
            for name, handler in previous.items():
                signal.signal(name, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.signals.append(signal.SIGTERM if number == signal.SIGHUP else number)  # ranks know no terminal that could close

    def _launch(self, module: Launcher, place: Place) -> Handle:
        Path(place.attempt_dir).mkdir(parents=True)
        if self.request.plan.launcher["kind"] != "local":
            write_files(programs(at(self.request.plan, self.run_dir)), self.run_dir)
        return module.launch(self.request.plan, place)

    def _begin(self, handle: Handle) -> Attempt:
        """Write down that an attempt runs; one that an earlier supervisor began is taken up."""
        attempt = next((attempt for attempt in self.manifest.attempts if attempt.number == handle.attempt), None)
        if attempt is None:
            nodes = [NodeProcess(node=i, host=host, argv=argv, env=env) for i, (host, argv, env) in enumerate(handle.described())]
            attempt = Attempt(number=handle.attempt, started=span(self.run_dir, handle.attempt)[0], nodes=nodes)
            self.manifest.attempts.append(attempt)
        self.manifest.verdict, self.manifest.reason = "running", ""
        write_manifest(self.run_dir, self.manifest)
        self.request.talk(f"Run {self.run_dir}, attempt {handle.attempt}")
        return attempt

    def _conclude_earlier(self, number: int) -> None:
        """Attempts whose supervisor did not live to conclude them, and those that a scheduler began after it."""
        folder = self.run_dir / "attempts"
        if self.manifest.attempts:
            last = self.manifest.attempts[-1]
            for begun in range(last.number + 1, number or _next_attempt(folder)):
                if any((folder / str(begun)).glob("*")):  # else a scheduler refused it, or ended it before it began
                    nodes = [NodeProcess(node=node.node, host=node.host, argv=node.argv, env=node.env) for node in last.nodes]
                    self.manifest.attempts.append(Attempt(number=begun, started=span(self.run_dir, begun)[0], nodes=nodes))
        for attempt in self.manifest.attempts:
            if attempt.outcome == "running" and attempt.number != number:
                self._conclude(attempt, [None] * len(attempt.nodes), "its supervisor was gone", ended=span(self.run_dir, attempt.number)[1])

    def _conclude(self, attempt: Attempt, codes: list[int | None], word: str, ended: str | None = None) -> None:
        folder = _checkpoint_folder(self.request.plan, self.run_dir)
        attempt.ended = ended or now()
        conclude(self.manifest, attempt, self.run_dir, folder, codes, signals=self.signals, word=word)
        write_manifest(self.run_dir, self.manifest)

    def _watch(self, handle: Handle) -> list[int | None]:
        """Pass on rank 0's lines until every node has ended; a signal asks the ranks to save and stop, a second ends them."""
        tail = _Tail(self.run_dir / "attempts" / str(handle.attempt) / "node0" / "rank0" / "stdout", self.request.talk)
        asked, deadline = 0, float("inf")
        while True:
            codes = handle.poll()
            tail.forward()
            if all(code is not None for code in codes):
                return codes
            if any(code for code in codes):  # one node failed: the others wait for it in vain
                deadline = min(deadline, time.monotonic() + 10)
            if len(self.signals) > asked:
                asked = len(self.signals)
                if asked > 1:
                    return codes
                self.request.talk("Stopping: the iteration is finished and saved first (a second signal ends it at once)")
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
        self._path, self._talk, self._offset = path, talk, 0

    def forward(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as handle:
            handle.seek(self._offset)
            data = handle.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].decode(errors="replace").splitlines():
            self._talk(line)


def _next_attempt(folder: Path) -> int:
    """One more than any attempt that was ever begun, recorded or not."""
    return 1 + max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def talk_to_stderr(line: str) -> None:
    """Progress goes to stderr; stdout is data. Where nobody reads it any more, a run goes on all the same."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
