"""What many tests share: the command line as a function, a small prepared dataset, torchrun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "corpus"
HOWTO = CORPUS / "howto" / "dit_butterfly_config.yaml"

# What a parent ignores (nohup, a job in the background) is no test's affair.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

MOST_SKIPPED = 0
"""A skipped test proves nothing: whoever adds one raises this number, and says why."""

TINY = [
    "cluster.device=cpu",
    "recipe=dit_tiny",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.adaln_lora_rank=16",
    "train.eval_iters=0",
    "dataset.packing_buffer_size=8",
]
"""The smallest model, laid over whatever a test runs."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: this checkout, one thread a rank."""
    return (
        os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        | extra
    )


def dfmspec(*args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "dfmspec", *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One folder for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made by the first test process that asks for it; where it could not be, by the next one."""
    done = Path(f"{folder}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def dataset(shared: Path) -> Path:
    """A prepared dataset of 128 embedded pictures at 64 px."""

    def prepare(folder: Path) -> None:
        made = dfmspec("data", "prepare", folder, "--num-samples", 128)
        assert made.returncode == 0, made.stderr

    return once(shared / "butterfly_webdataset", prepare)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session in which more tests were skipped than are known to be."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    skipped = len(reporter.stats.get("skipped", []))
    if skipped > MOST_SKIPPED:
        reporter.write_line(
            f"{skipped} tests were skipped, and {MOST_SKIPPED} may be (MOST_SKIPPED in tests/conftest.py)", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
