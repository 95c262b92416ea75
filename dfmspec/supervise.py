"""Runs a plan: opens or continues its run directory, launches, watches, and writes down what happened.

Success is progress, not an exit code: the target iteration was reached and the last checkpoint is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmspec import checkpoints
from dfmspec.errors import FINDINGS, OK, RESUMABLE, StalePlanError, UsageError
from dfmspec.events import read_events
from dfmspec.launch import Handle, launcher
from dfmspec.load import PATH_KEYS
from dfmspec.manifest import Attempt, CheckpointRecord, Failure, Manifest, NodeProcess, environment, git_state, now, read_manifest, write_aside, write_manifest
from dfmspec.plan import CONFIG, Plan, config_digest, config_text, guards
from dfmspec.runs import link_latest, new_run_id, owned, runs_of

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class Request:
    """What is run, and from what."""

    plan: Plan
    spec_file: str | None
    spec_text: str | None
    overrides: tuple[str, ...]
    talk: Callable[[str], None]
    """Where progress goes."""


def execute(request: Request) -> tuple[int, Path]:
    """Run a plan to its end: (exit code, run directory).

    Raises:
        StalePlanError: the run to continue was started on other data.
        LockedError: another process runs it.
    """
    plan = request.plan
    folder = Path(str(plan.run["output_dir"])).expanduser().absolute() / plan.name
    run_dir, manifest = _open(folder, request)
    if manifest.verdict == "succeeded":
        request.talk(f"Run {run_dir} has finished already; nothing to do (run.resume=never starts a new one)")
        return OK, run_dir
    with owned(run_dir):
        manifest = read_manifest(run_dir)  # another process may have gone on with it meanwhile
        link_latest(run_dir)
        supervisor = _Supervisor(request, run_dir, manifest)
        return supervisor.run(), run_dir


def check_guards(plan: Plan) -> None:
    """Refuse a saved plan whose code or data is no longer what it was made with; raises StalePlanError."""
    flat = {"dataset.path": plan.config.get("dataset", {}).get("path")}
    current = guards(flat, plan.target)
    for name, digest in plan.guards.items():
        if current.get(name) != digest:
            what = "dfmspec's own code" if name == "code" else f"the metadata of dataset {flat['dataset.path']}"
            raise StalePlanError(f"the plan is stale: {what} has changed since it was made; make the plan again")


def _open(folder: Path, request: Request) -> tuple[Path, Manifest]:
    """The run directory of a plan: that of its unfinished or finished run, else a new one.

    Raises:
        UsageError: there is nothing to resume from, or `never` meets checkpoints.
        StalePlanError: the run to continue was started on other data.
    """
    plan, resume = request.plan, request.plan.run["resume"]
    source = None if resume in ("auto", "require", "never") else str(resume)
    same_plan = [(run_dir, manifest) for run_dir, manifest in runs_of(folder) if manifest.plan_id == f"sha256:{plan.plan_id}"]
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
        config["checkpoint"] |= {"load": _folder_with(resume, same_plan, folder), "ckpt_step": resume}
    elif source is not None:
        config["checkpoint"]["load"] = os.path.abspath(os.path.expanduser(source))
    run_id = new_run_id(plan)
    run_dir = folder / run_id
    run_dir.mkdir(parents=True)
    if request.spec_text is not None:
        (run_dir / "spec.yaml").write_text(request.spec_text)
    write_aside(run_dir / "plan.json", json.dumps(plan.as_json(), indent=2, sort_keys=True) + "\n")
    write_aside(run_dir / CONFIG, config_text(config))
    manifest = Manifest(
        run_id=run_id, name=plan.name, plan_id=f"sha256:{plan.plan_id}", spec_file=request.spec_file,
        spec_digest=_digest(request.spec_text) if request.spec_text is not None else None, config_digest=config_digest(plan.config),
        overrides=list(request.overrides), guards=dict(plan.guards), resumed_from=source, created=now(),
        git=git_state(Path.cwd()), environment=environment(),
    )  # fmt: skip
    write_manifest(run_dir, manifest)
    return run_dir, manifest


def _check_same_data(run_dir: Path, manifest: Manifest, plan: Plan) -> None:
    before, current = manifest.guards.get("dataset"), plan.guards.get("dataset")
    if manifest.verdict != "succeeded" and before is not None and before != current:
        raise StalePlanError(
            f"run {run_dir} cannot go on: its dataset's metadata has changed since it was started; put it back, or start anew with run.resume=never"
        )


def _folder_with(iteration: int, runs: list[tuple[Path, Manifest]], folder: Path) -> str:
    """The checkpoint folder of the newest run of this plan that has an iteration."""
    for _, manifest in runs:
        for checkpoint in manifest.checkpoints:
            if checkpoint.iteration == iteration and Path(checkpoint.path).is_dir():
                return str(Path(checkpoint.path).parent)
    raise UsageError(f"run.resume is {iteration}, but no run of this plan in {folder} has a checkpoint of that iteration")


def _config_at_launch(plan: Plan) -> dict[str, Any]:
    """The configuration with absolute paths."""
    located = json.loads(json.dumps(plan.config))
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        value = located.get(section, {}).get(name)
        if value and not value.startswith("${"):
            located[section][name] = os.path.abspath(os.path.expanduser(value))
    return located  # type: ignore[no-any-return]


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@dataclass
class _Supervisor:
    """One attempt of one run."""

    request: Request
    run_dir: Path
    manifest: Manifest
    signals: list[int] = field(default_factory=list)

    def run(self) -> int:
        plan, number = self.request.plan, _next_attempt(self.run_dir / "attempts")
        attempt_dir = self.run_dir / "attempts" / str(number)
        attempt_dir.mkdir(parents=True)
        events_before = _size(self.run_dir / "events.jsonl")
        previous = {name: signal.signal(name, self._remember) for name in (signal.SIGINT, signal.SIGTERM)}
        handle: Handle | None = None
        try:
            handle = launcher(str(plan.run["launcher"])).launch(plan, str(self.run_dir), str(attempt_dir))
            attempt = Attempt(
                number=number, started=now(),
                nodes=[NodeProcess(node=i, host=host, argv=argv, env=env) for i, (host, argv, env) in enumerate(handle.described())],
            )  # fmt: skip
            self.manifest.attempts.append(attempt)
            self.manifest.verdict, self.manifest.reason = "running", ""
            write_manifest(self.run_dir, self.manifest)
            self.request.talk(f"Run {self.run_dir}, attempt {number}")
            codes = self._watch(handle, attempt_dir)
        finally:
            if handle is not None:
                handle.kill()
            for name, handler in previous.items():
                signal.signal(name, handler)
        events = read_events(self.run_dir / "events.jsonl", events_before)
        self._conclude(attempt, attempt_dir, codes, events)
        write_manifest(self.run_dir, self.manifest)
        return self._exit_code()

    def _remember(self, number: int, frame: Any) -> None:
        self.signals.append(number)

    def _watch(self, handle: Handle, attempt_dir: Path) -> list[int | None]:
        """Pass on rank 0's lines until every node has ended; a signal asks the ranks to save and stop, a second ends them."""
        tail = _Tail(attempt_dir / "node0" / "rank0" / "stdout", self.request.talk)
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

    def _conclude(self, attempt: Attempt, attempt_dir: Path, codes: list[int | None], events: list[dict[str, Any]]) -> None:
        """Fill in what the attempt came to, from what it left behind."""
        manifest = self.manifest
        attempt.ended = now()
        for node, code in zip(attempt.nodes, codes, strict=True):
            node.exit_code = code if code is not None else -signal.SIGKILL
        iterations = [event for event in events if event["type"] == "iteration"]
        started = next((event for event in events if event["type"] == "started"), None)
        attempt.from_iteration = started["iteration"] if started else None
        attempt.to_iteration = iterations[-1]["iteration"] if iterations else attempt.from_iteration
        attempt.signal = self.signals[0] if self.signals else None
        attempt.failure = _first_failure(attempt_dir)
        kinds = {event["type"] for event in events}
        manifest.checkpoints = self._checkpoints()
        _fill_metrics(manifest, events, iterations)
        fault = self._last_checkpoint_fault()
        target = started["train_iters"] if started else None
        if "finished" in kinds and attempt.to_iteration == target and fault is None:
            attempt.outcome, manifest.verdict = "finished", "succeeded"
            manifest.reason = f"iteration {target} was reached and its checkpoint is whole"
        elif "stopped" in kinds and fault is None:
            attempt.outcome, manifest.verdict = "stopped", "stopped"
            manifest.reason = f"stopped by a signal after iteration {attempt.to_iteration}; the same command continues it"
        else:
            attempt.outcome, manifest.verdict = "failed", "failed"
            manifest.reason = self._why(attempt, fault, kinds)

    def _why(self, attempt: Attempt, fault: str | None, kinds: set[str]) -> str:
        if attempt.failure:
            return f"rank {attempt.failure.rank}: {attempt.failure.error_type}: {attempt.failure.message}"
        if self.signals:
            return f"ended by signal {self.signals[0]} before it could save"
        if "finished" in kinds and fault:
            return f"the last checkpoint cannot be used: {fault}"
        codes = ", ".join(str(node.exit_code) for node in attempt.nodes)
        last = _last_line(self.run_dir / "attempts" / str(attempt.number))
        return f"torchrun ended with {codes} before the last iteration" + (f": {last}" if last else "")

    def _folder(self) -> Path:
        save = str(_config_at_launch(self.request.plan)["checkpoint"]["save"])
        return Path(save.replace("${RUN_DIR}", str(self.run_dir))).expanduser()

    def _checkpoints(self) -> list[CheckpointRecord]:
        found = reversed(checkpoints.committed(self._folder()))
        return [
            CheckpointRecord(
                iteration=checkpoints.iteration_of(path), path=str(path),
                manifest_digest="sha256:" + hashlib.sha256((path / checkpoints.MANIFEST).read_bytes()).hexdigest(),
            )
            for path in found
        ]  # fmt: skip

    def _last_checkpoint_fault(self) -> str | None:
        newest = checkpoints.committed(self._folder())
        return checkpoints.problem(newest[0]) if newest else "there is none"

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


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _first_failure(attempt_dir: Path) -> Failure | None:
    """The error of the rank that failed first."""
    records = []
    for path in attempt_dir.glob("node*/rank*/error.json"):
        try:
            records.append((json.loads(path.read_text()), int(path.parent.parent.name[4:])))
        except (OSError, ValueError):
            continue
    if not records:
        return None
    record, node = min(records, key=lambda pair: pair[0]["time"])
    return Failure(
        node=node, rank=record["rank"], error_type=record["error_type"], message=record["message"], traceback=record["traceback"]
    )


def _last_line(attempt_dir: Path) -> str:
    """The last thing that rank 0 or torchrun said on the error stream."""
    for name in ("node0/rank0/stderr", "node0/rank0/stdout", "node0/torchrun.log"):
        path = attempt_dir / name
        if path.exists() and (lines := path.read_text(errors="replace").strip().splitlines()):
            return lines[-1][:300]
    return ""


def _fill_metrics(manifest: Manifest, events: list[dict[str, Any]], iterations: list[dict[str, Any]]) -> None:
    if not iterations:
        return
    metrics, losses = manifest.metrics, [event["loss"] for event in iterations]
    if metrics.first_loss is None:
        metrics.first_loss = losses[0]
    metrics.final_loss = statistics.fmean(losses[-max(1, min(100, len(losses) // 10)) :])
    evaluations = [event["loss"] for event in events if event["type"] == "evaluation"]
    metrics.eval_loss = evaluations[-1] if evaluations else metrics.eval_loss
    metrics.tokens_per_second = statistics.median(event["tokens_per_second"] for event in iterations)
    metrics.seconds_per_iteration = statistics.median(event["seconds"] for event in iterations)


def talk_to_stderr(line: str) -> None:
    """Progress goes to stderr; stdout is data."""
    print(line, file=sys.stderr, flush=True)
