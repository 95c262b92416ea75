"""Faults injected into runs for some minutes: nothing is lost, mixed, silent or left behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment

SECONDS = 240


@pytest.mark.long
def test_no_fault_costs_what_was_committed() -> None:
    seed = os.environ.get("DFMSPEC_FUZZ_SEED", str(random.SystemRandom().randrange(10**6)))
    numbers = ["--kills", "1000", "--corruptions", "1000", "--seed", seed, "--seconds", str(SECONDS)]
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *numbers]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
