"""The encoders that make a sample's latent and text embedding, as far as they are known without their modules.

A new one is a module of dfmspec/trainer/encoders and a line in its table here.
"""

from __future__ import annotations

from typing import NamedTuple


class PictureEncoder(NamedTuple):
    """What makes the latent of pictures."""

    module: str
    """The class, as `package.module:Class`."""
    extra: str
    """The extra of this package that it needs."""
    channels: int
    """Channels of a latent."""
    compression: int
    """Pixels on a side of one latent pixel."""


class TextEncoder(NamedTuple):
    """What makes the embedding of a text."""

    module: str
    """The class, as `package.module:Class`."""
    extra: str
    """The extra of this package that it needs."""
    width: int
    """Width of a token."""


PICTURE_ENCODERS = {
    "dct": PictureEncoder("dfmspec.trainer.encoders.dct:DctCodec", extra="train", channels=16, compression=8),
}
TEXT_ENCODERS = {
    "ngram": TextEncoder("dfmspec.trainer.encoders.ngram:NgramTextEncoder", extra="train", width=1024),
}
EMBEDDED_PICTURES = PICTURE_ENCODERS["dct"]
EMBEDDED_TEXTS = TEXT_ENCODERS["ngram"]
"""What encodes the embedded data, and the pictures of a folder: neither has weights to download."""
