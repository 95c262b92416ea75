"""Averaged weights, in fp32: what is sampled from.

theta_ema <- d theta_ema + (1 - d) theta with d = min(ema_decay, (1 + i) / (10 + i)) at iteration i, so that a short run
is not dominated by its untrained start. Each rank averages the shards that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from dfmspec.trainer.network.model import DiT


class Ema:
    """The averaged copy of the parameters of this rank's model chunks."""

    def __init__(self, chunks: Sequence[DiT], decay: float, wrapped: Sequence[DistributedDataParallel] = ()) -> None:
        """`wrapped`: the same chunks in DDP, whose buffers, where it has them, hold all parameters in one piece."""
        self._chunks, self._decay = chunks, decay
        self._stream = torch.cuda.Stream() if next(chunks[0].parameters()).is_cuda else None
        self.weights: list[dict[str, Tensor]] = []
        self._pieces: list[tuple[Tensor, Tensor]] = []
        """(average, parameters), as few and as large as can be."""
        averages: dict[nn.Parameter, Tensor] = {}
        for buffer in (buffer for model in wrapped for buffer in model.buffers if buffer.param_data is not None):
            whole = buffer.param_data.float().clone()
            self._pieces.append((whole, buffer.param_data))
            averages |= {weight: whole[start:end].view(weight.shape) for weight, (start, end, _) in buffer.param_index_map.items()}
        for chunk in chunks:
            for weight in set(chunk.parameters()) - averages.keys():
                averages[weight] = weight.detach().float().clone()
                self._pieces.append((averages[weight], weight.detach()))
            self.weights.append({name: averages[weight] for name, weight in chunk.named_parameters()})

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the parameters after iteration `iteration` (counted from 1), on a GPU beside what follows: see `wait`."""
        share = 1 - min(self._decay, (1 + iteration) / (10 + iteration))
        if not self._stream:
            for average, weights in self._pieces:
                _take_in(average, weights, torch.tensor(share))
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for average, weights in self._pieces:
                _fused_take_in(average, weights, torch.full((), share, device=average.device))

    def wait(self) -> None:
        """Before the parameters are changed, or the averages read."""
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)

    def sharded_state_dict(self) -> ShardedStateDict:
        """The averages of each model chunk under the names `ema.<parameter>`, cut as the parameters are."""
        self.wait()
        sharded: ShardedStateDict = {}
        for index, (chunk, averages) in enumerate(zip(self._chunks, self.weights, strict=True)):
            mine = sharded[f"chunk{index}"] = {}
            for name, tensor in chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True}).items():
                if isinstance(tensor, ShardedTensor) and name in averages:
                    tensor.data, tensor.dtype = averages[name], torch.float32
                    tensor.key = f"ema.{tensor.key}"
                    mine[tensor.key] = tensor
        return sharded


def _take_in(average: Tensor, weights: Tensor, share: Tensor) -> None:
    average.lerp_(weights.float(), share)


_fused_take_in = torch.compile(_take_in)
"""Without an fp32 copy of the weights in between."""
