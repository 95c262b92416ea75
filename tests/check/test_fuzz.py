"""Whatever is in a file or on the command line, the answer is findings or a usage error, never an exception."""

from __future__ import annotations

import os

import pytest

from tests.check.fuzzing import run


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths that inputs name are not there


@pytest.mark.parametrize("seed", range(4))
def test_some_inputs(seed: int) -> None:
    assert len(run(500, seed)) > 25


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 100 + max(1, (os.cpu_count() or 1))))
def test_many_inputs(seed: int) -> None:
    run(20_000, seed)
