"""The embedded text encoder: each word is the sum of pseudo-random vectors of its letters' n-grams.

Words that share letters share directions, so "orange" and "oranges" are near; the position of a word in its caption is
one more vector. Nothing is learnt, and nothing is downloaded.
"""

from __future__ import annotations

import re
from functools import lru_cache

import torch
from torch import Tensor

from dfmspec.data.encoders import EMBEDDED_TEXTS
from dfmspec.trainer.noise import counter_seed

WIDTH = EMBEDDED_TEXTS.width
LENGTH = 12
"""Tokens of every caption; shorter ones are followed by zeros, longer ones are cut."""


@lru_cache(maxsize=65536)
def _direction(gram: str) -> Tensor:
    """[WIDTH] unit Gaussian values, a function of a text alone."""
    seed = counter_seed("ngram", gram)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, generator=generator)


@lru_cache(maxsize=4096)
def _word(word: str) -> Tensor:
    """[WIDTH] a word as a vector of unit variance."""
    grams = _grams(f"<{word}>")
    directions = torch.stack([_direction(gram) for gram in grams])
    return directions.sum(dim=0) / len(grams) ** 0.5


def _grams(text: str) -> list[str]:
    """Three, four and five letters of a text that follow on one another; the whole text if it is shorter."""
    grams = []
    for n in (3, 4, 5):
        places = range(len(text) - n + 1)
        grams += [text[i : i + n] for i in places]
    return grams or [text]


class NgramTextEncoder:
    """Hashed n-gram projection to the width of T5-11B."""

    def encode(self, caption: str) -> Tensor:
        """A caption -> [12, 1024] fp32."""
        words = re.findall(r"\w+", caption.lower())[:LENGTH]
        tokens = torch.zeros(LENGTH, WIDTH)
        for position, word in enumerate(words):
            place = _direction(f"position {position}")
            mixed = _word(word) + 0.3 * place
            tokens[position] = mixed / (1 + 0.3**2) ** 0.5
        return tokens
