"""One iteration: forward and backward over the microbatches, the optimizer, the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from dfmspec.errors import TrainingError
from dfmspec.trainer.clock import Mark
from dfmspec.trainer.data.microbatch import Microbatch, loss_sum, num_microbatches
from dfmspec.trainer.network.attention import backend_of
from dfmspec.trainer.ops.graph import Graphs
from dfmspec.trainer.optim import gradients
from dfmspec.trainer.setup import Trainer

_Loss = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the output to the share of the loss [], the tokens [] and the report []."""


def forward_backward(trainer: Trainer, batches: Iterator[Microbatch], **options: bool) -> tuple[Tensor, Tensor]:
    """One global batch through the model; leaves the gradients.

    Returns on every rank the global batch's mean loss [] and tokens [], padding left out. `options` are the schedule's
    own: `forward_only`, `force_all_reduce`.
    """
    # The microbatches, and how many tokens all ranks have.
    ready = list(islice(batches, num_microbatches(trainer.experiment)))
    tokens = torch.stack([batch.num_tokens for batch in ready]).sum().float()
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(tokens, group=replicas)

    # Forward and backward, over all microbatches.
    if trainer.graphs and not options.get("forward_only"):
        reports = _replayed(trainer, trainer.graphs, ready, tokens)
        gradients.finalize(trainer.model, **options)
    else:
        reports = _scheduled(trainer, ready, tokens, **options)

    # The loss.
    loss = _total(reports)
    dist.all_reduce(loss, group=replicas)
    dist.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
    return loss, tokens


def _total(reports: list[Tensor]) -> Tensor:
    """The sum of the microbatches' reports, []; only the last pipeline stage has any."""
    if not reports:
        return torch.zeros((), dtype=torch.float64, device="cuda")
    return sum(reports)


def _scheduled(trainer: Trainer, ready: list[Microbatch], tokens: Tensor, **options: bool) -> list[Tensor]:
    """Microbatches through megatron-core's schedule."""
    # With VPP, every chunk of this rank goes through the same microbatches.
    chunks = len(trainer.model)
    batches = [iter(ready) for _ in range(chunks)]
    experiment = trainer.experiment
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, experiment.diffusion.sigma_data, tokens),
        data_iterator=batches if chunks > 1 else batches[0],
        model=trainer.model,
        num_microbatches=len(ready),
        # A microbatch is one sequence, [s, 1, D].
        seq_length=experiment.train.micro_batch_size * experiment.model.seq_length,
        micro_batch_size=1,
        **options,
    )


def _forward_step(sigma_data: float, tokens: Tensor, batches: Iterator[Microbatch], model: Any) -> tuple[Tensor, _Loss]:
    """The output for the next microbatch, and what makes of it loss, tokens and report, as the schedules want it."""
    batch = next(batches)

    def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Its share of the mean over all tokens of the global batch.
        share = loss_sum(output.squeeze(1), batch, sigma_data) / tokens
        # The report is a copy: the schedule changes `share` in place.
        return share, batch.num_tokens.clone(), share.detach().double().clone()

    return model(batch), loss


def _replayed(trainer: Trainer, graphs: Graphs, ready: list[Microbatch], tokens: Tensor) -> list[Tensor]:
    """Microbatches through their graphs; the first one's gradients replace those of the iteration before."""
    reports = []
    try:
        for index, batch in enumerate(ready):
            trainer.incoming.replace = index == 0
            reports.append(graphs(batch, tokens, trainer.incoming.replace))
    finally:
        trainer.incoming.replace = False
    return reports


def graphed(trainer: Trainer) -> Graphs | None:
    """Forward and backward of one microbatch, replayed where shapes repeat.

    None where a graph could not hold what happens in them: other ranks' layers, gradients that are reduced as they
    come, a second forward pass.
    """
    experiment = trainer.experiment
    model = experiment.model
    sigma_data = experiment.diffusion.sigma_data
    wanted = experiment.cluster.device == "cuda" and model.cuda_graph_impl == "local"
    has_stages = model.pipeline_model_parallel_size > 1
    if not wanted or has_stages or experiment.ddp.overlap_grad_reduce or model.recompute_granularity:
        return None

    def work(batch: Microbatch, tokens: Tensor) -> Tensor:
        output, loss = _forward_step(sigma_data, tokens, iter([batch]), trainer.model[0])
        share, _, report = loss(output)
        share.backward()
        return report

    backend = backend_of(trainer.chunks[0].config)
    return Graphs(work, lengths_matter=backend == "torch")


class Outcome:
    """What an iteration gave.

    Reading it waits for this iteration alone: its values are on their way to the host when the next one is given to the
    GPU.
    """

    def __init__(self, loss: Tensor, grad_norm: Tensor, tokens: Tensor, device: str) -> None:
        """loss [], grad_norm [] before clipping, and tokens [] of the global batch without its padding."""
        values = torch.stack([value.to(loss.device, torch.float64) for value in (loss, grad_norm, tokens)])
        self._values = torch.empty(3, dtype=torch.float64, device="cpu", pin_memory=device == "cuda")
        self._values.copy_(values, non_blocking=True)
        self.done = Mark(device)

    def values(self, iteration: int) -> tuple[float, float, float]:
        """Loss, gradient norm before clipping, and tokens.

        Raises:
            TrainingError: one is not finite; the fused update has left the weights as they were.
        """
        self.done.wait()
        loss, grad_norm, tokens = self._values.tolist()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise TrainingError(
                f"iteration {iteration}: loss {loss} and gradient norm {grad_norm} must be finite; "
                "lower optimizer.lr, or look at the data"
            )
        return loss, grad_norm, tokens


def train_step(trainer: Trainer, batches: Iterator[Microbatch], iteration: int) -> Outcome:
    """Iteration number `iteration` (counted from 1): gradients of a global batch, new weights, their averages."""
    # Gradients.
    for chunk in trainer.model:
        if not chunk.training:
            chunk.train()
        gradients.start(chunk, cleared=trainer.graphs is None)
    loss, tokens = forward_backward(trainer, batches)

    # Weights, and their averages.
    trainer.ema.wait()
    grad_norm = trainer.update()
    trainer.scheduler.step(increment=1)
    trainer.ema.update(iteration)
    return Outcome(loss, grad_norm, tokens, trainer.experiment.cluster.device)


@torch.no_grad()
def evaluate(
    trainer: Trainer, batches: Iterator[Microbatch], iterations: int, stopped: Callable[[], int]
) -> float | None:
    """Mean loss over `iterations` global batches of the evaluation split, the same on every rank.

    None when it was `stopped` before the last.
    """
    for chunk in trainer.model:
        chunk.eval()
    total = 0.0
    for _ in range(iterations):
        if stopped():
            return None
        loss, _ = forward_backward(trainer, batches, forward_only=True)
        total += float(loss)
    return total / iterations
