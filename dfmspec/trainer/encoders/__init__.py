"""Codecs and text encoders: pictures to latents and back, captions to embeddings.

The embedded ones (`dct`, `ngram`) need no weights and have the shapes of Cosmos-0.1-Tokenizer-CV4x8x8 and T5-11B.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Between pictures and latents of unit variance, 8 pixels to a latent pixel."""

    def encode(self, frames: Tensor) -> Tensor:
        """[T, H, W, 3] uint8 -> [16, T, H/8, W/8] fp32."""

    def decode(self, latent: Tensor) -> Tensor:
        """[16, T, H/8, W/8] -> [T, H, W, 3] uint8."""


class TextEncoder(Protocol):
    """Captions to what cross-attention reads."""

    def encode(self, caption: str) -> Tensor:
        """A caption -> [L, 1024] fp32."""
