"""Processes that do not outlive their parent, and find room for their sockets."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dfmspec.errors import PreflightError
from dfmspec.processes import short_temporary_folder
from tests.conftest import environment

ORPHAN = """
import os, time
from dfmspec.processes import die_with_torchrun

if os.fork():
    time.sleep(0.3)
    os._exit(0)
parent = os.getppid()
while os.getppid() == parent:
    time.sleep(0.01)
die_with_torchrun()
print("lives", flush=True)
"""
"""Somebody else has adopted it by the time it looks."""


@pytest.mark.parametrize(("variables", "lives"), [({"TORCHELASTIC_RUN_ID": "1"}, False), ({}, True)])
def test_a_rank_whose_torchrun_is_gone_before_it_looks_ends_at_once(variables: dict[str, str], lives: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ("lives" in done.stdout) == lives


def test_a_temporary_folder_that_is_too_long_for_sockets_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    short_temporary_folder()

    assert tempfile.gettempdir() == "/tmp"


def test_a_short_temporary_folder_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    short_temporary_folder()

    assert tempfile.gettempdir() == "/var/tmp"


def test_where_no_folder_is_short_enough_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(PreflightError, match="set TMPDIR to a folder of at most 75 characters"):
        short_temporary_folder()


LATE = """
import atexit, os, signal, sys
from dfmspec.processes import unwinding

def terminate():
    os.kill(os.getpid(), signal.SIGTERM)

def unwound():
    try:
        terminate()
    finally:
        terminate()  # as when the parent goes while this process cleans up
        print("clean", flush=True)

if sys.argv[1] == "late":
    atexit.register(terminate)
sys.exit(unwinding(unwound if sys.argv[1] == "twice" else lambda: 0))
"""


@pytest.mark.parametrize(("when", "code", "said"), [("late", -signal.SIGTERM, ""), ("twice", 143, "clean\n")])
def test_a_sigterm_unwinds_once_and_shows_no_traceback(when: str, code: int, said: str) -> None:
    """Neither one that comes at the interpreter's own end nor a second one that meets the unwinding."""
    command = [sys.executable, "-c", LATE, when]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")
