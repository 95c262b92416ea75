"""A picture's file, as a viewer shows it: 8 bits in RGB, the right way up, on white where it is transparent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dfmspec.errors import DataError


def opened(path: Path) -> Image.Image:
    """The picture of a file, in RGB.

    16 bits are scaled to 8, and EXIF's orientation is applied. Colour profiles are not: CMYK becomes RGB by arithmetic.

    Raises:
        DataError: it cannot be read, moves, or has pixels of 32 bits, whose white nobody knows.
    """
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            # A camera's MPO file has previews behind its picture.
            if frames > 1 and image.format != "MPO":
                raise DataError(f"picture {path} has {frames} frames; give the one that is meant as a file of its own")
            image.load()
            return _in_rgb(ImageOps.exif_transpose(image), path)
    except DataError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise DataError(f"picture {path} cannot be read: {error}; mend it, or take it out of the folder") from error


def _in_rgb(image: Image.Image, path: Path) -> Image.Image:
    """A picture of any mode, in RGB."""
    if image.mode in ("I", "F"):
        raise DataError(
            f"picture {path} has pixels of 32 bits (mode {image.mode}); save it with 8 or 16 bits a channel"
        )
    if image.mode.startswith("I;16"):
        return _of_16_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = image.convert("RGBA")
    white = Image.new("RGBA", shown.size, "white")
    return Image.alpha_composite(white, shown).convert("RGB")


def _of_16_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, which Pillow's own conversion would cut off at 255."""
    grey = np.asarray(image)
    pixels = np.rint(grey / 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        pixels[grey == transparent] = 255
    return Image.fromarray(pixels).convert("RGB")
