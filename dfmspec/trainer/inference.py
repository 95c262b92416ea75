"""Inference from a checkpoint: its model, and latents drawn with EDM's sampler.

It runs in one process, whatever layout trained the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfmspec.errors import CheckpointError
from dfmspec.record.locate import Located
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer import edm
from dfmspec.trainer.checkpoint.state import load_tensors
from dfmspec.trainer.data.microbatch import DrawnSample, microbatches
from dfmspec.trainer.data.patches import patchify, unpatchify
from dfmspec.trainer.network.model import DiT
from dfmspec.trainer.network.weights import load_pretrained
from dfmspec.trainer.noise import Draw, counter_seed
from dfmspec.trainer.optim.ema import Ema
from dfmspec.trainer.setup import build_model, initialize_distributed

_ONE_PROCESS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "sequence_parallel": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "attention_backend": "auto",
}
"""The keys of `model` that say how it is cut over ranks, for one rank."""


def one_process(config: dict[str, Any]) -> Experiment:
    """A checkpoint's configuration with the layout of a single process on this machine.

    On a machine without a GPU, and for a model that was trained without one, that is a process on the CPU, in fp32.

    Raises:
        CheckpointError: the configuration is none of a training.
    """
    try:
        return _one_process(config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's configuration is not one of this trainer: {error}") from error


def _one_process(config: dict[str, Any]) -> Experiment:
    has_gpu = torch.cuda.is_available() and config["cluster"]["device"] == "cuda"
    model = config["model"] | _ONE_PROCESS
    if not has_gpu:
        model["transformer_impl"] = "local"
    cluster = config["cluster"] | {"device": "cuda" if has_gpu else "cpu"}
    bf16 = bool(config["mixed_precision"]["bf16"]) and has_gpu
    changed = {
        "model": model,
        "cluster": cluster,
        "mixed_precision": {"bf16": bf16},
    }
    return Experiment.model_validate(config | changed)


def load_model(checkpoint: Located, experiment: Experiment, *, raw: bool) -> DiT:
    """The model with the averaged (or, `raw`, the trained) weights of a checkpoint; joins a process group of one.

    Of NVIDIA DFM's checkpoints they are the trained ones: there are no others.
    """
    initialize_distributed(experiment)
    chunk = build_model(experiment)[0]
    if not checkpoint.is_own:
        load_pretrained([chunk], checkpoint.path)
    elif raw:
        _load_trained(chunk, checkpoint.path)
    else:
        _load_averages(chunk, checkpoint.path, experiment.diffusion.ema_decay)
    return chunk.eval()


def _load_trained(chunk: DiT, checkpoint: Path) -> None:
    """Load the weights that were trained."""
    sharded = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    loaded = load_tensors({"model": sharded}, checkpoint)
    chunk.load_state_dict(loaded["model"])


def _load_averages(chunk: DiT, checkpoint: Path, decay: float) -> None:
    """Load the averaged weights; they are fp32 in the checkpoint."""
    averages = Ema([chunk], decay)
    loaded = load_tensors(averages.sharded_state_dict(), checkpoint)
    weights = dict(chunk.named_parameters())
    with torch.no_grad():
        for name in averages.weights[0]:
            average = loaded["chunk0"][f"ema.{name}"]
            weights[name].copy_(average)


@torch.no_grad()
def sample_latents(
    model: DiT,
    experiment: Experiment,
    contexts: Sequence[Tensor],
    shape: tuple[int, int, int, int],
    *,
    seed: int,
    num_steps: int,
    guidance: float,
) -> Tensor:
    """EDM samples for the texts: [n, C, T, H, W], unit variance.

    Args:
        model: the network, in one process.
        experiment: its configuration there.
        contexts: n texts [L, E].
        shape: [C, T, H, W] of each sample.
        seed: sample i's noise is a function of (seed, i) alone.
        num_steps: noise levels of the sampler.
        guidance: g of cond + g (cond - uncond).
    """
    diffusion = experiment.diffusion
    pt = experiment.model.patch_temporal
    p = experiment.model.patch_spatial
    numbers = range(len(contexts))
    noises = [patchify(_noise(shape, seed, i), pt, p) for i in numbers]
    without_text = [torch.zeros_like(text) for text in contexts]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; sigma), guided."""
        conditional = _denoised(model, experiment, x, sigma, contexts, shape)
        if guidance == 0:
            return conditional
        unconditional = _denoised(model, experiment, x, sigma, without_text, shape)
        return conditional + guidance * (conditional - unconditional)

    steps = edm.sigma_steps(num_steps, diffusion.sigma_min, diffusion.sigma_max, diffusion.rho)
    x = edm.sample_heun(denoise, torch.cat(noises), steps)
    latents = [unpatchify(part, shape, pt, p) for part in x.chunk(len(contexts))]
    return torch.stack(latents).float() / diffusion.sigma_data


def _noise(shape: tuple[int, ...], seed: int, number: int) -> Tensor:
    """Unit Gaussian noise of `shape` for one sample."""
    generator = torch.Generator().manual_seed(counter_seed(seed, "sample", number))
    return torch.randn(shape, generator=generator)


def _denoised(
    model: DiT,
    experiment: Experiment,
    x: Tensor,
    sigma: Tensor,
    texts: Sequence[Tensor],
    shape: tuple[int, int, int, int],
) -> Tensor:
    """D(x; sigma) [tokens, P] for all samples as one pack; fp32 around the network, fp64 given and returned."""
    # The microbatch has the segments of the samples; its latents are never looked at.
    no_latent = torch.zeros(shape)
    draw = Draw(float(sigma), True, no_latent)
    pack = tuple(DrawnSample(str(i), no_latent, text, draw) for i, text in enumerate(texts))
    batch = next(microbatches(experiment, iter([pack]), micro_batch_size=1, seq_length=len(x)))

    # EDM's preconditioning around the network.
    sigma_data = experiment.diffusion.sigma_data
    x32 = x.float().to(batch.x.device)
    sigma32 = sigma.float().to(batch.x.device)
    net_input = edm.c_in(sigma32, sigma_data) * x32
    F_x = model(batch.with_input(net_input)).squeeze(1).float()  # noqa: N806
    return edm.denoised(F_x, x32, sigma32, sigma_data).double().to(x.device)
