"""Averaged weights, in fp32: what is sampled from.

theta_ema <- d theta_ema + (1 - d) theta with d = min(ema_decay, (1 + i) / (10 + i)) at iteration i, so that a short run
is not dominated by its untrained start. Each rank averages the shards that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from dfmspec.trainer.network.model import DiT


class Ema:
    """The averaged copy of the parameters of this rank's model chunks."""

    def __init__(self, chunks: Sequence[DiT], decay: float, wrapped: Sequence[DistributedDataParallel] = ()) -> None:
        """`wrapped`: the same chunks in DDP, whose buffers, where it has them, hold all parameters in one piece."""
        self._chunks = chunks
        self._decay = decay
        on_gpu = next(chunks[0].parameters()).is_cuda
        self._stream = torch.cuda.Stream() if on_gpu else None
        self.weights: list[dict[str, Tensor]] = []
        self._pieces: list[tuple[Tensor, Tensor]] = []
        """(average, parameters), as few and as large as can be."""

        # Whole buffers, then what lies in none.
        averages: dict[nn.Parameter, Tensor] = {}
        for model in wrapped:
            for buffer in model.buffers:
                averages |= self._of_buffer(buffer)
        for chunk in chunks:
            for weight in chunk.parameters():
                if weight not in averages:
                    average = weight.detach().float().clone()
                    averages[weight] = average
                    self._pieces.append((average, weight.detach()))
            named = {name: averages[weight] for name, weight in chunk.named_parameters()}
            self.weights.append(named)

    def _of_buffer(self, buffer: Any) -> dict[nn.Parameter, Tensor]:
        """The averages of the parameters that lie in one of DDP's buffers, as views of a single piece."""
        if buffer.param_data is None:
            return {}
        whole = buffer.param_data.float().clone()
        self._pieces.append((whole, buffer.param_data))
        averages = {}
        for weight, (start, end, _) in buffer.param_index_map.items():
            flat = whole[start:end]
            averages[weight] = flat.view(weight.shape)
        return averages

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the parameters after iteration `iteration` (counted from 1).

        On a GPU this runs beside what follows: see `wait`.
        """
        decay = min(self._decay, (1 + iteration) / (10 + iteration))
        share = 1 - decay
        if self._stream is None:
            for average, weights in self._pieces:
                _take_in(average, weights, torch.tensor(share))
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for average, weights in self._pieces:
                on_device = torch.full((), share, device=average.device)
                _fused_take_in(average, weights, on_device)

    def wait(self) -> None:
        """Let a GPU end the last update; called before the parameters are changed, or the averages read."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def sharded_state_dict(self) -> ShardedStateDict:
        """The averages of each model chunk under the names `ema.<parameter>`, cut as the parameters are."""
        self.wait()
        sharded: ShardedStateDict = {}
        chunks = zip(self._chunks, self.weights, strict=True)
        for index, (chunk, averages) in enumerate(chunks):
            mine: ShardedStateDict = {}
            parameters = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
            for name, tensor in parameters.items():
                if isinstance(tensor, ShardedTensor) and name in averages:
                    tensor.data = averages[name]
                    tensor.dtype = torch.float32
                    tensor.key = f"ema.{tensor.key}"
                    mine[tensor.key] = tensor
            sharded[f"chunk{index}"] = mine
        return sharded


def _take_in(average: Tensor, weights: Tensor, share: Tensor) -> None:
    average.lerp_(weights.float(), share)


_fused_take_in = torch.compile(_take_in)
"""Without an fp32 copy of the weights in between."""
