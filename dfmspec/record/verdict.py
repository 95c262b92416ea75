"""What an attempt came to, from what it left behind: events, checkpoints, errors of ranks, the word of a scheduler."""

from __future__ import annotations

import math
import re
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from dfmspec.record import bridge_checkpoints, checkpoints
from dfmspec.record.answers import CONFIGURATION, failure_of, record_answers
from dfmspec.record.events import Event, evaluation_losses, events_of_attempt, read_events
from dfmspec.record.files import read_json
from dfmspec.record.manifest import Attempt, CheckpointRecord, Failure, Manifest, finite, moment
from dfmspec.record.progress import Progress, Start, committed_before, fault_of_start
from dfmspec.record.run_dir import AttemptDir, RunDir
from dfmspec.spec.iterations import folder_of

Events = Sequence[Event]
_REACHED = ("iteration", "checkpoint", "stopped", "finished")
"""Events that name an iteration which an attempt has reached."""
_LOSSES = 100
"""The most iterations whose losses make the final one."""


class Checkpoints(Protocol):
    """A module that judges checkpoints by their files."""

    def committed(self, folder: Path) -> list[Path]:
        """Those of a folder whose save was finished, the highest iteration first."""

    def problem(self, checkpoint: Path) -> str | None:
        """Why one cannot be used."""

    def manifest_digest(self, checkpoint: Path) -> str:
        """sha256 of what describes it."""


def judge_of(*, own: bool) -> Checkpoints:
    """What judges the checkpoints of dfmspec's own trainer, or of a script."""
    return checkpoints if own else bridge_checkpoints


class Saved(NamedTuple):
    """Where a run saves, and what judges that."""

    folder: Path | None
    """Where its checkpoints are; None: none is asked for."""
    own: bool
    """Whether dfmspec's own trainer wrote them; otherwise a script, whose checkpoints carry no checksums."""
    named: str = ""
    """The place of a checkpoint that the run was told to go on from; "": none."""

    @property
    def judge(self) -> Checkpoints:
        """What judges its checkpoints."""
        return judge_of(own=self.own)


class Ended(NamedTuple):
    """How an attempt ended, as whoever watched it knows."""

    codes: Sequence[int | None]
    """What torchrun ended with on each node; None: whatever it left, and killed where it left nothing."""
    signals: Sequence[int] = ()
    """Those that asked the supervisor to stop."""
    word: str = ""
    """The last that a scheduler said."""
    remark: str = ""
    """What was seen of why it ended; "": nothing."""


def conclude(manifest: Manifest, attempt: Attempt, run: RunDir, saved: Saved, ended: Ended) -> None:
    """Fill in an attempt that is over, and the run's verdict.

    Args:
        manifest: the record of the run; `attempt` is one of its own.
        attempt: the one that is over.
        run: the run directory.
        saved: where the run saves.
        ended: how the attempt ended.
    """
    # What it left.
    attempt_dir = run.attempt(attempt.number)
    _fill_nodes(attempt, attempt_dir, ended.codes)
    of_the_run = read_events(run.events)
    events = events_of_attempt(of_the_run, attempt.number)
    iterations = [event for event in events if event["type"] == "iteration"]
    _fill_progress(attempt, events, iterations)
    attempt.signal = _signal(ended.signals, events)
    attempt.failure = failure_of(attempt_dir) or _first_failure(attempt_dir)
    manifest.checkpoints = [] if saved.folder is None else _records(run, saved.folder, saved.judge)
    record_answers(manifest, attempt_dir)
    _fill_metrics(manifest, events, iterations)

    # What came of it.
    kinds = {event["type"] for event in events}
    misbegun = _misbegun(of_the_run, attempt, events, saved)
    fault = misbegun if saved.folder is None else _fault_of(saved.folder, attempt.to_iteration, saved.judge) or misbegun
    if "finished" in kinds and fault is None:
        fault = _worthless(of_the_run, attempt, events)
    if "finished" in kinds and fault is None:
        attempt.outcome = "finished"
        manifest.verdict = "succeeded"
        manifest.reason = _succeeded(attempt, saved, ended.remark)
    elif "stopped" in kinds and fault is None:
        attempt.outcome = "stopped"
        manifest.verdict = "stopped"
        manifest.reason = _stopped(attempt, saved)
    else:
        attempt.outcome = "failed"
        manifest.verdict = "failed"
        if "finished" not in kinds:  # then a checkpoint of the last iteration was not to be expected
            fault = misbegun
        manifest.reason = _why(attempt, attempt_dir, fault, ended)


def _succeeded(attempt: Attempt, saved: Saved, remark: str) -> str:
    """Why an attempt succeeded, what that does not say, and what went wrong after it."""
    reason = f"iteration {attempt.to_iteration} was reached and its checkpoint is whole"
    if saved.folder is None:
        reason = f"iteration {attempt.to_iteration} was reached, and no checkpoint is asked for"
    elif not saved.own:
        reason = f"iteration {attempt.to_iteration} was reached and its checkpoint is {bridge_checkpoints.WHOLENESS}"
    if remark:  # it was ended
        attempt.failure = None
        return f"{reason}; {remark}"
    failure = attempt.failure
    if failure is not None and not saved.own:
        return f"{reason}; after that, rank {failure.rank} failed: {failure.error_type}: {failure.message}"
    return reason


def _stopped(attempt: Attempt, saved: Saved) -> str:
    """Why an attempt was stopped."""
    if not saved.own:
        attempt.failure = None  # what follows a stop is none
    by = "by a signal " if attempt.signal or saved.own else ""
    return f"stopped {by}after iteration {attempt.to_iteration}; the same command continues it"


def _fill_nodes(attempt: Attempt, attempt_dir: AttemptDir, codes: Sequence[int | None]) -> None:
    """What torchrun ended with on each node, and on which host."""
    for node, code in zip(attempt.nodes, codes, strict=True):
        left = code
        if left is None:
            left = exit_code_left(attempt_dir, node.node)
        if left is None:
            left = -signal.SIGKILL
        node.exit_code = left
        host = attempt_dir.node(node.node).host
        if host.exists():
            node.host = host.read_text(errors="replace").strip()


def _fill_progress(attempt: Attempt, events: Events, iterations: Events) -> None:
    """From where to where an attempt came, and how long its start took."""
    started = _first(events, "started")
    attempt.from_iteration = None
    attempt.start_seconds = None
    if started is not None:
        attempt.from_iteration = started["iteration"]
        attempt.start_seconds = _start_seconds(started, iterations)
    # Not every iteration has a line in a script's log.
    reached = [event["iteration"] for event in events if event["type"] in _REACHED]
    attempt.to_iteration = max(reached, default=attempt.from_iteration)


def _target(events: Events) -> int | None:
    """The last iteration that an attempt was to reach."""
    started = _first(events, "started")
    if started is None:
        return None
    target: int = started["train_iters"]
    return target


def span(run: RunDir, attempt: int) -> tuple[str, str]:
    """When an attempt that nobody watched began and ended, by its first and last event; now, while it has none."""
    events = events_of_attempt(read_events(run.events), attempt)
    if not events:
        now = moment(time.time())
        return now, now
    return moment(events[0]["time"]), moment(events[-1]["time"])


def exit_code_left(attempt_dir: AttemptDir, node: int) -> int | None:
    """What torchrun on a node of a scheduler's job ended with; None: it did not, or was killed with all around it."""
    try:
        return int(attempt_dir.node(node).exit_code.read_text())
    except (OSError, ValueError):
        return None


def _first(events: Events, kind: str) -> Event | None:
    return next((event for event in events if event["type"] == kind), None)


def _signal(signals: Sequence[int], events: Events) -> int | None:
    """The signal that stopped an attempt: the supervisor's, or one that the ranks were sent."""
    if signals:
        return signals[0]
    stopped = _first(events, "stopped")
    if stopped is None:
        return None
    number: int | None = stopped.get("signal")
    return number


def _start_seconds(started: Event, iterations: Events) -> dict[str, float] | None:
    """Seconds of each stage of the start, and of the first iteration, with what it compiles."""
    if not isinstance(started.get("seconds"), dict):
        return None
    stages: dict[str, float] = dict(started["seconds"])
    if iterations:
        stages["first iteration"] = round(iterations[0]["seconds"], 2)
    return stages


def _why(attempt: Attempt, attempt_dir: AttemptDir, fault: str | None, ended: Ended) -> str:
    """Why an attempt failed, the surest account first."""
    failure = attempt.failure
    if failure and failure.error_type == CONFIGURATION:
        return f"node {failure.node}: {failure.message}"
    if ended.remark:
        return ended.remark
    if failure:
        return f"rank {failure.rank}: {failure.error_type}: {failure.message}"
    if ended.signals:
        return f"ended by signal {ended.signals[0]} before it could save"
    if fault:
        return fault
    codes = ", ".join(str(node.exit_code) for node in attempt.nodes)
    why = f"torchrun ended with {codes} before the last iteration"
    said = "; ".join(words for words in (ended.word, _last_line(attempt_dir)) if words)
    return f"{why}: {said}" if said else why


def _records(run: RunDir, folder: Path, judge: Checkpoints) -> list[CheckpointRecord]:
    """The committed checkpoints of a folder, in order; each with the digest that it had when it was committed."""
    known = Progress.of(run, folder).digests
    found = []
    for path in reversed(judge.committed(folder)):
        iteration = checkpoints.iteration_of(path)
        digest = known.get(iteration)
        if digest is None:
            try:
                digest = judge.manifest_digest(path)
            except OSError:  # nobody can go on from it either
                continue
        found.append(CheckpointRecord(iteration=iteration, path=str(path), manifest_digest=digest))
    return found


def _fault_of(folder: Path, iteration: int | None, judge: Checkpoints) -> str | None:
    """Why the checkpoint of an attempt's last iteration is not whole.

    Later ones are damaged, and were passed over when the attempt began.
    """
    path = folder / folder_of(iteration or 0)
    fault = judge.problem(path) if path.exists() else "there is none"
    return f"the last checkpoint cannot be used: {fault}" if fault else None


def _misbegun(of_the_run: Events, attempt: Attempt, events: Events, saved: Saved) -> str | None:
    """Why what an attempt reached is not the run's: it did not go on from what was committed before it."""
    if not events:
        return None
    start = Start(
        committed=committed_before(of_the_run, attempt.number),
        named=saved.named,
        is_exact=not saved.own,
    )
    first = _first(events, "iteration")
    trained = None if first is None else first["iteration"]
    return fault_of_start(start, started=events[0]["iteration"], first=trained)


def _worthless(of_the_run: Events, attempt: Attempt, events: Events) -> str | None:
    """Why an attempt that ran to its end is no success."""
    target = _target(events)
    if attempt.to_iteration != target:
        return f"it ended after iteration {attempt.to_iteration}, and train.train_iters is {target}"
    is_trained = any(event["type"] == "started" and event["iteration"] < target for event in of_the_run)
    if _first(of_the_run, "iteration") is None and not is_trained:  # short of a line, in a script's log
        return f"nothing was trained: it set out from iteration {attempt.from_iteration}; raise train.train_iters"
    evaluations = evaluation_losses(events)
    if evaluations and (evaluations[-1] is None or not math.isfinite(evaluations[-1])):
        return (
            "the loss of its last evaluation is not finite: look at the evaluation split with "
            "dfmspec validate --check data, or leave it out with train.eval_iters=0"
        )
    return None


def _first_failure(attempt_dir: AttemptDir) -> Failure | None:
    """The error of the rank that failed first; one that a signal ended left none, and torchrun knows of it."""
    cause = _root_cause(attempt_dir)
    ended = _ended_by_signal(cause)
    if ended and ended.error_type == "SIGKILL":  # what others then say is that they lost it
        return ended

    # (time, what happened) of every rank that left an error.
    failures: list[tuple[float, Failure]] = []
    for node, path in attempt_dir.errors():
        try:
            record = read_json(path)
            failure = Failure(
                node=node,
                rank=record["rank"],
                error_type=record["error_type"],
                message=record["message"],
                traceback=record["traceback"],
            )
            failures.append((float(record["time"]), failure))
        except (OSError, ValueError, KeyError, TypeError):  # cut short
            continue
    if not failures:
        return ended
    _, first = min(failures, key=lambda pair: pair[0])
    return first


_ROOT_CAUSE = re.compile(
    r"Root Cause.*?^ *time *: (\S+).*?^ *rank *: (\d+).*?^ *exitcode *: (-?\d+)", re.DOTALL | re.MULTILINE
)


class _Cause(NamedTuple):
    """The rank that torchrun saw end first."""

    time: str
    node: int
    rank: int
    exit_code: int


def _root_cause(attempt_dir: AttemptDir) -> _Cause | None:
    """The rank that ended first of all nodes', by the last lines of torchrun's logs."""
    causes = []
    for node, log in attempt_dir.torchrun_logs():
        found = _ROOT_CAUSE.search(_end_of(log))
        if found is not None:
            causes.append(_Cause(found[1], node, int(found[2]), int(found[3])))
    return min(causes, default=None)


def _ended_by_signal(cause: _Cause | None) -> Failure | None:
    """The rank that a signal ended before any other failed."""
    if cause is None or cause.exit_code >= 0:
        return None
    name = _signal_name(-cause.exit_code)
    message = "the process was ended by a signal"
    if name == "SIGKILL":
        message = "killed from outside; when nobody did that, the machine's memory ran out (see dmesg)"
    return Failure(node=cause.node, rank=cause.rank, error_type=name, message=message, traceback="")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end_of(path: Path, size: int = 1 << 16) -> str:
    """The last bytes of a file, at most `size`, as text."""
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - size))
        return handle.read().decode(errors="replace")


def _last_line(attempt_dir: AttemptDir) -> str:
    """The last thing that rank 0 or torchrun said on the error stream."""
    node = attempt_dir.node(0)
    rank = node.rank(0)
    for path in (rank.stderr, rank.stdout, node.torchrun_log):
        if not path.exists():
            continue
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1][:300]
    return ""


def _fill_metrics(manifest: Manifest, events: Events, iterations: Events) -> None:
    """The metrics of an attempt; a run keeps the first loss of its first one."""
    if not iterations:
        return
    metrics = manifest.metrics

    # Losses.
    losses = [event["loss"] for event in iterations]
    if metrics.first_loss is None:
        metrics.first_loss = losses[0]
    last = max(1, min(_LOSSES, len(losses) // 10))
    metrics.final_loss = None if None in losses[-last:] else statistics.fmean(losses[-last:])
    evaluations = evaluation_losses(events)
    if evaluations:
        metrics.eval_loss = finite(evaluations[-1])

    # Speed; earlier versions did not tell the padding.
    metrics.tokens_per_second = statistics.median(event["tokens_per_second"] for event in iterations)
    shares = [event["padding"] for event in iterations if "padding" in event]
    metrics.padding = statistics.fmean(shares) if shares else None
    metrics.seconds_per_iteration = statistics.median(event["seconds"] for event in iterations)
