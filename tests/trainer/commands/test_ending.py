"""A command of the trainer that fails leaves one line, and nothing half made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.formats.test_formats import WRITTEN

RUN = next(WRITTEN.glob("runs/tiny/2*"))


@pytest.mark.parametrize(
    "words",
    [
        ["export", str(RUN), "--out", "out/w.safetensors"],
        ["sample", str(RUN), "--num-samples", "1", "--num-steps", "2", "--out", "out/pictures"],
    ],
    ids=["export", "sample"],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    command = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-m", "dfmspec", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode == 4
    assert "error: out/" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
