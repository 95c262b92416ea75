"""Rank arithmetic, without torch: Megatron's tp-cp-dp-pp order (megatron/core/parallel_state.py, order "tp-cp-ep-dp-pp")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

LAYOUT_KEYS = (
    "cluster.nnodes",
    "cluster.nproc_per_node",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
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
        return 0 if rest else whole


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
    tp, cp, dp = layout.tensor_model_parallel_size, layout.context_parallel_size, layout.data_parallel_size
    for rank in range(layout.world_size):
        yield RankPlace(rank, rank // nproc_per_node, rank % nproc_per_node, rank % tp, rank // tp % cp, rank // (tp * cp) % dp, rank // (tp * cp * dp))


def crossing(layout: Layout, nproc_per_node: int) -> list[str]:
    """The kinds of groups of which at least one reaches over several nodes."""
    found, stride = [], 1
    for name, size in (
        ("TP", layout.tensor_model_parallel_size), ("CP", layout.context_parallel_size),
        ("DP", layout.data_parallel_size), ("PP", layout.pipeline_model_parallel_size),
    ):  # fmt: skip
        if size > 1 and layout.world_size > nproc_per_node and (nproc_per_node % (stride * size)):
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
