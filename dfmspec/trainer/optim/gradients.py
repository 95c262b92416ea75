"""How gradients come into DDP's buffers, and the gradients of what every pipeline stage holds a copy of.

A module that `sums_itself` writes its weights' gradients where they are summed, in its backward pass; all others' are
added by our kernel. Either way megatron-core's hook finds nothing to add.

The noise embedding stands on each pipeline stage (and in each model chunk of one), and each copy meets only its own
layers' share of the gradient. megatron-core offers `has_cond_embedder` for this, but sums after the data-parallel
reduce-scatter, when a rank holds the reduced values of *its* buffer range only, and those ranges need not be the same
on every stage. Summing over the stages first and over the replicas then is right wherever they lie.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from dfmspec.trainer.ops.buffers import Incoming, accumulate


def into_buffers(model: list[Any]) -> Incoming:
    """Let each gradient be in its buffer before megatron-core's hook would add it there.

    A backward pass raises RuntimeError where a module that `sums_itself` has not: the hook would then add to what an
    earlier iteration left.
    """
    incoming = Incoming()

    def add(weight: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        accumulate(weight.main_grad, gradient, replace=incoming.replace)
        weight.grad_added_to_main_grad = True

    def was_added(weight: torch.nn.Parameter, _: torch.Tensor) -> None:
        if not weight.grad_added_to_main_grad:
            raise RuntimeError("what makes a weight's gradient did not find the buffer that it is summed in")

    for chunk in model:
        for module in chunk.modules():
            sums_itself = getattr(module, "sums_itself", False)
            hook = was_added if sums_itself else add
            for weight in module.parameters(recurse=False):
                weight.incoming = incoming
                weight.register_hook(partial(hook, weight))
    return incoming


def start(chunk: Any, *, cleared: bool) -> None:
    """Make a chunk's buffers ready for an iteration's first gradient, as megatron-core's zero_grad_buffer does.

    Not `cleared`: what they hold stays, for the first gradients will replace it.
    """
    if cleared:
        chunk.zero_grad_buffer()
        return
    for weight in chunk.params_with_grad:
        weight.grad_added_to_main_grad = False
    for group in chunk.bucket_groups:
        group.reset()


def finalize(model: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """megatron-core's finalize_model_grads, after the sum over pipeline stages.

    `num_tokens` is left alone: the loss was divided by the tokens of the global batch before, which spares a pass over
    all gradients.
    """
    sum_over_stages(model)
    finalize_model_grads(model, None, **kwargs)


def sum_over_stages(model: list[Any]) -> None:
    """Give every copy of a parameter that all pipeline stages share the sum of the copies' gradients."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return

    # The copies on this rank, by name.
    copies: dict[str, list[torch.Tensor]] = {}
    for chunk in model:
        for name, weight in chunk.named_parameters():
            if getattr(weight, "pipeline_parallel", False):
                copies.setdefault(name, []).append(weight.main_grad)

    # One sum for all of them.
    total = torch.cat([sum(grads).flatten() for grads in copies.values()])
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    sizes = [grads[0].numel() for grads in copies.values()]
    for grads, piece in zip(copies.values(), total.split(sizes), strict=True):
        for grad in grads:
            grad.copy_(piece.view_as(grad))
