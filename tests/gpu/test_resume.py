"""A stopped run on GPUs goes on as if it had not stopped: to the bit in its own layout, to rounding in another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.conftest import once
from tests.trainer.checkpoint.test_resume import assert_continues, cut
from tests.trainer.training import SHORT, awake, kill_tree, losses, pair, start, train, wait_for

pytestmark = pytest.mark.gpu

GPUS = torch.cuda.device_count()
WORDS = [
    "cluster.device=cuda",
    "model.hidden_size=256",
    "train.train_iters=8",
    "data.num_streams=8",
    "train.global_batch_size=8",
    "checkpoint.most_recent_k=-1",
]
FP32 = "mixed_precision.bf16=false"
TP2 = "model.tensor_model_parallel_size=2"
LAYOUTS = {
    "dp2": (2, []),
    "tp2_sp": (2, [TP2, "model.sequence_parallel=true"]),
    "cp2": (2, ["model.context_parallel_size=2"]),
    "pp2": (2, ["model.pipeline_model_parallel_size=2"]),
    "tp2_dp2": (4, [TP2]),
}


@pytest.mark.parametrize("beside", ["true", "false"])
@pytest.mark.parametrize("graphs", ["local", "none"])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(
    graphs: str, beside: str, shared: Path, dataset: Path, tmp_path: Path
) -> None:
    """In bf16, wherever it stopped, with checkpoints written beside the training or not."""
    words = [*WORDS, f"dataset.path={dataset}", "model.deterministic_mode=true"]
    words += [
        awake(shared / "awake_bf16", *words),
        f"model.cuda_graph_impl={graphs}",
        f"checkpoint.async_save={beside}",
    ]
    train(tmp_path / "whole", *words, "checkpoint.save_interval=1")
    for last in (1, 4, 7):
        resumed = cut(tmp_path / "whole", tmp_path / f"from{last}", last)
        train(resumed, *words)

        assert sorted(losses(resumed)) == list(range(last + 1, 9))
        assert_continues(resumed, tmp_path / "whole")


@pytest.fixture
def setting(shared: Path, dataset: Path) -> list[str]:
    """What the runs in fp32 have in common."""
    words = [*WORDS, FP32, f"dataset.path={dataset}"]
    return [*words, awake(shared / "awake_fp32", *words)]


@pytest.mark.parametrize("layout", [name for name, (gpus, _) in LAYOUTS.items() if gpus <= GPUS])
def test_a_run_continues_in_another_layout_and_back(
    layout: str, setting: list[str], shared: Path, tmp_path: Path
) -> None:
    gpus, cuts = LAYOUTS[layout]
    one = once(shared / "one_gpu", lambda folder: train(folder, *setting))
    train(tmp_path / layout, *setting, *cuts, processes=gpus)
    for before, other, processes in ((one, cuts, gpus), (tmp_path / layout, [], 1)):
        resumed = cut(before, tmp_path / f"from_{before.name}", 4)
        train(resumed, *setting, *other, processes=processes)

        assert sorted(losses(resumed)) == [5, 6, 7, 8]
        assert_continues(resumed, one, exact=False)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_killed_run_goes_on_in_another_layout(setting: list[str], tmp_path: Path) -> None:
    """SIGKILL to every process of TP2 x DP; then all GPUs as replicas."""
    words = [*setting, "train.train_iters=24"]
    train(tmp_path / "whole", *words, processes=GPUS)
    run_dir = tmp_path / "killed"
    run_dir.mkdir()
    doomed = start(run_dir, *SHORT, *words, TP2, processes=GPUS, DFMSPEC_RUN_DIR=str(run_dir))
    wait_for(run_dir / "checkpoints/iter_0000004/manifest.json", 120)
    kill_tree(doomed)
    reached = max(losses(run_dir))
    said = train(run_dir, *words, processes=GPUS)

    assert reached < 24
    assert "Resumed from iteration" in said
    assert sorted(losses(run_dir)) == list(range(1, 25))
    for iteration, values in losses(run_dir).items():
        ((expected, _),) = losses(tmp_path / "whole")[iteration]
        assert all(loss == pytest.approx(expected, rel=1e-6) for loss, _ in values)


@pytest.mark.skipif(GPUS < 4, reason="needs four GPUs")
def test_two_nodes_give_the_losses_of_one(setting: list[str], tmp_path: Path) -> None:
    """The how-to's pair of torchruns, two GPUs a node."""
    words = [*SHORT, *setting, TP2, "train.train_iters=4"]
    visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    halves = tuple(
        {"CUDA_VISIBLE_DEVICES": ",".join(half), "DFMSPEC_RUN_DIR": str(tmp_path / "pair")}
        for half in (visible[:2], visible[2:4])
    )
    first, second = pair(tmp_path / "pair", *words, processes=2, environments=halves)
    train(tmp_path / "one", *words, processes=4)

    assert "Iteration 4/4" in first
    assert "Iteration" not in second
    assert losses(tmp_path / "pair") == losses(tmp_path / "one")
