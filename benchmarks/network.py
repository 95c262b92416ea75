"""The trainer's network and NVIDIA DFM's own on the fixture's weights and packs, each at some precision; on a GPU.

usage: python benchmarks/network.py ours {fp64,bf16,fp32} OUT
       python benchmarks/network.py dfm {bf16,fp32} OUT
       python benchmarks/network.py apart ONE OTHER

`dfm` needs a checkout with its submodules on PYTHONPATH, and Transformer Engine. In bf16 DFM is as it is. In fp32 it
has plain attention, and the order of positions, GELU and epsilon of ours; run it with NVIDIA_TF32_OVERRIDE=0.
`apart` prints the relative L2 of OTHER to ONE, pack by pack. fp64 of ours is on the CPU.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.trainer.network import differential as case

Found = list[dict[str, Tensor]]
"""Of each pack: "denoised", "loss", and every gradient under DFM's names."""
_NOT_COMPARED = ("fps", "aff", "pos_embedder")


def main() -> int:
    what, first, second = sys.argv[1:]
    if what == "apart":
        _print_apart(torch.load(first), torch.load(second))
        return 0
    run: Callable[[str], Found] = {"ours": _ours, "dfm": _dfms}[what]
    torch.save(run(first), second)
    return 0


def _ours(precision: str) -> Found:
    from dfmspec.spec.experiment import Experiment
    from dfmspec.trainer import edm, setup
    from dfmspec.trainer.data.microbatch import DrawnSample, collate, on_device
    from dfmspec.trainer.data.patches import unpatchify
    from dfmspec.trainer.network.embeddings import sinusoid
    from dfmspec.trainer.network.weights import to_dfm
    from dfmspec.trainer.noise import Draw

    is_exact = precision == "fp64"
    experiment = Experiment.model_validate(_experiment(precision))
    setup.initialize_distributed(experiment)
    (model,) = setup.build_model(experiment)
    if is_exact:
        model.double()
        model.config.params_dtype = torch.float64
        quarter, three_eighths = case.HIDDEN // 4, 3 * case.HIDDEN // 8
        for axis, size, width in zip("thw", case.TABLE, (quarter, three_eighths, three_eighths), strict=True):
            table = sinusoid(torch.arange(size, dtype=torch.float64), width)
            setattr(model.position_embedding, f"table_{axis}", table)
    with torch.no_grad():
        for name, weight in case.weights().items():
            model.get_parameter(name).copy_(weight)

    device = torch.device("cpu") if is_exact else torch.device("cuda", 0)
    wide = torch.float64 if is_exact else torch.float32
    counts = [t * h * w for t, h, w in case.SIZES]
    used = sum(counts)
    found = []
    for pack in case.packs():
        sigma = torch.tensor(pack.sigma, dtype=wide, device=device)
        clean, noise = pack.clean.to(device, wide), pack.noise.to(device, wide)
        noisy = clean + sigma * noise

        # A batch with its segments; its tensors as they were drawn, at this precision.
        samples = []
        for (t, h, w), text in zip(case.SIZES, pack.context.split(case.TEXTS), strict=True):
            latent = unpatchify(torch.zeros(t * h * w, case.PATCH), (16, t, 2 * h, 2 * w), 1, 2)
            samples.append(DrawnSample("x", latent, text.float(), Draw(pack.sigma, True, latent)))
        batch = collate([tuple(samples)], experiment)
        if not is_exact:
            batch = on_device(batch, device)
        net_input = torch.zeros(len(batch.net_input), case.PATCH, dtype=wide, device=device)
        net_input[:used] = edm.c_in(sigma, case.SIGMA_DATA) * noisy
        context = torch.zeros(len(batch.context), case.TEXT, dtype=wide, device=device)
        context[: len(pack.context)] = pack.context.to(context)
        levels = torch.where(batch.sigma == batch.sigma[0], sigma.double(), batch.sigma.double()).to(wide)
        kind = wide if is_exact else batch.context.dtype
        batch = dataclasses.replace(batch, net_input=net_input, context=context.to(kind), c_noise=edm.c_noise(levels))

        model.zero_grad()
        output = model(batch)[:used, 0].to(wide)
        loss = edm.weighted_error(output, noisy, clean, sigma, case.SIGMA_DATA)
        loss.mean().backward()
        gradients = to_dfm({name: weight.grad.cpu() for name, weight in model.named_parameters()})
        denoised = edm.denoised(output, noisy, sigma, case.SIGMA_DATA)
        found.append(_kept(denoised, loss, gradients))
    return found


def _experiment(precision: str) -> dict[str, Any]:
    from tests.trainer import parity

    config: dict[str, Any] = parity.experiment({})
    config["model"] |= {
        "num_layers": case.LAYERS, "hidden_size": case.HIDDEN, "num_attention_heads": case.HEADS,
        "kv_channels": case.HIDDEN // case.HEADS, "num_query_groups": case.HEADS, "ffn_hidden_size": 4 * case.HIDDEN,
        "crossattn_emb_size": case.TEXT, "adaln_lora_rank": case.RANK, "max_frames": case.TABLE[0],
        "max_img_h": 2 * case.TABLE[1], "max_img_w": 2 * case.TABLE[2],
    }  # fmt: skip
    if precision != "fp64":
        config["cluster"] = {"device": "cuda"}
        config["model"]["transformer_impl"] = "transformer_engine" if precision == "bf16" else "local"
        config["mixed_precision"] = {"bf16": precision == "bf16"}
    return config


def _dfms(precision: str) -> Found:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777"}
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    from dfm.src.megatron.model.common import dit_embeddings
    from dfm.src.megatron.model.dit import dit_layer_spec, dit_model
    from dfm.src.megatron.model.dit.dit_model_provider import DiTModelProvider
    from dfm.src.megatron.model.dit.edm import edm_pipeline, edm_utils

    from dfmspec.trainer.network import weights

    # In fp32: plain attention, and fp32 where bf16 is written into the code.
    as_it_is = precision == "bf16"
    dtype = torch.bfloat16 if as_it_is else torch.float32
    if not as_it_is:
        dit_layer_spec.TEDotProductAttention = _PlainAttention
        for module in (dit_model, dit_embeddings, edm_pipeline, edm_utils):
            module.torch = _Fp32("torch")

    sizes = {"max_img_h": 2 * case.TABLE[1], "max_img_w": 2 * case.TABLE[2], "max_frames": case.TABLE[0]}
    config = DiTModelProvider(
        num_layers=case.LAYERS,
        hidden_size=case.HIDDEN,
        num_attention_heads=case.HEADS,
        crossattn_emb_size=case.TEXT,
        ffn_hidden_size=4 * case.HIDDEN,
        bf16=as_it_is,
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
        **sizes,
    )
    if not as_it_is:
        config.layernorm_epsilon = 1e-6
        config.activation_func = lambda x: F.gelu(x, approximate="tanh")
    network = dit_model.DiTCrossAttentionModel(
        config, pre_process=True, post_process=True, patch_spatial=2, patch_temporal=1, **sizes
    )
    network = network.cuda().to(dtype)
    if as_it_is:
        weights._other_order = lambda name, weight: weight  # the same numbers under its names
    missing = network.load_state_dict(weights.to_dfm(case.weights()), strict=False)
    assert not missing.unexpected_keys, missing
    assert all("extra" in name or "pos_embedder" in name for name in missing.missing_keys), missing

    pipeline = edm_pipeline.EDMPipeline(sigma_data=case.SIGMA_DATA)
    pipeline.tensor_kwargs = {"device": "cuda", "dtype": dtype}
    pipeline.net = Float16Module(config, network) if as_it_is else network
    counts = [t * h * w for t, h, w in case.SIZES]
    queries, keys = (
        torch.tensor([0, *accumulate(each)], dtype=torch.int32, device="cuda") for each in (counts, case.TEXTS)
    )

    def packed(q: Tensor, k: Tensor) -> Any:
        longest = {"max_seqlen_q": int(q.diff().max()), "max_seqlen_kv": int(k.diff().max())}
        where = {"cu_seqlens_q": q, "cu_seqlens_kv": k, "cu_seqlens_q_padded": q, "cu_seqlens_kv_padded": k}
        return PackedSeqParams(qkv_format="thd", **where, **longest)

    found = []
    for pack in case.packs():
        condition = {
            "crossattn_emb": pack.context[None].to("cuda", dtype),
            "pos_ids": pack.positions[None].cuda(),
            "packed_seq_params": {"self_attention": packed(queries, queries), "cross_attention": packed(queries, keys)},
        }
        clean, noise = (each[None].to("cuda", dtype) for each in (pack.clean, pack.noise))
        sigma = torch.tensor([pack.sigma]).to("cuda", dtype)
        output, _, loss = pipeline.compute_loss_with_epsilon_and_sigma(clean, condition, noise, sigma)
        network.zero_grad()
        loss.mean().backward()
        gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        found.append(_kept(output["model_pred"]["x0_pred"][0], loss[0], gradients))
    return found


class _Fp32(ModuleType):
    """torch, in which bf16 is fp32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _PlainAttention(nn.Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: Any, **__: Any) -> Tensor:
        lengths = [
            bounds.diff().tolist() for bounds in (packed_seq_params.cu_seqlens_q, packed_seq_params.cu_seqlens_kv)
        ]
        parts = zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True)
        outputs = []
        for q, k, v in parts:
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        return torch.cat(outputs).flatten(1)


def _kept(denoised: Tensor, loss: Tensor, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """In fp32, on the CPU."""
    compared = {name: gradient for name, gradient in gradients.items() if not name.startswith(_NOT_COMPARED)}
    named = {"denoised": denoised, "loss": loss, **compared}
    return {name: tensor.detach().float().cpu() for name, tensor in named.items()}


def _print_apart(one: Found, other: Found) -> None:
    print("sigma  denoised  all gradients  the furthest gradient")
    for sigma, mine, theirs in zip(case.SIGMAS, one, other, strict=True):
        names = sorted(mine.keys() - {"denoised", "loss"})
        assert mine.keys() == theirs.keys()
        whole = [torch.cat([each[name].flatten() for name in names]) for each in (mine, theirs)]
        furthest = max((_apart(mine[name], theirs[name]), name) for name in names)
        denoised = _apart(mine["denoised"], theirs["denoised"])
        print(f"{sigma:5}  {denoised:.2e}  {_apart(*whole):.2e}       {furthest[0]:.2e} {furthest[1]}")


def _apart(one: Tensor, other: Tensor) -> float:
    """Relative L2."""
    return float((one.double() - other.double()).norm() / one.double().norm())


if __name__ == "__main__":
    sys.exit(main())
