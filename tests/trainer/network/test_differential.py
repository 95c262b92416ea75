"""The trainer's network is NVIDIA DFM's: what DFM's own modules gave on the same weights and packs, in fp64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment
from tests.trainer.network.differential import SIGMAS, digest_of_inputs

RECORDED = json.loads((Path(__file__).parent / "dfm.json").read_text())
LIMIT = 1e-10


@pytest.fixture(scope="module")
def ours() -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.network.differential"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_inputs_are_those_of_then() -> None:
    assert digest_of_inputs() == RECORDED["inputs"]


@pytest.mark.parametrize("number", range(len(SIGMAS)), ids=map(str, SIGMAS))
def test_outputs_loss_and_every_gradient_are_dfms(ours: Any, number: int) -> None:
    mine, theirs = ours[number], RECORDED["packs"][number]

    assert mine.keys() == theirs.keys()
    assert len(theirs) == 36  # 34 parameters, the denoised samples and the loss
    for name, figures in theirs.items():
        apart = max(abs(one - other) for one, other in zip(mine[name], figures, strict=True))
        assert apart < LIMIT * figures[0], name
