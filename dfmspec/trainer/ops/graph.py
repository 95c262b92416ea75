"""Forward and backward of a microbatch as a CUDA graph: one launch where there are some thousand.

A graph is made when a microbatch of its shape comes for the second time, so what comes once costs nothing. What is
fixed in a graph is what a shape is made of: the sizes of the tensors, and what the blocks know of the segments on the
host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from dfmspec.trainer.data.microbatch import Microbatch
from dfmspec.trainer.data.segments import Pairs

_MOST = 32
"""Graphs that are kept, two of a shape where gradients are both replaced and added.

Each holds its own buffers, and one memory pool serves all.
"""
_Kind = tuple[Hashable, tuple[Hashable, ...]]
"""The shape of a microbatch, and what else the work depends on: what a graph is for."""
_Captured = tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor, list[Tensor]]
"""A graph, its inputs, its report, and what must live as long as it does."""


class Graphs:
    """Runs `work(batch, tokens)`, from a graph where there is one; `work` leaves gradients and returns a report."""

    def __init__(self, work: Callable[[Microbatch, Tensor], Tensor], *, lengths_matter: bool) -> None:
        """`lengths_matter`: what is launched depends on the segments' lengths.

        Otherwise it depends only on where the device reads that they lie.
        """
        self._work = work
        self._lengths_matter = lengths_matter
        self._seen: set[_Kind] = set()
        self._graphs: dict[_Kind, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Microbatch, tokens: Tensor, *how: Hashable) -> Tensor:
        """The report of this microbatch; `how`: what else the work depends on, and a graph holds."""
        kind = (self._shape(batch), how)
        if kind not in self._graphs:
            if len(self._graphs) == _MOST:
                return self._work(batch, tokens)
            if kind not in self._seen:
                self._seen.add(kind)
                return self._work(batch, tokens)
            self._graphs[kind] = self._capture(batch, tokens)
        graph, inputs, report, _ = self._graphs[kind]
        for mine, theirs in zip(inputs, [*_tensors(batch), tokens], strict=True):
            mine.copy_(theirs)
        graph.replay()
        return report.clone()

    def _capture(self, batch: Microbatch, tokens: Tensor) -> _Captured:
        """Record, with the microbatch's own tensors as the graph's inputs.

        Kept with it: megatron-core's buffers for gathered activations, which it replaces when it needs larger ones.
        """
        tokens = tokens.clone()
        graph = torch.cuda.CUDAGraph()
        # Errors of this thread alone: another one makes the next microbatches meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            report = self._work(batch, tokens)
        inputs = [*_tensors(batch), tokens]
        kept = list(parallel_state.get_global_memory_buffer().buffer.values())
        return graph, inputs, report, kept

    def _shape(self, batch: Microbatch) -> Hashable:
        """What a graph of a microbatch holds: sizes of tensors, and what the blocks know of its segments."""
        segments = batch.segments
        known = (self._known(segments.self_attention), self._known(segments.cross_attention))
        sizes = tuple(tensor.shape for tensor in _tensors(batch))
        return known, sizes

    def _known(self, pairs: Pairs) -> Hashable:
        lengths = pairs.lengths if self._lengths_matter else ()
        return pairs.uniform, pairs.max_seqlen_q, pairs.max_seqlen_kv, pairs.keys, lengths


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a microbatch, those of the dataclasses inside it too, in the order of the fields."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
