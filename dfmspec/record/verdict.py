"""What an attempt came to, from what it left behind: events, checkpoints, errors of ranks, the word of a scheduler."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfmspec.record import checkpoints
from dfmspec.record.events import read_events
from dfmspec.record.manifest import Attempt, CheckpointRecord, Failure, Manifest, moment


def conclude(manifest: Manifest, attempt: Attempt, run_dir: Path, folder: Path, codes: Sequence[int | None], *, signals: Sequence[int], word: str) -> None:
    """Fill in an attempt that is over, and the run's verdict.

    folder: of the checkpoints. codes: of torchrun on each node; None: the one it left, and killed where it left none. word: the scheduler's last.
    """
    attempt_dir = run_dir / "attempts" / str(attempt.number)
    for node, code in zip(attempt.nodes, codes, strict=True):
        left = exit_code_left(attempt_dir, node.node) if code is None else code
        node.exit_code = -signal.SIGKILL if left is None else left
        host = attempt_dir / f"node{node.node}" / "host"  # left by a job whose hosts a scheduler chose
        node.host = host.read_text().strip() if host.exists() else node.host
    events = _events(run_dir, attempt.number)
    iterations = [event for event in events if event["type"] == "iteration"]
    started = next((event for event in events if event["type"] == "started"), None)
    attempt.from_iteration = started["iteration"] if started else None
    attempt.to_iteration = iterations[-1]["iteration"] if iterations else attempt.from_iteration
    attempt.start_seconds = _start_seconds(started, iterations)
    attempt.signal = signals[0] if signals else next((event["signal"] for event in events if event["type"] == "stopped"), None)
    attempt.failure = _first_failure(attempt_dir)
    kinds = {event["type"] for event in events}
    manifest.checkpoints = _records(folder)
    _fill_metrics(manifest, events, iterations)
    fault = _fault_of(folder, attempt.to_iteration)
    target = started["train_iters"] if started else None
    if "finished" in kinds and attempt.to_iteration == target and fault is None:
        attempt.outcome, manifest.verdict = "finished", "succeeded"
        manifest.reason = f"iteration {target} was reached and its checkpoint is whole"
    elif "stopped" in kinds and fault is None:
        attempt.outcome, manifest.verdict = "stopped", "stopped"
        manifest.reason = f"stopped by a signal after iteration {attempt.to_iteration}; the same command continues it"
    else:
        attempt.outcome, manifest.verdict = "failed", "failed"
        manifest.reason = _why(attempt, attempt_dir, fault if "finished" in kinds else None, signals, word)


def span(run_dir: Path, attempt: int) -> tuple[str, str]:
    """When an attempt that nobody watched began and ended, by its first and last event; now, while it has none."""
    times = [event["time"] for event in _events(run_dir, attempt)] or [time.time()]
    return moment(times[0]), moment(times[-1])


def exit_code_left(attempt_dir: Path, node: int) -> int | None:
    """What torchrun on a node of a scheduler's job ended with; None: it did not, or was killed with all around it."""
    try:
        return int((attempt_dir / f"node{node}" / "exit_code").read_text())
    except (OSError, ValueError):
        return None


def _start_seconds(started: dict[str, Any] | None, iterations: list[dict[str, Any]]) -> dict[str, float] | None:
    if started is None or "seconds" not in started:
        return None
    stages: dict[str, float] = started["seconds"]
    return stages | ({"first iteration": round(iterations[0]["seconds"], 2)} if iterations else {})


def _events(run_dir: Path, attempt: int) -> list[dict[str, Any]]:
    """The events of one attempt: from its `started` to the next one's."""
    found: list[dict[str, Any]] = []
    ours = False
    for event in read_events(run_dir / "events.jsonl"):
        if event["type"] == "started":
            ours = event.get("attempt") == attempt
        if ours:
            found.append(event)
    return found


def _why(attempt: Attempt, attempt_dir: Path, fault: str | None, signals: Sequence[int], word: str) -> str:
    if attempt.failure:
        return f"rank {attempt.failure.rank}: {attempt.failure.error_type}: {attempt.failure.message}"
    if signals:
        return f"ended by signal {signals[0]} before it could save"
    if fault:
        return f"the last checkpoint cannot be used: {fault}"
    codes = ", ".join(str(node.exit_code) for node in attempt.nodes)
    said = "; ".join(filter(None, (word, _last_line(attempt_dir))))
    return f"torchrun ended with {codes} before the last iteration" + (f": {said}" if said else "")


def _records(folder: Path) -> list[CheckpointRecord]:
    return [
        CheckpointRecord(
            iteration=checkpoints.iteration_of(path), path=str(path),
            manifest_digest="sha256:" + hashlib.sha256((path / checkpoints.MANIFEST).read_bytes()).hexdigest(),
        )
        for path in reversed(checkpoints.committed(folder))
    ]  # fmt: skip


def _fault_of(folder: Path, iteration: int | None) -> str | None:
    """Why the checkpoint of an attempt's last iteration is not whole; later ones are damaged, and were passed over when it began."""
    path = folder / f"iter_{iteration or 0:07d}"
    return checkpoints.problem(path) if path.exists() else "there is none"


def _first_failure(attempt_dir: Path) -> Failure | None:
    """The error of the rank that failed first; one that a signal ended left none, and torchrun knows of it."""
    records, ended = [], _ended_by_signal(attempt_dir)
    if ended and ended.error_type == "SIGKILL":  # what others then say is that they lost it
        return ended
    for path in attempt_dir.glob("node*/rank*/error.json"):
        try:
            records.append((json.loads(path.read_text()), int(path.parent.parent.name[4:])))
        except (OSError, ValueError):
            continue
    if not records:
        return ended
    record, node = min(records, key=lambda pair: pair[0]["time"])
    return Failure(
        node=node, rank=record["rank"], error_type=record["error_type"], message=record["message"], traceback=record["traceback"]
    )


_ROOT_CAUSE = re.compile(r"Root Cause.*?^ *rank *: (\d+).*?^ *exitcode *: -(\d+)", re.DOTALL | re.MULTILINE)


def _ended_by_signal(attempt_dir: Path) -> Failure | None:
    """The rank that a signal ended before any other failed, by the last lines of torchrun's log."""
    for log in sorted(attempt_dir.glob("node*/torchrun.log")):
        if found := _ROOT_CAUSE.search(_end_of(log)):
            rank, number = int(found[1]), int(found[2])
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            killed = "killed from outside; when nobody did that, the machine's memory ran out (see dmesg)"
            message = killed if name == "SIGKILL" else "the process was ended by a signal"
            return Failure(node=int(log.parent.name[4:]), rank=rank, error_type=name, message=message, traceback="")
    return None


def _end_of(path: Path, size: int = 1 << 16) -> str:
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - size))
        return handle.read().decode(errors="replace")


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
    shares = [event["padding"] for event in iterations if "padding" in event]  # runs of earlier versions did not tell it
    metrics.padding = statistics.fmean(shares) if shares else None
    metrics.seconds_per_iteration = statistics.median(event["seconds"] for event in iterations)
