"""Averaged weights, in fp32: what is sampled from.

theta_ema <- d theta_ema + (1 - d) theta with d = min(ema_decay, (1 + i) / (10 + i)) at iteration i, so that a short run
is not dominated by its untrained start. Each rank averages the shards that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from torch import Tensor

from dfmspec.trainer.model import DiT


class Ema:
    """The averaged copy of the parameters of this rank's model chunks."""

    def __init__(self, chunks: Sequence[DiT], decay: float) -> None:
        self._chunks, self._decay = chunks, decay
        self.weights: list[dict[str, Tensor]] = [
            {name: weight.detach().float().clone() for name, weight in chunk.named_parameters()} for chunk in chunks
        ]

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the parameters after iteration `iteration` (counted from 1)."""
        decay = min(self._decay, (1 + iteration) / (10 + iteration))
        for chunk, averages in zip(self._chunks, self.weights, strict=True):
            parameters = [weight.float() for weight in chunk.parameters()]
            torch._foreach_lerp_(list(averages.values()), parameters, 1 - decay)

    def sharded_state_dict(self) -> ShardedStateDict:
        """The averages under the names `ema.<parameter>`, cut as the parameters are."""
        sharded: ShardedStateDict = {}
        for chunk, averages in zip(self._chunks, self.weights, strict=True):
            for name, tensor in chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True}).items():
                if isinstance(tensor, ShardedTensor) and name in averages:
                    tensor.data, tensor.dtype = averages[name], torch.float32
                    tensor.key = f"ema.{tensor.key}"
                    sharded[tensor.key] = tensor
        return sharded
