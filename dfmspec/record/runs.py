"""Run directories: where a run lives, which there are, and who owns one."""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dfmspec.errors import LockedError, PreflightError, UsageError
from dfmspec.files import write_aside
from dfmspec.plan.plan import Plan
from dfmspec.record.events import read_events
from dfmspec.record.files import read_json
from dfmspec.record.manifest import Manifest, now, read_manifest
from dfmspec.record.progress import plan_id_of
from dfmspec.record.run_dir import LATEST, LOCK, OWNER, RunDir

_RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}-[0-9a-f]{4}.*")
"""What `new_run_id` gives, and what a copy of it may be called."""


def new_run_id(plan: Plan) -> str:
    """An id that sorts by time and tells which plan the run is of."""
    started = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    digits = plan.plan_id[:8]
    random = secrets.token_hex(2)
    return f"{started}-{digits}-{random}"


def runs_of(folder: Path) -> Iterator[tuple[RunDir, Manifest]]:
    """The runs of `<output_dir>/<name>`, newest first; directories without a readable manifest are passed over."""
    for path in sorted(folder.glob("*"), reverse=True):
        if not path.is_dir() or path.is_symlink():  # a link is `latest`
            continue
        try:
            yield RunDir(path), read_manifest(RunDir(path))
        except (OSError, ValueError):
            continue


def broken_runs(folder: Path) -> Iterator[tuple[RunDir, str]]:
    """The run directories of `<output_dir>/<name>` that hold progress and no readable record, each with what is wrong.

    One in which nothing was begun is passed over: whoever made it did not live to start. So is that of a script, which
    has no record, and one that may not be looked into.
    """
    for path in sorted(folder.glob("*")):
        run = RunDir(path)
        if _RUN_ID.fullmatch(path.name) is None or not _has_begun(run):
            continue
        try:
            manifest = read_manifest(run)
        except FileNotFoundError:
            yield run, "is gone"
        except (OSError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            yield run, f"is damaged ({first_line})"
        else:
            if plan_id_of(run) not in (None, manifest.plan_id):
                yield run, "is damaged (its plan_id is not that of plan.json)"


def _has_begun(run: RunDir) -> bool:
    """Whether a run directory holds anything that could be lost; False where that cannot be seen."""
    try:
        return any(place.exists() for place in (run.events, run.attempts, run.checkpoints))
    except OSError:
        return False


def latest_of(folder: Path) -> RunDir | None:
    """The run that was opened last, as the link beside the runs has it."""
    link = folder / LATEST
    return RunDir(link.resolve()) if link.is_symlink() and link.is_dir() else None


def find_run(reference: str, output_dir: Path) -> RunDir:
    """A run by directory, by id, or by name (its latest).

    Raises:
        UsageError: there is no such run.
    """
    direct = RunDir(Path(reference))
    if direct.manifest.exists():
        return direct

    # A name stands for its latest run; of an id, the beginning is enough.
    by_name = output_dir / reference / LATEST
    beginning = glob.escape(reference)
    by_id = output_dir.glob(f"*/{beginning}*")
    for candidate in (by_name, *by_id):
        if RunDir(candidate).manifest.exists():
            return RunDir(candidate.resolve())
    raise UsageError(f"no run {reference!r} in {output_dir}; dfmspec runs lists them")


def link_latest(run: RunDir) -> None:
    """`<output_dir>/<name>/latest`, replaced atomically."""
    folder = run.path.parent
    unique = secrets.token_hex(8)
    aside = folder / f".{LATEST}.{unique}"
    aside.symlink_to(run.path.name)
    os.replace(aside, folder / LATEST)


def is_owned(run: RunDir) -> bool:
    """Whether a process watches over a run now."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(run.path / LOCK, timeout=0):
            return False
    except (OSError, Timeout):
        return True


def reached(run: RunDir, manifest: Manifest) -> int | None:
    """The last iteration of a run's last attempt; of one that goes on, by its events."""
    if manifest.verdict == "running":
        iterations = read_events(run.events, kinds=["iteration"])
        if not iterations:
            return None
        last: int = iterations[-1]["iteration"]
        return last
    if not manifest.attempts:
        return None
    return manifest.attempts[-1].to_iteration


def state(run: RunDir, manifest: Manifest) -> str:
    """The verdict; `unwatched`: it was running when its supervisor was lost, or was left to its scheduler."""
    if manifest.verdict == "running" and not is_owned(run):
        return "unwatched"
    return manifest.verdict


@contextmanager
def owned(folder: Path, what: str, seconds: float = 0.5) -> Iterator[None]:
    """Own a folder for as long as the block lasts; the kernel frees it when the process dies.

    Args:
        folder: what is owned.
        what: it is, for the message of an error, such as "run".
        seconds: how long another owner is waited for; at least as long as `is_owned` takes to look.

    Raises:
        LockedError: another process owns it.
        PreflightError: its file system has no locks, or refuses one.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=seconds, mode=0o666)
    owner = folder / OWNER
    try:
        lock.acquire()
    except Timeout:
        by = _told_owner(owner)
        raise LockedError(f"{what} {folder} is locked by {by}; wait for it, or stop that process") from None
    except OSError as error:
        key = what if what == "checkpoint.save" else "run.output_dir"
        reason = error.strerror or error
        raise PreflightError(
            f"{what} {folder} cannot be locked against a second process: {reason}; "
            f"set {key} to a folder of a file system with locks, or have this one mounted with them"
        ) from error
    try:
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        write_aside(owner, json.dumps(who) + "\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _told_owner(file: Path) -> str:
    """Who owns a folder, by the file that it keeps there."""
    try:
        who = read_json(file)
        pid = who["pid"]
        host = who["host"]
        since = who["since"]
    except (OSError, ValueError, KeyError):
        return "another process"
    return f"process {pid} on {host} since {since}"
