"""What some of NVIDIA DFM's differences cost, in numbers; on the CPU.

usage: python benchmarks/upstream.py edm CHECKOUT
       python benchmarks/upstream.py train {ours,sigma,both} DATASET [key=value ...]

`edm` runs DFM's own sampler and noise (of a checkout at 7cb7634) beside ours. `train` trains a small DiT
on a data set of 64 px (`dfmspec data prepare --resolution 64 --num-samples 640`), 40 pictures a pack, one pack an
iteration: as ours does; with one noise level a pack, as DFM has it; or with one and one condition dropout.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from dfmspec import entry
from dfmspec.trainer import edm
from dfmspec.trainer.noise import Draw, counter_seed

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO = 0.5, 0.002, 80.0, 7.0
PACK = 40
TRAINING = (
    "recipe=dit_tiny",
    "cluster.device=cpu",
    "data.num_streams=1",
    "dataset.task_encoder_seq_length=640",
    "dataset.num_workers=0",
    f"dataset.packing_buffer_size={PACK}",
    "model.num_layers=4",
    "model.hidden_size=192",
    "model.num_attention_heads=3",
    "model.adaln_lora_rank=64",
    "train.global_batch_size=1",
    "train.train_iters=500",
    "train.eval_iters=16",
    "train.eval_interval=500",
    "optimizer.lr=1e-3",
    "logger.log_interval=50",
)


def main() -> int:
    what, place, *words = sys.argv[1:]
    if what == "edm":
        theirs = _pipeline(Path(place))
        _sampler(theirs)
        _replay(theirs)
        _rounding()
        return 0
    if place != "ours":
        _one_level_a_pack(drops_too=place == "both")
    dataset, *more = words
    return entry.main([*TRAINING, f"name={place}", f"dataset.path={dataset}", *more])


def _pipeline(checkout: Path) -> ModuleType:
    """DFM's module of EDM, on the CPU and by itself: one replica, without Transformer Engine, which it never calls."""
    sys.path.insert(0, str(checkout))
    sys.modules["transformer_engine_torch"] = ModuleType("transformer_engine_torch")
    edm_pipeline = importlib.import_module("dfm.src.megatron.model.dit.edm.edm_pipeline")
    edm_utils = importlib.import_module("dfm.src.megatron.model.dit.edm.edm_utils")
    edm_utils.tqdm = lambda steps, **_: steps
    edm_pipeline.parallel_state = SimpleNamespace(get_data_parallel_rank=lambda **_: 0)
    for module in (edm_pipeline, edm_utils):
        module.torch = _OnCpu("torch")
    return edm_pipeline


class _OnCpu(ModuleType):
    """torch, in which what asks for a GPU is on the CPU."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("tensor", "Generator"):
            return found

        def on_cpu(*words: Any, device: object) -> Any:
            return found(*words)

        return on_cpu


def _sampler(theirs: ModuleType) -> None:
    """Gaussian data, whose best denoiser and exact flow are known: the error of a sample by the number of steps."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)[0]
        return x * SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)

    noise = torch.randn(1, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = noise * SIGMA_MAX
    exact = start * SIGMA_DATA / (SIGMA_MAX**2 + SIGMA_DATA**2) ** 0.5
    print("steps  DFM's   evaluations  ours     evaluations")
    for steps in (18, 35, 70, 140):
        theirs_drawn = theirs.EDMSampler()(denoise, start, num_steps=steps, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX)
        levels = edm.sigma_steps(steps, SIGMA_MIN, SIGMA_MAX, RHO)
        ours_drawn = edm.sample_heun(denoise, noise, levels)
        errors = [float((drawn - exact).norm() / exact.norm()) for drawn in (theirs_drawn, ours_drawn)]
        print(f"{steps:5}  {errors[0]:.1e} {2 * steps - 1:9}    {errors[1]:.1e} {2 * steps - 1:9}")


def _replay(theirs: ModuleType) -> None:
    """The noise levels and the noise of two pipelines, each as a start makes it."""
    starts = []
    for _ in range(2):
        pipeline = theirs.EDMPipeline(sigma_data=SIGMA_DATA)
        pipeline.tensor_kwargs = {"dtype": torch.bfloat16}
        starts.append([pipeline.draw_training_sigma_and_epsilon((1, 64, 16), None) for _ in range(1000)])
    same = sum(all(map(torch.equal, one, other)) for one, other in zip(*starts, strict=True))
    print(f"iterations after another start whose noise level and noise are those of the first: {same} of 1000")


def _rounding() -> None:
    """x_t as DFM makes it, in bf16: how far from where it is meant, in units of the noise level."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1_000_000, generator=generator) for _ in range(2))
    clean = clean * SIGMA_DATA
    for sigma in (0.002, 0.01, 0.1, 1.0):
        meant = clean + sigma * noise
        made = clean.bfloat16() + torch.tensor(sigma).bfloat16() * noise.bfloat16()
        print(f"rounding of x_t at sigma {sigma}: {float((made - meant).square().mean().sqrt()) / sigma:.3f} sigma")


def _one_level_a_pack(*, drops_too: bool) -> None:
    """Let all samples of a pack have one noise level in training: they are neighbours in their stream."""
    from dfmspec.trainer.data import streams

    own = streams.draw

    def draw(shape: tuple[int, ...], *, p_mean: float, p_std: float, dropout: float, **counters: Any) -> Draw:
        drawn = own(shape, p_mean=p_mean, p_std=p_std, dropout=dropout, **counters)
        if counters["split"] != "train":
            return drawn
        number = counter_seed(counters["seed"], "pack", counters["stream"], counters["ordinal"] // PACK)
        generator = torch.Generator().manual_seed(number)
        level, condition = torch.randn((), generator=generator), torch.rand((), generator=generator)
        changed = {"sigma": float((p_mean + p_std * level.double()).exp())}
        if drops_too:
            changed["keep_condition"] = float(condition) >= dropout
        return dataclasses.replace(drawn, **changed)

    streams.draw = draw  # type: ignore[assignment]


if __name__ == "__main__":
    sys.exit(main())
