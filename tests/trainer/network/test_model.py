"""The network is the one of the papers: it agrees with a page of plain PyTorch, sample by sample."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT, environment


def test_the_dit_agrees_with_plain_pytorch_in_output_and_every_gradient() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.network.reference"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert len(found) > 40
    assert found.pop("output") < 1e-5
    assert max(found.values()) < 1e-4, max(found, key=found.__getitem__)
