"""DDP's gradient buffers, as the GEMMs that write into them see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Incoming:
    """How gradients meet their buffers; the weights of one model share it as `weight.incoming`."""

    replace: bool = False
    """A gradient takes the place of what its buffer holds, where it would be added."""


def buffer_of(weight: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
    """Where a backward pass now writes a weight's gradient, and whether in the place of what is there.

    None: there is no buffer. Who asks must write: megatron-core's hook is told that the gradient is in its buffer.
    """
    incoming = getattr(weight, "incoming", None)
    if incoming is None:
        return None, True
    weight.grad_added_to_main_grad = True
    return weight.main_grad, incoming.replace


def accumulate(total: torch.Tensor, part: torch.Tensor, *, replace: bool) -> None:
    """total += part, in total's type; to `replace`: total = part."""
    if total.is_cuda:
        from dfmspec.trainer.ops.kernels import optimizer

        optimizer.accumulate(total, part, replace=replace)
    elif replace:
        total.copy_(part)
    else:
        total.add_(part)
