"""Pictures of a folder, as a viewer shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dfmspec.errors import DataError
from dfmspec.trainer.encoders.dct import DctCodec
from dfmspec.trainer.prepare.pictures import opened
from dfmspec.trainer.prepare.sources import folder_pictures

RAMP = np.linspace(0, 1, 64)[None, :] * np.ones((64, 1))
GREY = (RAMP * 255).astype(np.uint8)
RGB = np.stack([GREY, GREY.T, 255 - GREY], -1)
ALPHA = np.where(GREY > 100, 255, 0).astype(np.uint8)
ON_WHITE = np.where(ALPHA[..., None] > 0, RGB, 255)


def saved(path: Path, picture: Any, **options: Any) -> Path:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, **options)
    return path


def latent(path: Path) -> torch.Tensor:
    """The latent that `data prepare` writes of a picture."""
    return DctCodec().encode(torch.from_numpy(np.array(opened(path)))[None])


def difference(path: Path, pixels: np.ndarray) -> int:
    """The most by which a picture differs from some pixels."""
    return int(np.abs(np.asarray(opened(path)).astype(int) - pixels).max())


def test_the_latent_of_16_bits_is_that_of_8(tmp_path: Path) -> None:
    deep = saved(tmp_path / "16.png", (RAMP * 65535).astype(np.uint16))
    flat = saved(tmp_path / "8.png", GREY)

    assert Image.open(deep).mode.startswith("I;16")
    assert float((latent(deep) - latent(flat)).abs().max()) < 0.1


def test_a_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    shown = opened(saved(tmp_path / "a.png", (RAMP * 65535).astype(np.uint16), transparency=0))

    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((32, 0)) == (130, 130, 130)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused_by_the_files_name(kind: type, tmp_path: Path) -> None:
    picture = saved(tmp_path / "deep.png", (RAMP * 65535).astype(kind), format="TIFF")
    with pytest.raises(DataError, match=r"deep\.png has pixels of 32 bits .*save it with 8 or 16 bits"):
        opened(picture)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_exif_says(orientation: int, suffix: str, tmp_path: Path) -> None:
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB[::-1].transpose(1, 0, 2),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: RGB[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    stored = saved(tmp_path / f"a.{suffix}", RGB, exif=exif, quality=100, subsampling=0, lossless=True)

    assert difference(stored, turned) <= 6


MODES: dict[str, tuple[Callable[[Path], Path], np.ndarray]] = {
    "RGBA": (lambda folder: saved(folder / "a.png", np.dstack([RGB, ALPHA])), ON_WHITE),
    "RGBA of WebP": (lambda folder: saved(folder / "a.webp", np.dstack([RGB, ALPHA]), lossless=True), ON_WHITE),
    "LA": (
        lambda folder: saved(folder / "a.png", np.dstack([GREY, ALPHA])),
        np.where(ALPHA > 0, GREY, 255)[..., None],
    ),
    "P with a transparent colour": (
        lambda folder: saved(folder / "a.png", Image.fromarray(GREY).convert("P"), transparency=0),
        np.where(GREY > 0, GREY, 255)[..., None],
    ),
    "RGB with a transparent colour": (
        lambda folder: saved(folder / "a.png", RGB, transparency=tuple(RGB[0, 0].tolist())),
        np.where((RGB[0, 0] == RGB).all(-1, keepdims=True), 255, RGB),
    ),
    "1": (lambda folder: saved(folder / "a.png", GREY > 127), np.where(GREY > 127, 255, 0)[..., None]),
    "CMYK": (lambda folder: saved(folder / "a.jpg", Image.fromarray(RGB).convert("CMYK"), quality=100), RGB),
    "MPO of a camera": (
        lambda folder: saved(
            folder / "a.jpg", RGB, format="MPO", quality=100, save_all=True, append_images=[Image.fromarray(255 - RGB)]
        ),
        RGB,
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_shown_on_white(mode: str, tmp_path: Path) -> None:
    save, pixels = MODES[mode]

    assert difference(save(tmp_path), pixels) <= 6


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_picture_that_moves_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(255 - RGB), Image.fromarray(RGB)]
    picture = saved(tmp_path / f"moves.{suffix}", RGB, save_all=True, append_images=frames)
    with pytest.raises(DataError, match=rf"moves\.{suffix} has 3 frames"):
        opened(picture)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.9])
def test_a_picture_that_breaks_off_is_refused_by_name(left: float, suffix: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    picture = saved(tmp_path / f"cut.{suffix}", noise)
    data = picture.read_bytes()
    picture.write_bytes(data[: int(left * len(data))])
    with pytest.raises(DataError, match=rf"cut\.{suffix} cannot be read: .*take it out of the folder"):
        opened(picture)


def test_two_pictures_that_would_be_one_sample_are_both_named(tmp_path: Path) -> None:
    saved(tmp_path / "a.b.png", RGB)
    saved(tmp_path / "a_b.png", RGB)
    with pytest.raises(DataError, match=r"a\.b\.png and .*a_b\.png would both be sample a_b_png; rename one"):
        list(folder_pictures(tmp_path, 64))
