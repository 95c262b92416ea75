"""What the kernels of other libraries need: their very version, and a GPU that this process uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dfmspec.trainer import libraries
from tests.conftest import environment

KEPT = ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "QUACK_CACHE_DIR"]


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
from dfmspec.trainer import cpu, libraries
cpu.install("meta")
libraries.installed = lambda library: True
print(libraries.usable(libraries.QUACK))
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=False)

    assert result.stdout == "False\n", result.stderr


def test_what_they_compile_is_kept_where_only_the_user_writes() -> None:
    """Both libraries load machine code from there."""
    code = f"import os; from dfmspec.trainer import libraries; print(*(os.environ[name] for name in {KEPT}))"
    chosen = {name: value for name, value in environment().items() if name not in KEPT} | {"HOME": "/home/someone", "XDG_CACHE_HOME": "", KEPT[2]: "/elsewhere"}
    result = subprocess.run([sys.executable, "-c", code], env=chosen, capture_output=True, text=True, timeout=120, check=False)

    assert result.stdout == "1 /home/someone/.cache/dfmspec/flash-attn-4 /elsewhere\n", result.stderr
