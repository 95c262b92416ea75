"""Where pictures come from: dfmspec's own butterflies, or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dfmspec.errors import DataError
from dfmspec.trainer.prepare.butterflies import butterfly, draw
from dfmspec.trainer.prepare.pictures import opened


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows."""

    key: str
    image: Image.Image
    caption: str


def embedded_pictures(resolution: int, num_samples: int, seed: int) -> Iterator[Picture]:
    """dfmspec's own butterflies: the first `num_samples` of the series `seed`."""
    for index in range(num_samples):
        subject = butterfly(seed, index)
        image = draw(subject, resolution)
        yield Picture(f"butterfly-{index:07d}", image, subject.caption)


_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def folder_pictures(folder: Path, resolution: int) -> Iterator[Picture]:
    """A folder's pictures, cropped square; the caption is the .txt file of the same name, else the file's name.

    Raises:
        DataError: the folder has no pictures, one cannot be read, or two would have one name.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise DataError(f"{folder} has no .png, .jpg or .webp files")
    named: dict[str, Path] = {}
    for path in paths:
        key = path.name.replace(".", "_")
        if key in named:
            raise DataError(f"pictures {named[key]} and {path} would both be sample {key}; rename one")
        named[key] = path
        square = _square(opened(path)).resize((resolution, resolution), Image.Resampling.LANCZOS)
        yield Picture(key, square, _caption(path))


def _caption(path: Path) -> str:
    """What a picture's .txt file says, or the words of its own name."""
    text = path.with_suffix(".txt")
    if text.exists():
        return text.read_text(errors="replace").strip()
    return path.stem.replace("_", " ").replace("-", " ")


def _square(image: Image.Image) -> Image.Image:
    """The middle of a picture, as large as its shorter side."""
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
