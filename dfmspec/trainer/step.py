"""One iteration: forward and backward over the microbatches, the optimizer, the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dfmspec.errors import TrainingError
from dfmspec.trainer.pack import Microbatch, Pack, collate, loss_sum
from dfmspec.trainer.setup import Trainer


def microbatches(trainer: Trainer, packs: Iterator[Pack]) -> Iterator[Microbatch]:
    """Collate packs into microbatches, as they are asked for."""
    size = trainer.experiment.train.micro_batch_size
    while True:
        yield collate(list(islice(packs, size)), trainer.experiment)


def forward_backward(trainer: Trainer, packs: Iterator[Pack], **options: bool) -> float:
    """One global batch through the model; leaves the gradients, and returns the mean loss over its tokens on every rank.

    `options` are the schedule's own: `forward_only`, `force_all_reduce`.
    """
    experiment = trainer.experiment
    train, model = experiment.train, experiment.model
    num_microbatches = train.global_batch_size // (train.micro_batch_size * parallel_state.get_data_parallel_world_size())
    batches = microbatches(trainer, packs)
    if len(trainer.model) > 1:  # with VPP, every chunk of this rank goes through the same microbatches
        fixed = list(islice(batches, num_microbatches))
        data: Any = [iter(fixed) for _ in trainer.model]
    else:
        data = batches
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, sigma_data=experiment.diffusion.sigma_data),
        data_iterator=data,
        model=trainer.model,
        num_microbatches=num_microbatches,
        seq_length=train.micro_batch_size * model.seq_length,  # a microbatch is one sequence, [s, 1, D]
        micro_batch_size=1,
        **options,
    )
    total = sum(reports) if reports else torch.zeros(2, dtype=torch.float64)  # only the last pipeline stage has reports
    return mean_loss(total.to("cuda"))


def _forward_step(batches: Iterator[Microbatch], model: Any, *, sigma_data: float) -> tuple[Tensor, Any]:
    batch = next(batches)

    def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = loss_sum(output.squeeze(1), batch, sigma_data)
        count = torch.tensor(batch.num_tokens, dtype=torch.int, device="cuda")
        report = torch.stack([total.detach().double(), count.double()])  # a copy: the schedule scales `total` in place
        return total, count, report

    return model(batch), loss


def mean_loss(total: Tensor) -> float:
    """(sum of the loss, tokens) of this rank -> the mean over the run's tokens, the same on every rank."""
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total[0] / total[1])


def train_step(trainer: Trainer, packs: Iterator[Pack], iteration: int) -> tuple[float, float]:
    """Iteration number `iteration` (counted from 1): (loss, gradient norm before clipping)."""
    for chunk in trainer.model:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    loss = forward_backward(trainer, packs)
    updated, grad_norm, _ = trainer.optimizer.step()
    if not updated or not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise TrainingError(f"iteration {iteration}: loss {loss} and gradient norm {grad_norm} must be finite; lower optimizer.lr, or look at the data")
    trainer.scheduler.step(increment=1)
    trainer.ema.update(iteration)
    return loss, float(grad_norm)


@torch.no_grad()
def evaluate(trainer: Trainer, packs: Iterator[Pack], iterations: int) -> float:
    """Mean loss over `iterations` global batches of the evaluation split."""
    for chunk in trainer.model:
        chunk.eval()
    return sum(forward_backward(trainer, packs, forward_only=True) for _ in range(iterations)) / iterations
