"""Processes that do not outlive their parent, and find room for their sockets."""

from __future__ import annotations

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
