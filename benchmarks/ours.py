"""Our own trainer under a benchmark: its `train_step` on microbatches that lie on the GPU.

With all that a run has: megatron-core's DDP and distributed optimizer, fp32 main weights, clipping, averaged weights.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core import parallel_state

from benchmarks.workloads import TEXT, TEXT_WIDTH, Shapes
from dfmspec.check.rules import check_spec
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.spec.experiment import Experiment
from dfmspec.targets import target_module
from dfmspec.trainer import setup, step
from dfmspec.trainer.data.microbatch import DrawnSample, microbatches
from dfmspec.trainer.noise import draw


def experiment(length: int, heads: int, overrides: list[str]) -> Experiment:
    """A complete configuration, through the same stages as a run."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    words = [
        "recipe=dit_xl",
        "data.source=mock",
        f"dataset.task_encoder_seq_length={length}",
        f"model.num_attention_heads={heads}",
        f"cluster.nproc_per_node={world}",
        "model.max_img_h=160",
        "model.max_img_w=160",
        f"train.global_batch_size={world}",
        "train.train_iters=1000",
        "data.resolution=512",
        *overrides,
    ]
    resolved = resolve_spec(load_spec(None, words))
    problems = [finding for finding in check_spec(resolved) if finding.severity.name == "ERROR"]
    if problems:
        raise SystemExit("\n".join(str(problem) for problem in problems))
    config = target_module("megatron_core").config(resolved.values)
    return Experiment.model_validate(config)


class Ours:
    """Training steps of our trainer on packs of samples of given latent shapes."""

    def __init__(self, length: int, heads: int, overrides: list[str]) -> None:
        # Build it as a run does.
        self.experiment = experiment(length, heads, overrides)
        if not parallel_state.model_parallel_is_initialized():
            setup.initialize_distributed(self.experiment)
        self.trainer = setup.build_trainer(self.experiment)
        self._wake_weights()
        self.trainer.optimizer.reload_model_params()
        self.trainer.graphs = step.graphed(self.trainer)

        # Counters, and the share of the work.
        self._iteration = 0
        self._ordinal = 0
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.share = self.replicas / torch.distributed.get_world_size()
        """The part of a replica's work that a GPU does."""
        torch.manual_seed(parallel_state.get_data_parallel_rank())

    def _wake_weights(self) -> None:
        """Draw the weights that start as zeros: a network of zeros computes on zeros."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for chunk in self.trainer.chunks:
                for weight in chunk.parameters():
                    if not weight.any():
                        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)

    def batch(self, shapes: Shapes) -> Any:
        """One pack: a latent of `frames x 2 height x 2 width` for each (frames, height, width) in patches."""
        samples = []
        for frames, height, width in shapes:
            shape = (16, frames, 2 * height, 2 * width)
            drawn = draw(
                shape,
                seed=1,
                split="train",
                stream=0,
                ordinal=self._ordinal,
                p_mean=0.0,
                p_std=1.0,
                dropout=0.2,
            )
            latent = torch.randn(shape)
            text = torch.randn(TEXT, TEXT_WIDTH)
            samples.append(DrawnSample(str(self._ordinal), latent, text, drawn))
            self._ordinal += 1
        return next(microbatches(self.experiment, iter([tuple(samples)])))

    def step(self, batch: Any) -> None:
        """A training step, on one microbatch."""
        self._iteration += 1
        self.outcome = step.train_step(self.trainer, iter([batch]), self._iteration)
