"""Where pictures come from: dfmspec's own butterflies, or a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dfmspec.errors import DataError
from dfmspec.trainer.prepare.butterflies import butterfly, draw


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows."""

    key: str
    image: Image.Image
    caption: str


def embedded_pictures(resolution: int, num_samples: int, seed: int) -> Iterator[Picture]:
    """dfmspec's own butterflies."""
    for index in range(num_samples):
        subject = butterfly(seed, index)
        yield Picture(f"butterfly-{index:07d}", draw(subject, resolution), subject.caption)


def folder_pictures(folder: Path, resolution: int) -> Iterator[Picture]:
    """A folder's pictures, cropped square; the caption is the .txt file of the same name, else the file's name."""
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not names:
        raise DataError(f"{folder} has no .png, .jpg or .webp files")
    for path in names:
        text = path.with_suffix(".txt")
        caption = text.read_text(errors="replace").strip() if text.exists() else path.stem.replace("_", " ").replace("-", " ")
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise DataError(f"picture {path} cannot be read: {error}") from error
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        yield Picture(path.name.replace(".", "_"), square.resize((resolution, resolution), Image.Resampling.LANCZOS), caption)
