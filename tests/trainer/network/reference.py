"""The DiT in plain PyTorch, one sample at a time, and how far the trainer's is from it; a script for test_model.py."""

from __future__ import annotations

import json
import logging
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoid(x: Tensor, width: int) -> Tensor:
    angles = x[:, None] * torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """[s, h, d], [k, h, d], [k, h, d] -> [s, h d]; q and k normed over each head."""
    q, k = (
        x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * w[f"{name}.{n}_layernorm.weight"]
        for x, n in ((q, "q"), (k, "k"))
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


def dit(
    w: dict[str, Tensor], patches: Tensor, positions: Tensor, c_noise: Tensor, text: Tensor, layers: int, heads: int
) -> Tensor:
    """F of one sample: patches [s, P], positions [s, 3], c_noise [], text [l, E] -> [s, P]; fp64."""
    width = w["x_embedder.weight"].size(0)
    axes = zip(positions.double().unbind(-1), (width // 4, 3 * width // 8, 3 * width // 8), strict=True)
    x = F.linear(patches, w["x_embedder.weight"], w["x_embedder.bias"]) + torch.cat(
        [sinusoid(p, n) for p, n in axes], -1
    )
    e = F.silu(
        F.linear(
            sinusoid(c_noise[None], width), w["noise_embedding.linear_1.weight"], w["noise_embedding.linear_1.bias"]
        )
    )
    e = F.silu(F.linear(e, w["noise_embedding.linear_2.weight"], w["noise_embedding.linear_2.bias"]))
    for i in range(layers):
        at = f"decoder.layers.{i}"
        m = F.linear(F.linear(e, w[f"{at}.adaln.down.weight"]), w[f"{at}.adaln.up.weight"]).chunk(9, -1)

        def normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True)
            return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + scale) + shift

        name = f"{at}.self_attention"
        q, k, v = F.linear(normed(x, m[0], m[1]), w[f"{name}.linear_qkv.weight"]).view(len(x), heads, 3, -1).unbind(2)
        x = x + m[2] * F.linear(attention(q, k, v, w, name), w[f"{name}.linear_proj.weight"])
        name = f"{at}.cross_attention"
        q = F.linear(normed(x, m[3], m[4]), w[f"{name}.linear_q.weight"]).view(len(x), heads, -1)
        k, v = F.linear(text, w[f"{name}.linear_kv.weight"]).view(len(text), heads, 2, -1).unbind(2)
        x = x + m[5] * F.linear(attention(q, k, v, w, name), w[f"{name}.linear_proj.weight"])
        y = F.gelu(F.linear(normed(x, m[6], m[7]), w[f"{at}.mlp.linear_fc1.weight"]), approximate="tanh")
        x = x + m[8] * F.linear(y, w[f"{at}.mlp.linear_fc2.weight"])
    return F.linear(x, w["final_linear.weight"], w["final_linear.bias"])


def main() -> None:
    """Print the relative differences of output and gradients, on a pack of samples of several sizes with padding."""
    logging.disable(logging.WARNING)
    from dfmspec.spec.experiment import Experiment
    from dfmspec.trainer import setup
    from dfmspec.trainer.data.microbatch import DrawnSample, collate
    from dfmspec.trainer.noise import draw
    from tests.trainer import parity
    from tests.trainer.parity_worker import wake

    experiment = Experiment.model_validate(parity.experiment({}))
    setup.initialize_distributed(experiment)
    (model,) = setup.build_model(experiment)
    wake([model])
    generator, samples = torch.Generator().manual_seed(1), []
    for i, (side, texts) in enumerate([(8, 5), (12, 9), (4, 1), (4, 3)]):
        noise = draw(
            (16, 1, side, side), seed=0, split="train", stream=0, ordinal=i, p_mean=0.0, p_std=1.0, dropout=0.0
        )
        samples.append(
            DrawnSample(
                str(i),
                torch.randn(16, 1, side, side, generator=generator),
                torch.randn(texts, 32, generator=generator),
                noise,
            )
        )
    batch = collate([tuple(samples)], experiment)
    output = model(batch).squeeze(1)
    used = int(batch.num_tokens)
    output[:used].square().sum().backward()

    w = {name: weight.detach().double().requires_grad_() for name, weight in model.named_parameters()}
    pieces, texts = (
        [],
        iter(
            batch.context.split(
                [len(sample.context) for sample in samples]
                + [len(batch.context) - sum(len(s.context) for s in samples)]
            )
        ),
    )
    for i in range(len(samples)):
        rows = batch.of_token == i
        pieces.append(
            dit(
                w,
                batch.net_input[rows].double(),
                batch.positions[rows],
                batch.c_noise[i].double(),
                next(texts).double(),
                4,
                4,
            )
        )
    expected = torch.cat(pieces)
    gradients = torch.autograd.grad(expected.square().sum(), list(w.values()))

    def difference(mine: Tensor, theirs: Tensor) -> float:
        return float((mine.double() - theirs).norm() / theirs.norm())

    found = {"output": difference(output[:used].detach(), expected.detach())}
    found |= {
        name: difference(model.get_parameter(name).grad, gradient) for name, gradient in zip(w, gradients, strict=True)
    }
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, ".")
    main()
