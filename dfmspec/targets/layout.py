"""Which rank does what, without torch, in Megatron's order: tp-cp-dp-pp.

Source: megatron/core/parallel_state.py, order "tp-cp-ep-dp-pp".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

MODEL_PARALLEL_KEYS = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
)
"""The keys that say over how many ranks one copy of the model is spread: TP, PP, CP."""
LAYOUT_KEYS = (
    "cluster.nnodes",
    "cluster.nproc_per_node",
    *MODEL_PARALLEL_KEYS,
)
"""The keys that say how many ranks there are, and how they are arranged."""


class Layout(NamedTuple):
    """How the ranks of a run are arranged."""

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model; 0 when the world size is no multiple of the model-parallel size."""
        whole, rest = divmod(self.world_size, self.model_parallel_size)
        if rest:
            return 0
        return whole


def layout_of(values: Mapping[str, Any]) -> Layout:
    """The arrangement that a configuration asks for."""
    nnodes, nproc, tp, pp, cp = (values[key] for key in LAYOUT_KEYS)
    return Layout(nnodes * nproc, tp, pp, cp)


class RankPlace(NamedTuple):
    """Where a rank is, and its coordinate in each group."""

    rank: int
    node: int
    gpu: int
    tp: int
    cp: int
    dp: int
    pp: int


def places(layout: Layout, nproc_per_node: int) -> Iterator[RankPlace]:
    """Every rank of a run in Megatron's order: TP changes fastest, then CP, then DP, then PP."""
    tp = layout.tensor_model_parallel_size
    cp = layout.context_parallel_size
    dp = layout.data_parallel_size
    for rank in range(layout.world_size):
        yield RankPlace(
            rank=rank,
            node=rank // nproc_per_node,
            gpu=rank % nproc_per_node,
            tp=rank % tp,
            cp=rank // tp % cp,
            dp=rank // (tp * cp) % dp,
            pp=rank // (tp * cp * dp),
        )


def crossing(layout: Layout, nproc_per_node: int) -> list[str]:
    """The kinds of groups of which at least one reaches over several nodes."""
    if layout.world_size <= nproc_per_node:
        return []
    # Megatron's order: the ranks of a TP group are neighbours, those of a PP group farthest apart.
    sizes = {
        "TP": layout.tensor_model_parallel_size,
        "CP": layout.context_parallel_size,
        "DP": layout.data_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
    }
    found = []
    stride = 1
    for name, size in sizes.items():
        # A group spans stride x size ranks; all groups stay on their nodes where whole ones fill a node.
        if size > 1 and nproc_per_node % (stride * size) != 0:
            found.append(name)
        stride *= size
    return found


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, in order."""
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def nearest_multiples(number: int, of: int) -> list[int]:
    """The multiples of `of` next below and next above `number`, the positive ones."""
    below = number // of * of
    return [value for value in (below, below + of) if value > 0]
