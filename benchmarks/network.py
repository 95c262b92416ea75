"""The trainer's network and NVIDIA DFM's own on the fixture's weights and packs, each at some precision; on a GPU.

usage: python benchmarks/network.py ours {fp64,bf16,fp32} OUT
       python benchmarks/network.py dfm {bf16,fp32} OUT
       python benchmarks/network.py apart ONE OTHER

`dfm` needs a checkout with its submodules on PYTHONPATH, and Transformer Engine. In bf16 DFM is as it is. In fp32 it
has plain attention, and the order of positions, GELU and epsilon of ours; run it with NVIDIA_TF32_OVERRIDE=0.
`apart` prints the relative L2 of OTHER to ONE, pack by pack. fp64 of ours is on the CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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


def main() -> int:
    what, first, second = sys.argv[1:]
    if what == "apart":
        _print_apart(torch.load(first), torch.load(second))
        return 0
    run = {"ours": case.ours, "dfm": _dfms}[what]
    torch.save(list(run(first)), second)
    return 0


def _dfms(precision: str) -> Iterator[dict[str, Tensor]]:
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
        yield case.kept(output["model_pred"]["x0_pred"][0], loss[0], gradients)


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
