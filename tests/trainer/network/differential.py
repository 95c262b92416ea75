"""The trainer's DiT in fp64, and NVIDIA DFM's own, on the same weights and packs; a script for test_differential.py.

What DFM's gave is in dfm.json: its modules at 7cb7634 on the CPU in fp64, with plain torch in place of Transformer
Engine's linear layers and attention, and with three of its differences switched off (docs/deviations.md says which).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LAYERS, HIDDEN, HEADS, TEXT, RANK, PATCH = 2, 64, 4, 32, 256, 64
SIGMA_DATA = 0.5
SIGMAS = (0.01, 0.2, 1.0, 5.0, 60.0)
SIZES = ((1, 4, 4), (1, 2, 6), (2, 2, 2))
"""Patches of the samples of a pack: time, height, width."""
TEXTS = (5, 1, 9)
TABLE = (4, 16, 16)
"""Positions that the tables have."""


class Packed(NamedTuple):
    """Samples one after the other, of one noise level; fp64."""

    sigma: float
    positions: Tensor
    """[s, 3]"""
    clean: Tensor
    """[s, P], in the scale of sigma_data."""
    noise: Tensor
    """[s, P]"""
    context: Tensor
    """[c, E]"""


class _Numbers:
    """Numbers that every version of numpy draws alike."""

    def __init__(self, seed: int) -> None:
        self._drawn = np.random.RandomState(seed)

    def __call__(self, *shape: int, std: float = 0.2) -> Tensor:
        return torch.from_numpy(self._drawn.standard_normal(shape) * std)


def weights() -> dict[str, Tensor]:
    """Every weight of the network under our names, none of them zero."""
    draw = _Numbers(3)
    found = {
        "x_embedder.weight": draw(HIDDEN, PATCH),
        "x_embedder.bias": draw(HIDDEN),
        "noise_embedding.linear_1.weight": draw(HIDDEN, HIDDEN),
        "noise_embedding.linear_1.bias": draw(HIDDEN),
        "noise_embedding.linear_2.weight": draw(HIDDEN, HIDDEN),
        "noise_embedding.linear_2.bias": draw(HIDDEN),
        "final_linear.weight": draw(PATCH, HIDDEN),
        "final_linear.bias": draw(PATCH),
    }
    for layer in range(LAYERS):
        at = f"decoder.layers.{layer}"
        found |= {
            f"{at}.adaln.down.weight": draw(RANK, HIDDEN),
            f"{at}.adaln.up.weight": draw(9 * HIDDEN, RANK, std=0.05),
            f"{at}.self_attention.linear_qkv.weight": draw(3 * HIDDEN, HIDDEN),
            f"{at}.self_attention.linear_proj.weight": draw(HIDDEN, HIDDEN),
            f"{at}.cross_attention.linear_q.weight": draw(HIDDEN, HIDDEN),
            f"{at}.cross_attention.linear_kv.weight": draw(2 * HIDDEN, TEXT),
            f"{at}.cross_attention.linear_proj.weight": draw(HIDDEN, HIDDEN),
            f"{at}.mlp.linear_fc1.weight": draw(4 * HIDDEN, HIDDEN),
            f"{at}.mlp.linear_fc2.weight": draw(HIDDEN, 4 * HIDDEN),
        }
        for part in ("self_attention", "cross_attention"):
            for norm in "qk":
                found[f"{at}.{part}.{norm}_layernorm.weight"] = 1 + draw(HIDDEN // HEADS)
    return found


def packs() -> Iterator[Packed]:
    """A pack for each noise level: samples of several sizes, texts of several lengths."""
    draw = _Numbers(4)
    grids = [torch.cartesian_prod(*map(torch.arange, size)) for size in SIZES]
    tokens = sum(map(len, grids))
    for sigma in SIGMAS:
        yield Packed(
            sigma=sigma,
            positions=torch.cat(grids),
            clean=draw(tokens, PATCH, std=SIGMA_DATA),
            noise=draw(tokens, PATCH, std=1.0),
            context=draw(sum(TEXTS), TEXT, std=1.0),
        )


def digest_of_inputs() -> str:
    """sha256 of all weights and packs."""
    whole = hashlib.sha256()
    for weight in weights().values():
        whole.update(weight.numpy().tobytes())
    for pack in packs():
        for tensor in pack[1:]:
            whole.update(tensor.numpy().tobytes())
    return whole.hexdigest()


def figures(found: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """What is compared of a pack: of each of its tensors the norm, and products with fixed directions, which tell it
    from another of the same norm.
    """
    return {name: _figures(name, found[name]) for name in found}


def _figures(name: str, tensor: Tensor) -> list[float]:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    draw = _Numbers(seed)
    flat = tensor.detach().double().flatten()
    return [float(flat.norm()), *(float(flat @ draw(len(flat), std=1.0)) for _ in range(3))]


def ours(precision: str = "fp64") -> Iterator[dict[str, Tensor]]:
    """What our network gives on each pack: "denoised", "loss", and every gradient under DFM's names; on the CPU.

    Args:
        precision: "fp64", on the CPU; "bf16" or "fp32", on a GPU.
    """
    from dfmspec.spec.experiment import Experiment
    from dfmspec.trainer import edm, setup
    from dfmspec.trainer.data.microbatch import DrawnSample, collate, on_device
    from dfmspec.trainer.data.patches import unpatchify
    from dfmspec.trainer.network.embeddings import sinusoid
    from dfmspec.trainer.network.weights import to_dfm
    from dfmspec.trainer.noise import Draw

    is_exact = precision == "fp64"
    experiment = Experiment.model_validate(_config(precision))
    setup.initialize_distributed(experiment)
    (model,) = setup.build_model(experiment)

    # Everything in fp64, the tables too.
    if is_exact:
        model.double()
        model.config.params_dtype = torch.float64
        quarter, three_eighths = HIDDEN // 4, 3 * HIDDEN // 8
        for axis, size, width in zip("thw", TABLE, (quarter, three_eighths, three_eighths), strict=True):
            setattr(model.position_embedding, f"table_{axis}", sinusoid(torch.arange(size, dtype=torch.float64), width))
    for name, weight in weights().items():
        with torch.no_grad():
            model.get_parameter(name).copy_(weight)

    device = torch.device("cpu") if is_exact else torch.device("cuda", 0)
    wide = torch.float64 if is_exact else torch.float32
    counts = [int(np.prod(size)) for size in SIZES]
    used = sum(counts)
    for pack in packs():
        sigma = torch.tensor(pack.sigma, dtype=wide, device=device)
        clean, noise = pack.clean.to(device, wide), pack.noise.to(device, wide)
        noisy = clean + sigma * noise
        samples = []
        parts = zip(SIZES, pack.clean.split(counts), pack.noise.split(counts), pack.context.split(TEXTS), strict=True)
        for (t, h, w), latent, added, context in parts:
            shape = (16, t, 2 * h, 2 * w)
            drawn = Draw(sigma=pack.sigma, keep_condition=True, noise=unpatchify(added.float(), shape, 1, 2))
            samples.append(DrawnSample("x", unpatchify(latent.float(), shape, 1, 2), context.float(), drawn))
        batch = collate([tuple(samples)], experiment)
        if not is_exact:
            batch = on_device(batch, device)

        # What collating has in fp32, as it was drawn.
        net_input = torch.zeros(len(batch.net_input), PATCH, dtype=wide, device=device)
        net_input[:used] = edm.c_in(sigma, SIGMA_DATA) * noisy
        context = torch.zeros(len(batch.context), TEXT, dtype=wide if is_exact else batch.context.dtype, device=device)
        context[: len(pack.context)] = pack.context.to(context)
        levels = torch.where(batch.sigma == batch.sigma[0], sigma.double(), batch.sigma.double()).to(wide)
        batch = dataclasses.replace(batch, net_input=net_input, context=context, c_noise=edm.c_noise(levels))
        assert torch.equal(batch.positions[:used].cpu(), pack.positions)

        model.zero_grad()
        output = model(batch)[:used, 0].to(wide)
        loss = edm.weighted_error(output, noisy, clean, sigma, SIGMA_DATA)
        loss.mean().backward()
        gradients = to_dfm({name: weight.grad.cpu() for name, weight in model.named_parameters()})
        yield kept(edm.denoised(output, noisy, sigma, SIGMA_DATA), loss, gradients)


def kept(denoised: Tensor, loss: Tensor, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is compared, without gradients that the other program has not."""
    both = {name: gradients[name] for name in sorted(gradients) if not name.startswith(_NOT_COMPARED)}
    return {name: tensor.detach().cpu() for name, tensor in {"denoised": denoised, "loss": loss, **both}.items()}


_NOT_COMPARED = ("fps_", "affline_", "pos_embedder")


def _config(precision: str) -> dict[str, Any]:
    """The configuration of our network."""
    from tests.trainer import parity

    config: dict[str, Any] = parity.experiment({})
    config["model"] |= {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "kv_channels": HIDDEN // HEADS,
        "num_query_groups": HEADS, "ffn_hidden_size": 4 * HIDDEN, "crossattn_emb_size": TEXT, "adaln_lora_rank": RANK,
        "max_frames": TABLE[0], "max_img_h": 2 * TABLE[1], "max_img_w": 2 * TABLE[2],
    }  # fmt: skip
    if precision != "fp64":
        config["cluster"] = {"device": "cuda"}
        config["model"]["transformer_impl"] = "transformer_engine" if precision == "bf16" else "local"
        config["mixed_precision"] = {"bf16": precision == "bf16"}
    return config


def main() -> None:
    """Print the figures of our network, pack by pack."""
    logging.disable(logging.WARNING)
    print(json.dumps([figures(found) for found in ours()]))


if __name__ == "__main__":
    sys.path.insert(0, ".")
    main()
