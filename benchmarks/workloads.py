"""What the benchmarks train on: the network's shape, the samples of each workload, and what they cost in operations."""

from __future__ import annotations

from itertools import pairwise

import torch

PEAK = 989e12
"""Dense bf16 of an H100 or H200, operations a second."""

# DiT-XL.

LAYERS = 28
WIDTH = 1152
HEADS = 16
TEXT = 512
"""Tokens of a text."""
TEXT_WIDTH = 1024
LORA = 256
"""The rank of adaLN-LoRA."""
PATCH = 64
"""Values of a patch."""

# Samples.

Shape = tuple[int, int, int]
"""A sample's frames, height and width, in patches."""
Shapes = list[Shape]
"""The samples of a pack."""
WORKLOADS: dict[str, list[Shapes]] = {
    "W1": [[(1, 32, 32)] * 8],
    "W2": [[(1, 32, 32)] * 32],
    "W3": [[(8, 32, 32)]],
    "L32": [[(8, 64, 64)]],
    "L128": [[(32, 64, 64)]],
}
"""The packs of each workload; W4 is mixed()."""
PACK = 16384
"""Tokens of a pack of W4."""


def tokens_of(shapes: Shapes) -> int:
    """Tokens of all samples together."""
    return sum(f * h * w for f, h, w in shapes)


def mixed(count: int) -> Shapes:
    """`count` square pictures of 16 to 64 patches a side, 256 to 4,096 tokens, each side as likely."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(16, 65, (count,), generator=generator).tolist()
    return [(1, side, side) for side in sides]


def packs_of(shapes: Shapes) -> list[Shapes]:
    """Our packs, each of PACK tokens at most; whole ones only.

    Each sample goes into the first of 16 open packs that holds it, as in the task encoder's buffer.
    """
    still_open: list[Shapes] = []
    for shape in shapes:
        pack = _first_that_holds(still_open, shape)
        if pack is None:
            pack = []
            still_open.append(pack)
        pack.append(shape)
    return still_open[:-16]


def _first_that_holds(packs: list[Shapes], shape: Shape) -> Shapes | None:
    for pack in packs:
        if tokens_of(pack) + tokens_of([shape]) <= PACK:
            return pack
    return None


def padded_batches(shapes: Shapes, bounds: list[int]) -> list[tuple[int, int, int]]:
    """The peer's batches of about PACK tokens: (pictures, tokens each, tokens that are no padding).

    Each picture is padded to the bound of its bucket.
    """
    batches = []
    for low, high in pairwise([0, *bounds]):
        inside = [shape for shape in shapes if low < tokens_of([shape]) <= high]
        size = max(1, PACK // high)
        # Whole batches only.
        for start in range(0, len(inside) - size + 1, size):
            useful = tokens_of(inside[start : start + size])
            batches.append((size, high, useful))
    return batches


def flops(shapes: Shapes) -> float:
    """Model operations of one training step on useful tokens alone: the backward pass is twice the forward one."""
    lengths = [f * h * w for f, h, w in shapes]
    samples = len(lengths)
    tokens = sum(lengths)
    texts = TEXT * samples

    # A layer: self-attention's projections and the MLP, cross-attention's, both attentions, modulation.
    weights_of_tokens = 24 * WIDTH**2 + 4 * WIDTH**2
    layer = tokens * weights_of_tokens
    layer += 4 * texts * TEXT_WIDTH * WIDTH
    layer += 4 * WIDTH * sum(length * length for length in lengths)
    layer += 4 * WIDTH * sum(length * TEXT for length in lengths)
    layer += 2 * samples * (1 + 9) * WIDTH * LORA

    # Patches in and out, and the embedding of the noise level.
    once = 4 * tokens * WIDTH * PATCH + 4 * samples * WIDTH**2
    return 3 * (LAYERS * layer + once)
