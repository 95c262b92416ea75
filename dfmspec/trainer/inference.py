"""Inference from a checkpoint, in one process whatever layout trained it: its model, and latents drawn with EDM's sampler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dfmspec.errors import CheckpointError
from dfmspec.record import checkpoints
from dfmspec.record.events import read_events
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer import edm
from dfmspec.trainer.data.microbatch import DrawnSample, microbatches
from dfmspec.trainer.data.patches import patchify, unpatchify
from dfmspec.trainer.network.model import DiT
from dfmspec.trainer.noise import Draw, counter_seed


def locate(place: Path) -> tuple[Path, dict]:
    """The checkpoint that a path means, with its manifest: itself, or the newest whole one of a folder or a run directory.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    if (place / checkpoints.MANIFEST).exists() and place.name.startswith("iter_"):
        if fault := checkpoints.problem(place):
            raise CheckpointError(f"checkpoint {place} is not whole: {fault}")
        return place, json.loads((place / checkpoints.MANIFEST).read_text())
    folders = [place, place / "checkpoints"]
    if (place / "events.jsonl").exists():  # a run that saves elsewhere says where
        folders += [Path(event["path"]).parent for event in reversed(read_events(place / "events.jsonl")) if event["type"] == "checkpoint"][:1]
    for folder in folders:
        for found in checkpoints.committed(folder):
            if checkpoints.problem(found) is None:
                return found, json.loads((found / checkpoints.MANIFEST).read_text())
    raise CheckpointError(f"{place} has no whole checkpoint (iter_N with {checkpoints.MANIFEST})")


def one_process(config: dict) -> Experiment:
    """A checkpoint's configuration with the layout of a single process on this machine."""
    device = "cuda" if torch.cuda.is_available() and config["cluster"]["device"] == "cuda" else "cpu"
    layout = {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None, "sequence_parallel": False, "recompute_granularity": None,
        "recompute_method": None, "recompute_num_layers": None, "attention_backend": "auto",
    }  # fmt: skip
    if device == "cpu":
        layout["transformer_impl"] = "local"
    config = config | {"model": config["model"] | layout, "cluster": config["cluster"] | {"device": device}}
    config["mixed_precision"] = {"bf16": bool(config["mixed_precision"]["bf16"]) and device == "cuda"}
    return Experiment.model_validate(config)


def load_model(checkpoint: Path, experiment: Experiment, *, raw: bool) -> DiT:
    """The model with the averaged (or, `raw`, the trained) weights of a checkpoint."""
    from megatron.core import dist_checkpointing

    from dfmspec.trainer.optim.ema import Ema
    from dfmspec.trainer.setup import build_model, initialize_distributed

    initialize_distributed(experiment)
    chunk = build_model(experiment)[0]
    if raw:
        sharded = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        chunk.load_state_dict(dist_checkpointing.load({"model": sharded}, str(checkpoint))["model"])
    else:
        averages = Ema([chunk], experiment.diffusion.ema_decay)
        loaded = dist_checkpointing.load(averages.sharded_state_dict(), str(checkpoint))
        weights = dict(chunk.named_parameters())
        with torch.no_grad():
            for name in averages.weights[0]:
                weights[name].copy_(loaded["chunk0"][f"ema.{name}"])
    return chunk.eval()


@torch.no_grad()
def sample_latents(
    model: DiT, experiment: Experiment, contexts: Sequence[Tensor], shape: tuple[int, int, int, int], *,
    seed: int, num_steps: int, guidance: float,
) -> Tensor:  # fmt: skip
    """EDM samples for the texts: [n, C, T, H, W], unit variance.

    Sample i's noise is a function of (seed, i) alone. guidance g: cond + g (cond - uncond).
    """
    diffusion, (pt, p) = experiment.diffusion, (experiment.model.patch_temporal, experiment.model.patch_spatial)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(counter_seed(seed, "sample", i))) for i in range(len(contexts))]
    tokens = patchify(noises[0], pt, p).size(0)
    experiment = experiment.model_copy(update={"model": experiment.model.model_copy(update={"seq_length": tokens * len(contexts)})})
    experiment = experiment.model_copy(update={"train": experiment.train.model_copy(update={"micro_batch_size": 1})})

    def network(x: Tensor, sigma: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """D(x; sigma) for all samples as one pack; fp32 around the network."""
        samples = [
            DrawnSample(str(i), torch.zeros(shape), text, Draw(float(sigma), True, torch.zeros(shape)))
            for i, text in enumerate(texts)
        ]  # fmt: skip
        batch = next(microbatches(experiment, iter([tuple(samples)])))
        x32, sigma32 = x.float().to(batch.x.device), sigma.float().to(batch.x.device)
        net_input = edm.c_in(sigma32, diffusion.sigma_data) * x32
        F_x = model(batch.with_input(net_input)).squeeze(1).float()  # noqa: N806
        return edm.denoised(F_x, x32, sigma32, diffusion.sigma_data).double().to(x.device)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        conditional = network(x, sigma, contexts)
        if guidance == 0:
            return conditional
        return conditional + guidance * (conditional - network(x, sigma, [torch.zeros_like(text) for text in contexts]))

    steps = edm.sigma_steps(num_steps, diffusion.sigma_min, diffusion.sigma_max, diffusion.rho)
    x = edm.sample_heun(denoise, torch.cat([patchify(noise, pt, p) for noise in noises]), steps)
    latents = [unpatchify(part, shape, pt, p) for part in x.split(tokens)]
    return torch.stack(latents).float() / diffusion.sigma_data
