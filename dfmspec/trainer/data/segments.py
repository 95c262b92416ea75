"""Where the segments of a microbatch lie: which keys its queries meet, and which rows have one modulation.

Plain values between collating and the network, which neither owns. Shapes: s tokens of a rank, n segments, k chunks of
rows.
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
    chunks = []
    starts = [0]
    row = 0
    counts = torch.bincount(of_token, minlength=segments).tolist()
    for segment, count in enumerate(counts):
        end = row + count
        for first in range(row, end, CHUNK):
            chunks.append((first, min(first + CHUNK, end), segment))
        starts.append(len(chunks))
        row = end

    # Empty chunks, up to the most that there can be.
    most = -(-len(of_token) // CHUNK) + segments
    chunks += [(0, 0, 0)] * (most - len(chunks))
    return Rows(
        of_token.int(),
        torch.tensor(chunks, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
    )


def segments_of(
    counts: list[int],
    texts: list[int],
    cut: slice,
    of_token: Tensor,
    *,
    sequence_parallel: bool,
) -> Segments:
    """The segments of some rows of a sequence: their queries, and for each the keys of its whole segment.

    Args:
        counts: tokens of each segment of the whole sequence.
        texts: text tokens of each segment.
        cut: the rows of this context-parallel rank.
        of_token: [rows] the segment of each of these rows.
        sequence_parallel: a tensor-parallel rank modulates its part of these rows alone.
    """
    queries = _queries(counts, cut)
    if sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        of_token = of_token.chunk(size)[rank]
    return Segments(
        _pairs(queries, counts),
        _pairs(queries, texts),
        rows_of(of_token, len(counts)),
    )


def _queries(counts: list[int], cut: slice) -> list[int]:
    """How many tokens of each segment lie in the rows `cut`."""
    queries = []
    first = 0
    for count in counts:
        end = first + count
        inside = min(end, cut.stop) - max(first, cut.start)
        queries.append(max(0, inside))
        first = end
    return queries


def _pairs(queries: list[int], keys: list[int]) -> Pairs:
    """Pair the queries of each segment with its keys, all of them, where it has any queries."""
    met = [key if query else 0 for query, key in zip(queries, keys, strict=True)]
    lengths = tuple(zip(queries, met, strict=True))
    is_uniform = len(set(lengths)) == 1

    # The segments without queries are first and last ones, so the keys that are met follow on one another.
    first = next(i for i, query in enumerate(queries) if query)
    begin = sum(keys[:first])
    end = begin + sum(met)
    return Pairs(
        cu_seqlens_q=_starts(queries),
        cu_seqlens_kv=_starts(met),
        lengths=lengths,
        uniform=len(lengths) if is_uniform else 0,
        max_seqlen_q=_power_of_two(max(queries)),
        max_seqlen_kv=_power_of_two(max(met)),
        keys=(begin, end),
    )


def _starts(lengths: list[int]) -> Tensor:
    """[n + 1] int32 first row of each segment, and the end."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _power_of_two(length: int) -> int:
    """The power of two at or above a length."""
    return 1 << (length - 1).bit_length()
