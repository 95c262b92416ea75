"""What the kernels of other libraries need: their very version, and a GPU that this process uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dfmspec.trainer.ops import libraries
from tests.conftest import environment


def test_another_version_or_a_broken_one_counts_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = libraries.Library("flash-attn-4", "1.2", "json")
    assert not libraries.installed(tried)
    monkeypatch.setattr(libraries, "version", lambda name: "1.2")
    assert libraries.installed(tried)
    assert not libraries.installed(tried._replace(version="1.3"))
    assert not libraries.installed(tried._replace(module="no_such_module"))


def test_a_process_without_cuda_asks_no_gpu() -> None:
    """`validate --check deep`, and a run on CPUs, on a machine that has one."""
    code = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = lambda: 1 / 0
from dfmspec.trainer import cpu
from dfmspec.trainer.ops import libraries
cpu.install("meta")
libraries.installed = lambda library: True
print(libraries.usable(libraries.QUACK))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )

    assert result.stdout == "False\n", result.stderr


def test_what_they_compile_is_kept_where_only_the_user_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code is loaded from there; where that cannot be, nothing is kept."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = libraries.kept_in(libraries.FLASH_ATTENTION)

    assert folder == tmp_path / ".cache/dfmspec/flash-attn-4"
    assert folder.stat().st_mode & 0o77 == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert libraries.kept_in(libraries.FLASH_ATTENTION) is None
