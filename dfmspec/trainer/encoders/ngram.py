"""The embedded text encoder: each word is the sum of pseudo-random vectors of its letters' n-grams.

Words that share letters share directions, so "orange" and "oranges" are near; the position of a word in its caption is
one more vector. Nothing is learnt, and nothing is downloaded.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch
from torch import Tensor

from dfmspec.trainer.noise import counter_seed

WIDTH = 1024
LENGTH = 12
"""Tokens of every caption; shorter ones are followed by zeros, longer ones are cut."""


@lru_cache(maxsize=65536)
def _direction(gram: str) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(counter_seed("ngram", gram)))


@lru_cache(maxsize=4096)
def _word(word: str) -> Tensor:
    """A word as a vector of unit variance."""
    padded = f"<{word}>"
    grams = [padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1)] or [padded]
    return torch.stack([_direction(gram) for gram in grams]).sum(dim=0) / len(grams) ** 0.5


class NgramTextEncoder:
    """Hashed n-gram projection to the width of T5-11B."""

    def encode(self, caption: str) -> Tensor:
        """A caption -> [12, 1024] fp32."""
        words = re.findall(r"\w+", caption.lower())[:LENGTH]
        tokens = torch.zeros(LENGTH, WIDTH)
        for position, word in enumerate(words):
            tokens[position] = (_word(word) + 0.3 * _direction(f"position {position}")) / (1 + 0.3**2) ** 0.5
        return tokens
