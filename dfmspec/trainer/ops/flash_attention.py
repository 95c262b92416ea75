"""FlashAttention 4 over segments (flash-attn-4; arXiv 2407.08608 for Hopper), as an operator for torch.compile.

Its tiles are as wide as a head, rounded up to 16 channels: 80 for DiT-XL's 72, where cuDNN's are 128. It compiles when
a kind of call comes for the first time. Shapes: t tokens, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from flash_attn.cute import cache_utils, interface
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from dfmspec.trainer.ops.libraries import FLASH_ATTENTION, installed, kept_in
from dfmspec.trainer.ops.segmented import fake_gradients, keep, laid

# Another version has other inner functions.
if not installed(FLASH_ATTENTION):
    raise ImportError(f"needs {FLASH_ATTENTION.name}=={FLASH_ATTENTION.version}")


def _on_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


def _too_wide(head: int) -> bool:
    """Whether the library lays the sums of q's gradient out wider than its kernel for Hopper reads them.

    It rounds heads up to 32 channels, where the kernel rounds to 16 and so reads every row from a wrong place
    (flash-attention, pull request 2896).
    """
    sixteens = -(-head // 16)  # rounded up
    return _on_hopper() and sixteens % 2 == 1


def _before(work: Callable[..., None]) -> Callable[..., None]:
    """The pass before the kernel, which zeroes those sums too; where they are too wide, we do."""

    @wraps(work)
    def right(
        out: Tensor,
        d_out: Tensor,
        d_sums: Tensor,
        sums: Tensor,
        sums_log2: Tensor,
        dq: Tensor | None,
        *args: Any,
        **options: Any,
    ) -> None:
        if dq is not None and _too_wide(out.size(-1)):
            dq.zero_()
            dq = None
        work(out, d_out, d_sums, sums, sums_log2, dq, *args, **options)

    return right


def _after(work: Callable[..., None]) -> Callable[..., None]:
    """The pass after the kernel, which reads the sums of q's gradient."""

    @wraps(work)
    def right(dq: Tensor, output: Tensor, *args: Any, hdim_multiple_of: int, **options: Any) -> None:
        if _too_wide(output.size(-1)):
            hdim_multiple_of = 16
        work(dq, output, *args, hdim_multiple_of=hdim_multiple_of, **options)

    return right


def _keep_compiled() -> None:
    """Leave the library's kernels on disk for the next process.

    It reads its own setting from the environment when it is first imported, by whomever; where that turns its cache on,
    this changes nothing.
    """
    folder = kept_in(FLASH_ATTENTION)
    if cache_utils.CUTE_DSL_CACHE_ENABLED or folder is None:
        return
    cache_utils.CUTE_DSL_CACHE_ENABLED = True
    cache_utils.CUTE_DSL_CACHE_DIR = str(folder)
    works = {
        "fwd": _flash_attn_fwd,
        "bwd_pre": interface._bwd_preprocess,
        "bwd": _flash_attn_bwd,
        "bwd_post": interface._bwd_postprocess_convert,
    }
    for name, work in works.items():
        work.compile_cache = cache_utils.get_jit_cache(name)


interface._bwd_preprocess = _before(interface._bwd_preprocess)
interface._bwd_postprocess_convert = _after(interface._bwd_postprocess_convert)
_keep_compiled()


def _tiles(head: int) -> dict[str, Any]:
    """Tiles of the forward pass, where others than the library's were faster.

    For heads of about DiT-XL's 72 channels, 192 queries by 128 keys were 3 to 5 % faster than its 192 by 144.
    """
    if _on_hopper() and 64 < head <= 96:
        return {"tile_mn": (192, 128), "mma_pv_is_rs": False, "intra_wg_overlap": True}
    return {}


def _where(
    equal: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, max_seqlen_q: int, max_seqlen_kv: int
) -> dict[str, Any]:
    """The library's words for packed segments; equal ones are a batch, which needs none."""
    if equal:
        return {}
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_kv,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_kv,
    }


@torch.library.custom_op("dfmspec::flash_attention", mutates_args=())
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    equal: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """q [tq, h, d], k and v [tk, h, d] -> output [tq, h, d], logarithms of the softmax's sums.

    `equal`: the number of segments, if all have the same queries and keys; otherwise 0. `deterministic` is for the
    backward pass.
    """
    out, sums, *_ = _flash_attn_fwd(
        *laid(equal, q, k, v),
        **_where(equal, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv),
        **_tiles(q.size(-1)),
        return_lse=True,
    )
    return out.view(q.shape), sums


@flash_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    equal: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    shape = (equal, heads, tokens // equal) if equal else (heads, tokens)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("dfmspec::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    equal: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `flash_attention` took and gave: of their shapes."""
    where = _where(equal, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
    if not equal:
        # Keys beyond the last segment, which pad the text, would be left as they are.
        where["dk"] = torch.zeros_like(k)
        where["dv"] = torch.zeros_like(v)
    dq, dk, dv = _flash_attn_bwd(*laid(equal, q, k, v, out, d_out), sums, **where, deterministic=deterministic)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


flash_attention_backward.register_fake(fake_gradients)


def _gradients(ctx: Any, d_out: Tensor, _d_sums: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = flash_attention_backward(d_out, *ctx.saved_tensors, *ctx.how)
    return dq, dk, dv, None, None, None, None, None, None


flash_attention.register_autograd(_gradients, setup_context=keep)
