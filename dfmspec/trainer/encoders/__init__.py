"""Encoders: pictures to latents and back, captions to embeddings. `data/encoders.py` has their tables.

The embedded ones (`dct`, `ngram`) need no weights and have the shapes of Cosmos-0.1-Tokenizer-CV4x8x8 and T5-11B.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from dfmspec.data import encoders
from dfmspec.errors import PreflightError


class PictureEncoder(Protocol):
    """Frames to a latent, and its way back."""

    def encode(self, frames: Tensor) -> Tensor:
        """[T, H, W, 3] uint8 -> [C, T, H/c, W/c] fp32 of unit variance, C channels and c its compression."""

    def decode(self, latent: Tensor) -> Tensor:
        """[C, T, h, w] -> [T, c h, c w, 3] uint8."""


class TextEncoder(Protocol):
    """A caption to an embedding."""

    def encode(self, caption: str) -> Tensor:
        """A caption -> [L, width] fp32."""


def picture_encoder(entry: encoders.PictureEncoder) -> PictureEncoder:
    """The encoder of a line of PICTURE_ENCODERS, ready for use.

    Raises:
        PreflightError: a package of its extra is missing.
    """
    made: PictureEncoder = _made(entry.module, entry.extra)
    return made


def text_encoder(entry: encoders.TextEncoder) -> TextEncoder:
    """The encoder of a line of TEXT_ENCODERS, ready for use.

    Raises:
        PreflightError: a package of its extra is missing.
    """
    made: TextEncoder = _made(entry.module, entry.extra)
    return made


def _made(place: str, extra: str) -> Any:
    module, _, name = place.partition(":")
    try:
        encoder = getattr(import_module(module), name)
    except ImportError as error:
        raise PreflightError(f"{name} needs {error.name}; run: pip install 'dfmspec[{extra}]'") from error
    return encoder()
