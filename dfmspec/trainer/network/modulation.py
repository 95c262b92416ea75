"""adaLN over packed segments, fused: the gate of a residual branch, layer norm without weights, scale and shift.

Every token reads the modulation of its own segment inside the kernel; nothing of [s, D] is made to hold it. The
backward pass sums over tokens in two steps of fixed order (rows of a chunk, chunks of a segment), so it is the same
every time. Without a GPU the same functions are plain PyTorch. Shapes: s tokens, n segments, D hidden size, k chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfmspec.trainer.data.segments import Rows
from dfmspec.trainer.ops.amax import WithAmax, with_amax, with_gradient_amax


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Rows, eps: float, *, wants_amax: bool
) -> tuple[Tensor, WithAmax]:
    """[s, D] -> x as it is, and [s, D] layer norm of it without weights, then the segment's scale and shift [n, D].

    Who goes on with this x spares the backward pass an addition: both gradients meet in the kernel.
    """
    if x.is_cuda:
        x, z, amax = _Modulate.apply(x, shift, scale, rows.of_token, rows.chunks, rows.starts, eps, wants_amax)
        return x, WithAmax(z, amax if wants_amax else None)
    normed = F.layer_norm(x, (x.size(-1),), eps=eps)
    z = normed * (1 + scale[rows.of_token]) + shift[rows.of_token]
    return x, with_amax(z, wanted=wants_amax)


def gated(x: Tensor, y: WithAmax, gate: Tensor, rows: Rows) -> Tensor:
    """[s, D], [s, D] -> [s, D]: x plus y times the segment's gate [n, D]."""
    if x.is_cuda:
        return _kernel(x, y, gate, None, None, rows, 0.0, wants_amax=False)[0]
    return x + gate[rows.of_token] * with_gradient_amax(y)


def gated_modulate(
    x: Tensor,
    y: WithAmax,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Rows,
    eps: float,
    *,
    wants_amax: bool,
) -> tuple[Tensor, WithAmax]:
    """Gate and modulation in one pass: the end of one residual branch and the beginning of the next.

    x [s, D] plus y [s, D] times the segment's gate [n, D]; and [s, D] layer norm of that without weights, then the
    segment's scale and shift [n, D].
    """
    if x.is_cuda:
        return _kernel(x, y, gate, shift, scale, rows, eps, wants_amax=wants_amax)
    x = gated(x, y, gate, rows)
    return modulate(x, shift, scale, rows, eps, wants_amax=wants_amax)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        of_token: Tensor,
        chunks: Tensor,
        starts: Tensor,
        eps: float,
        wants_amax: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from dfmspec.trainer.ops.kernels.adaln import adaln

        _, z, mean, rstd, amax = adaln(x, None, None, shift, scale, of_token, chunks, starts, eps, None, wants_amax)
        ctx.save_for_backward(x, scale, chunks, starts, mean, rstd)
        ctx.mark_non_differentiable(amax)
        return x, z, amax

    @staticmethod
    def backward(ctx: Any, dx_out: Tensor, dz: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from dfmspec.trainer.ops.kernels.adaln import adaln_backward

        x, scale, chunks, starts, mean, rstd = ctx.saved_tensors
        dx, _, sums, _ = adaln_backward(x, None, None, scale, chunks, starts, mean, rstd, dx_out, dz, False)
        dshift, dscale = sums.to(x.dtype).unbind(1)
        return dx, dshift, dscale, None, None, None, None, None


def _kernel(
    x: Tensor,
    y: WithAmax,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    rows: Rows,
    eps: float,
    *,
    wants_amax: bool,
) -> tuple[Tensor, WithAmax]:
    """The kernel with a gate; without shift and scale, z is empty."""
    from dfmspec.trainer.ops.kernels.adaln import adaln

    x_out, z, _mean, _rstd, amax = adaln(
        x,
        y.values,
        gate,
        shift,
        scale,
        rows.of_token,
        rows.chunks,
        rows.starts,
        eps,
        y.amax,
        wants_amax,
    )
    return x_out, WithAmax(z, amax if wants_amax else None)
