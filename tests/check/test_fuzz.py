"""Whatever is in a file or on the command line, the answer is findings or a usage error, never an exception."""

from __future__ import annotations

import os
import random
import time
from itertools import count

import pytest

from tests.check.fuzzing import run

SECONDS = float(os.environ.get("DFMSPEC_FUZZ_SECONDS", "90"))
"""For each box of inputs."""
FIRST = int(os.environ.get("DFMSPEC_FUZZ_SEED", random.SystemRandom().randrange(10**6)))
"""From which seeds are counted, in thousands: new ones each time, unless they are named."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths that inputs name are not there


@pytest.mark.parametrize("seed", range(4))
def test_some_inputs(seed: int) -> None:
    assert len(run(500, seed)) > 25


@pytest.mark.long
@pytest.mark.parametrize("box", range(2))
def test_many_inputs(box: int) -> None:
    """For as long as the box has seconds; the seeds are printed, for `python -m tests.check.fuzzing 500 SEED`."""
    seeds = count(1000 * (box + FIRST))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        seed = next(seeds)
        print(f"box {box}: seed {seed}")
        run(500, seed)
