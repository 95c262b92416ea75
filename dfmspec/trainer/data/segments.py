"""Where the segments of a microbatch lie: which keys its queries meet, and which rows have one modulation.

Plain values between collating and the network, which neither owns. Shapes: s tokens of a rank, n segments, k chunks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core import parallel_state
from torch import Tensor

CHUNK = 32
"""Rows that one program of the backward kernel sums; a chunk never reaches over the end of a segment."""


@dataclass(frozen=True)
class Pairs:
    """Which keys each query meets: segment i of the queries those of segment i of the keys."""

    cu_seqlens_q: Tensor
    """[n + 1] int32 first query of each segment, and the end."""
    cu_seqlens_kv: Tensor
    """[n + 1] int32 first key of each segment, and the end."""
    lengths: tuple[tuple[int, int], ...]
    """(queries, keys) of each segment, on the host."""
    uniform: int
    """The number of segments, if all have the same queries and keys; otherwise 0."""
    max_seqlen_q: int
    max_seqlen_kv: int
    """Upper bounds of the lengths; few different values, because each costs the back end a plan."""
    keys: tuple[int, int]
    """First row and end of the keys that the queries here meet: a part of them under context parallelism."""


@dataclass(frozen=True)
class Rows:
    """Which segment each row belongs to, and the chunks of the backward pass; made once for a microbatch."""

    of_token: Tensor
    """[s] int32 segment of each row."""
    chunks: Tensor
    """[k, 3] int32 first row, end, segment."""
    starts: Tensor
    """[n + 1] int32 first chunk of each segment, and the end."""


@dataclass(frozen=True)
class Segments:
    """Where the segments of a microbatch lie; passed through TransformerBlock as its `packed_seq_params`."""

    self_attention: Pairs
    cross_attention: Pairs
    rows: Rows
    """The tokens of this rank."""


def rows_of(of_token: Tensor, segments: int) -> Rows:
    """The rows of tokens whose segments are `of_token` [s], ascending, on the CPU; k depends on s and n alone."""
    chunks, starts, row = [], [0], 0
    for segment, count in enumerate(torch.bincount(of_token, minlength=segments).tolist()):
        chunks += [(first, min(first + CHUNK, row + count), segment) for first in range(row, row + count, CHUNK)]
        starts.append(len(chunks))
        row += count
    chunks += [(0, 0, 0)] * (-(-len(of_token) // CHUNK) + segments - len(chunks))
    return Rows(of_token.int(), torch.tensor(chunks, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32))


def segments_of(counts: list[int], texts: list[int], cut: slice, of_token: Tensor, *, sequence_parallel: bool) -> Segments:
    """The segments of the rows `cut`: their queries, and for each the keys of its whole segment."""
    starts = [0, *accumulate(counts)]
    queries = [max(0, min(starts[i + 1], cut.stop) - max(starts[i], cut.start)) for i in range(len(counts))]
    if sequence_parallel:
        of_token = of_token.chunk(parallel_state.get_tensor_model_parallel_world_size())[parallel_state.get_tensor_model_parallel_rank()]
    return Segments(_pairs(queries, counts), _pairs(queries, texts), rows_of(of_token, len(counts)))


def _pairs(queries: list[int], keys: list[int]) -> Pairs:
    met = [key if query else 0 for query, key in zip(queries, keys, strict=True)]
    first = next(i for i, query in enumerate(queries) if query)
    begin = sum(keys[:first])

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    lengths = tuple(zip(queries, met, strict=True))
    return Pairs(
        starts(queries), starts(met), lengths, len(lengths) if len(set(lengths)) == 1 else 0, _power_of_two(max(queries)), _power_of_two(max(met)),
        (begin, begin + sum(met)),
    )  # fmt: skip


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()
