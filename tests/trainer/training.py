"""Small trainings as a user starts them, and what they leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dfmspec.record.events import read_events
from dfmspec.run.launch.local import free_port
from tests.conftest import ROOT, TINY, dfmspec, environment, once
from tests.trainer.parity_worker import asleep
from tests.trainer.warm import WARM, Forked, may_be_forked

TORCHRUN = shutil.which("torchrun", path=str(Path(sys.executable).parent)) or "torchrun"
ENTRY = "examples/megatron/recipes/dit/pretrain_dit_model.py"
SHORT = [
    *TINY,
    "model.num_attention_heads=4",
    "dataset.task_encoder_seq_length=64",
    "checkpoint.save_interval=2",
    "logger.log_interval=1",
]


def place(folder: Path) -> Path:
    """A working directory in which the how-to's relative script path is right."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    return folder


Process = subprocess.Popen[str] | Forked


def _on_gpu(words: Sequence[str]) -> bool:
    """Whether a training needs CUDA, which no fork can have once it was looked at."""
    return "cluster.device=cuda" in words


def start(cwd: Path, *words: str, processes: int = 1, script: str = ENTRY, **env: str) -> Process:
    """torchrun with the how-to's words, on a port of its own.

    0 processes: the script alone, forked from what is imported already.
    """
    if processes == 0 and may_be_forked(env) and not _on_gpu(words):
        return WARM.start(ROOT / script, words, cwd=place(cwd), env=env)
    launch = [TORCHRUN, "--nproc-per-node", str(processes)] if processes else [sys.executable]
    env = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())} | env
    return subprocess.Popen(
        [*launch, script, *words],
        cwd=place(cwd),
        env=environment(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def pair(
    cwd: Path, *words: str, processes: int, environments: tuple[dict[str, str], dict[str, str]] = ({}, {})
) -> list[str]:
    """What each of two nodes printed: the how-to's two torchruns, on loopback."""
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [
                TORCHRUN,
                "--nproc-per-node",
                str(processes),
                "--nnodes",
                "2",
                "--node-rank",
                str(rank),
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                port,
                ENTRY,
                *words,
            ],
            cwd=place(cwd),
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **own),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for rank, own in enumerate(environments)
    ]
    results = [finish(node) for node in nodes]
    assert [code for code, _, _ in results] == [0, 0], results
    return [out for _, out, _ in results]


def finish(process: Process, seconds: float = 240) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        err += f"\nnot finished after {seconds:.0f} s"
    return process.returncode, out, err


def train(run_dir: Path, *words: str, processes: int = 0, expect: int = 0) -> str:
    """A short training in `run_dir`, as a plan starts it; returns what rank 0 printed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    env = {"DFMSPEC_RUN_DIR": str(run_dir)}
    if processes > 1 and not _on_gpu(words):
        forked = WARM.start_ranks(ROOT / ENTRY, [*SHORT, *words], processes, cwd=place(run_dir), env=env)
        code, out, err = forked.finish(240)
    else:
        code, out, err = finish(start(run_dir, *SHORT, *words, processes=processes, **env))
    assert code == expect, (code, out[-2000:], err[-3000:])
    return out + err


def awake(folder: Path, *words: str) -> str:
    """A word that lets a training of `words` set out with all weights awake.

    A network as it is initialised hardly shows what its blocks compute.
    """
    return f"checkpoint.pretrained_checkpoint={once(folder, lambda made: _wake(made, *words))}/awake.safetensors"


def _wake(folder: Path, *words: str) -> None:
    train(folder, *words, "train.train_iters=1")
    exported = dfmspec("export", folder, "--out", folder / "asleep.safetensors", "--raw")
    assert exported.returncode == 0, exported.stderr
    weights, generator = load_file(folder / "asleep.safetensors"), torch.Generator().manual_seed(0)
    for name in filter(asleep, weights):
        weights[name].copy_(torch.randn(weights[name].shape, generator=generator) * 0.05)
    save_file(weights, folder / "awake.safetensors")


def kill_tree(process: Process) -> None:
    """SIGKILL to the process and everything that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def losses(run_dir: Path) -> dict[int, set[tuple[float, float]]]:
    """Every (loss, gradient norm) that was ever measured for an iteration: one, if a run is exact."""
    found: dict[int, set[tuple[float, float]]] = {}
    for event in read_events(run_dir / "events.jsonl"):
        if event["type"] == "iteration":
            found.setdefault(event["iteration"], set()).add((event["loss"], event["grad_norm"]))
    return found


def wait_for(path: Path, seconds: float = 60) -> None:
    """Until a file is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
