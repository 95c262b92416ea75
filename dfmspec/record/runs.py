"""Run directories: where a run lives, which there are, and who owns one."""

from __future__ import annotations

import glob
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dfmspec.errors import LockedError, UsageError
from dfmspec.plan.plan import Plan
from dfmspec.record.events import read_events
from dfmspec.record.manifest import Manifest, now, read_manifest, write_aside


def new_run_id(plan: Plan) -> str:
    """Sortable by time, and telling which plan it runs."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{plan.plan_id[:8]}-{secrets.token_hex(2)}"


def runs_of(folder: Path) -> Iterator[tuple[Path, Manifest]]:
    """The runs of `<output_dir>/<name>`, newest first; directories without a readable manifest are passed over."""
    for run_dir in sorted((path for path in folder.glob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        try:
            yield run_dir, read_manifest(run_dir)
        except (OSError, ValueError):
            continue


def find_run(reference: str, output_dir: Path) -> Path:
    """A run by directory, by id, or by name (its latest).

    Raises:
        UsageError: there is no such run.
    """
    direct = Path(reference)
    if (direct / "manifest.json").exists():
        return direct
    for candidate in (output_dir / reference / "latest", *output_dir.glob(f"*/{glob.escape(reference)}*")):
        if (candidate / "manifest.json").exists():
            return candidate.resolve()
    raise UsageError(f"no run {reference!r} in {output_dir}; dfmspec runs lists them")


def link_latest(run_dir: Path) -> None:
    """`<output_dir>/<name>/latest`, replaced atomically."""
    link = run_dir.parent / "latest"
    aside = run_dir.parent / f".latest.{os.getpid()}"
    aside.symlink_to(run_dir.name)
    os.replace(aside, link)


def is_owned(run_dir: Path) -> bool:
    """Whether a process watches over a run now."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(run_dir / ".lock", timeout=0):
            return False
    except (OSError, Timeout):
        return True


def reached(run_dir: Path, manifest: Manifest) -> int | None:
    """The last iteration of a run's last attempt; of one that goes on, by its events."""
    if manifest.verdict == "running":
        return next((event["iteration"] for event in reversed(read_events(run_dir / "events.jsonl")) if event["type"] == "iteration"), None)
    return manifest.attempts[-1].to_iteration if manifest.attempts else None


def state(run_dir: Path, manifest: Manifest) -> str:
    """The verdict; `unwatched`: it was running when its supervisor was lost, or was left to its scheduler."""
    return "unwatched" if manifest.verdict == "running" and not is_owned(run_dir) else manifest.verdict


@contextmanager
def owned(folder: Path, what: str) -> Iterator[None]:
    """Own a folder (`what` it is: of a run, say) for as long as the block lasts; the kernel frees it when the process dies.

    Raises:
        LockedError: another process owns it.
    """
    from filelock import FileLock, Timeout

    lock, owner = FileLock(folder / ".lock", timeout=0.5), folder / ".owner.json"  # longer than `is_owned` takes to look
    try:
        lock.acquire()
    except Timeout:
        try:
            who = json.loads(owner.read_text())
            by = f"process {who['pid']} on {who['host']} since {who['since']}"
        except (OSError, ValueError, KeyError):
            by = "another process"
        raise LockedError(f"{what} {folder} is locked by {by}; wait for it, or stop that process") from None
    try:
        write_aside(owner, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now()}) + "\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
