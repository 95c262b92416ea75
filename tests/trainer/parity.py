"""Runs parity_worker.py in a layout and compares layouts: what must agree, and by how much."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT, environment
from tests.trainer.training import finish
from tests.trainer.warm import WARM

WORKER = Path(__file__).with_name("parity_worker.py")


@dataclass(frozen=True)
class Limits:
    """Relative tolerances: loss, gradient norm before clipping, relative L2 of each parameter's gradient."""

    loss: float
    grad_norm: float
    gradient: float


FP32, BF16 = Limits(1e-6, 1e-5, 1e-5), Limits(2e-3, 5e-3, 5e-2)

_TP2, _SP, _PP2, _CP2 = (
    {"tensor_model_parallel_size": 2},
    {"sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
    {"context_parallel_size": 2},
)
_VPP2, _TP4_SP = {"virtual_pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 4} | _SP
_PP4_VPP2 = {"pipeline_model_parallel_size": 4} | _VPP2
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": _TP2,
    "tp2_sp": _TP2 | _SP,
    "pp2": _PP2,
    "pp2_vpp2": _PP2 | _VPP2,
    "dp2": {},
    "cp2": _CP2,
    "pp2_dp2": _PP2,
    "tp2_sp_cp2": _TP2 | _SP | _CP2,
    "tp2_sp_pp2": _TP2 | _SP | _PP2,
}
LARGE = {
    "dp4": {},
    "tp2_sp_dp2": _TP2 | _SP,
    "tp4_sp": _TP4_SP,
    "pp2_vpp2_dp2": _PP2 | _VPP2,
    "pp4_vpp2": _PP4_VPP2,
    "dp8": {},
    "tp2_pp2_dp2": _TP2 | _PP2,
    "tp2_sp_cp2_dp2": _TP2 | _SP | _CP2,
    "tp4_sp_dp2": _TP4_SP,
    "pp4_vpp2_dp2": _PP4_VPP2,
}
"""Those of four and eight ranks, some of which need eight layers."""
CUTS = LAYOUTS | LARGE
FAULTS = [
    ("tp2_sp", "missing_sequence_parallel_flag"),
    ("tp2", "unreduced_qk_norm"),
    ("tp2_sp", "summing_final_gather"),
]
"""A layout, and a fault of the upstream's that shows in it."""


def ranks(layout: str) -> int:
    """The ranks of a layout, by its name: the product of its numbers, without the chunks of an interleaved pipeline."""
    return math.prod(int(part[2:]) for part in layout.split("_") if part[:2] in ("tp", "pp", "cp", "dp"))


def experiment(layout: dict[str, Any], **train: Any) -> dict[str, Any]:
    """A small experiment on mock data, complete; only the layout differs between two of them."""
    return {
        "cluster": {"device": "cpu"},
        "data": {"source": "mock", "num_streams": 2},
        "dataset": {"task_encoder_seq_length": 88},
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 256,
            "kv_channels": 16,
            "num_query_groups": 4,
            "adaln_lora_rank": 16,
            "seq_length": 88,
            "crossattn_emb_size": 32,
            "transformer_impl": "local",
            **layout,
        },
        "train": {"global_batch_size": 4, "train_iters": 4, **train},
        "optimizer": {"lr": 2e-3, "min_lr": 2e-4},
        "scheduler": {"lr_decay_iters": 4, "lr_warmup_iters": 1, "start_weight_decay": 0.03, "end_weight_decay": 0.03},
        "ddp": {"use_distributed_optimizer": True},
        "mixed_precision": {"bf16": False},
    }


def gpu_experiment(
    layout: dict[str, Any], *, bf16: bool, iterations: int, layers: int = 4, packs: int = 8
) -> dict[str, Any]:
    """The same on GPUs: heads of 72 channels as DiT-XL has, Transformer Engine, more iterations at a lower rate."""
    small = experiment(layout, train_iters=iterations)
    heads = {
        "hidden_size": 288,
        "num_attention_heads": 4,
        "ffn_hidden_size": 1152,
        "kv_channels": 72,
        "seq_length": 344,
        "crossattn_emb_size": 64,
    }
    return small | {
        "cluster": {"device": "cuda"},
        "data": {"source": "mock", "num_streams": 8, "resolution": 128},
        "dataset": {"task_encoder_seq_length": 344},
        "model": small["model"] | heads | {"num_layers": layers, "transformer_impl": "transformer_engine"},
        "train": small["train"] | {"global_batch_size": packs},
        "optimizer": {"lr": 1e-4, "min_lr": 1e-5},
        "scheduler": small["scheduler"] | {"lr_decay_iters": iterations},
        "mixed_precision": {"bf16": bf16},
    }


@dataclass(frozen=True)
class Job:
    """One run of a layout, for parity_worker.py."""

    layout: str
    folder: Path
    """To be made; its records go there."""
    experiment: dict[str, Any]
    fault: str = ""
    """One of NVIDIA DFM's own, to be injected."""
    start: Path | None = None
    """A checkpoint to set out from."""
    save: bool = False
    """Leave a checkpoint in `folder`."""
    graphs: bool = False
    """CUDA graphs, where the layout allows them, as a run has them."""

    @property
    def done(self) -> bool:
        """Whether every rank came to its end."""
        return all((self.folder / f"done{rank}").exists() for rank in range(ranks(self.layout)))


def torchrun(script: Path, *args: str, processes: int, seconds: int = 300) -> tuple[int, str]:
    """Run a script on `processes` ranks of this machine, on a free port: exit code, and what it wrote to stderr."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        str(script),
    ]
    process = subprocess.Popen(
        [*command, *args],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    code, _, said = finish(process, seconds)
    return code, said


def run_all(jobs: list[Job]) -> dict[Path, str]:
    """Run jobs, and return what the failed ones said, by folder.

    Those of as many ranks run in the same processes one after another; in new ones after one that failed.
    A job with a fault is to come alone: what is injected stays.
    """
    said: dict[Path, str] = {}
    for job in jobs:
        job.folder.mkdir(parents=True)
    for count in sorted({ranks(job.layout) for job in jobs}):
        left = [job for job in jobs if ranks(job.layout) == count]
        while left:
            listed = left[0].folder / "jobs.json"
            listed.write_text(json.dumps([vars(job) for job in left], default=str))
            seconds = 120 + 60 * len(left)
            if left[0].experiment["cluster"]["device"] == "cpu":
                forked = WARM.start_ranks(WORKER, [str(listed)], count, cwd=ROOT, env={})
                code, _, words = forked.finish(seconds)
            else:
                code, words = torchrun(WORKER, str(listed), processes=count, seconds=seconds)
            undone = [job for job in left if not job.done]
            if code:
                said[(undone or left[-1:])[0].folder] = words[-3000:]
            left = undone[1:]
    return said


def run(
    layout: str, folder: Path, fault: str = "", made: dict[str, Any] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """The ranks' records of one layout: of `made`, or of the small experiment; `options` are those of a Job."""
    return together([Job(layout, folder, made or experiment(CUTS[layout]), fault, **options)])(layout)


def together(jobs: list[Job]) -> Callable[[str], list[dict[str, Any]]]:
    """The ranks' records of a layout by its name, when all have run."""
    said, folders = run_all(jobs), {job.layout: job.folder for job in jobs}

    def of(layout: str) -> list[dict[str, Any]]:
        folder = folders[layout]
        assert folder not in said, said[folder]
        return records(folder)

    return of


def records(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a run wrote down."""
    return [torch.load(path, map_location="cpu") for path in sorted(folder.glob("rank*.pt"))]


def whole(records: list[dict[str, Any]], index: int) -> dict[str, torch.Tensor]:
    """Every parameter's gradient at its full shape, put together from the tensor-parallel slices."""
    records = [record for record in records if record["gradients"]]
    gradients: dict[str, torch.Tensor] = {}
    ranks = sorted({record["tensor_rank"] for record in records})
    for name in {name for record in records for name in record["cut"]}:
        holders = {record["tensor_rank"]: record for record in records if name in record["cut"]}
        slices = [holders[rank]["gradients"][index][name] for rank in ranks if rank in holders]
        cut = holders[ranks[0]]["cut"][name]
        gradients[name] = slices[0] if cut is None else torch.cat(slices, dim=cut)
    return gradients


@dataclass(frozen=True)
class Difference:
    """How far a layout is from the reference; the largest over iterations and parameters."""

    loss: float
    grad_norm: float
    gradient: float
    worst_gradient: str
    replicas: float
    """Largest absolute difference between two copies of a parameter that ranks share; must be 0."""

    def agrees(self, limits: Limits = FP32) -> bool:
        """Within the limits, and with no copy that differs."""
        return (
            self.loss <= limits.loss
            and self.grad_norm <= limits.grad_norm
            and self.gradient <= limits.gradient
            and self.replicas == 0
        )


def compare(reference: list[dict[str, Any]], other: list[dict[str, Any]]) -> Difference:
    """The differences of a layout's records from the reference's, over the iterations that it has."""
    relative = lambda key: max(  # noqa: E731
        abs(a - b) / abs(a) for a, b in zip(reference[0][key], other[0][key], strict=False)
    )
    worst, worst_name = 0.0, ""
    for index in range(len(other[0]["gradients"])):
        expected, actual = whole(reference, index), whole(other, index)
        assert expected.keys() == actual.keys()
        for name, gradient in expected.items():
            distance = float((gradient - actual[name]).norm() / gradient.norm())
            if distance > worst:
                worst, worst_name = distance, name
    return Difference(relative("losses"), relative("grad_norms"), worst, worst_name, replica_difference(other))


def replica_difference(records: list[dict[str, Any]]) -> float:
    """Largest difference between copies of one parameter, over all ranks and model chunks."""
    first: dict[Any, torch.Tensor] = {}
    largest = 0.0
    for record in records:
        for name, tensor in record["copies"]:
            key = (name, None if record["cut"][name] is None else record["tensor_rank"])
            largest = max(largest, float((tensor - first.setdefault(key, tensor)).abs().max()))
    return largest
