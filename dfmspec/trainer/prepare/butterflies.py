"""Procedural butterflies: pictures with captions that describe them, drawn from a seed.

What varies is what the caption says: the colour of the wings, their shape, their pattern and the background; and,
unsaid, the pose. Drawn at four times the resolution and reduced, so that 64 px has smooth edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
Point = tuple[float, float]
Points = np.ndarray
"""[n, 2] points (x, y), in units of half the picture, body at x = 0, y downwards."""

Mask: TypeAlias = Image.Image
"""Grey levels: 255 where something is."""

COLOURS: dict[str, Colour] = {
    "orange": (238, 126, 30),
    "blue": (52, 106, 214),
    "yellow": (246, 206, 48),
    "white": (240, 240, 236),
    "red": (206, 44, 44),
    "purple": (134, 70, 184),
    "green": (88, 168, 70),
    "pink": (240, 130, 176),
}
BACKGROUNDS: dict[str, Colour] = {
    "sky": (168, 208, 236),
    "leafy": (112, 150, 84),
    "sandy": (222, 200, 158),
    "dusky": (84, 78, 112),
}
PATTERNS = ("plain", "spotted", "striped", "dark-edged", "eyespot")
_DARK: Colour = (44, 32, 30)
"""Paint of the patterns."""
_OUTLINE: Colour = (38, 28, 26)
"""Paint of the lines around the wings."""

# Outlines of the right wings, in units of half the picture, body at x = 0, y downwards.
_FORE = {
    "round": [
        (0.02, -0.10), (0.22, -0.52), (0.55, -0.70), (0.80, -0.52),
        (0.76, -0.18), (0.45, 0.02), (0.02, 0.06),
    ],
    "pointed": [
        (0.02, -0.10), (0.30, -0.50), (0.66, -0.78), (0.95, -0.80),
        (0.80, -0.36), (0.48, 0.00), (0.02, 0.06),
    ],
    "swallow-tailed": [
        (0.02, -0.10), (0.26, -0.54), (0.62, -0.76), (0.90, -0.66),
        (0.76, -0.28), (0.44, 0.00), (0.02, 0.06),
    ],
}  # fmt: skip
_HIND = {
    "round": [
        (0.02, 0.00), (0.40, 0.00), (0.64, 0.16), (0.60, 0.46),
        (0.36, 0.60), (0.14, 0.44), (0.02, 0.20),
    ],
    "pointed": [
        (0.02, 0.00), (0.42, -0.02), (0.66, 0.14), (0.64, 0.44),
        (0.40, 0.66), (0.16, 0.42), (0.02, 0.20),
    ],
    "swallow-tailed": [
        (0.02, 0.00), (0.40, -0.02), (0.62, 0.14), (0.60, 0.40), (0.50, 0.56),
        (0.46, 0.88), (0.38, 0.90), (0.36, 0.60), (0.16, 0.44), (0.02, 0.20),
    ],
}  # fmt: skip
SHAPES = tuple(_FORE)


@dataclass(frozen=True, slots=True)
class Butterfly:
    """What one picture shows."""

    colour: str
    shape: str
    pattern: str
    background: str
    turn: float
    """Degrees of rotation."""
    size: float
    """Span, as a share of the picture."""
    fold: float
    """Width of the wings: 1 is flat, less is folded."""
    seed: int

    @property
    def caption(self) -> str:
        """What the picture is said to show."""
        return f"{self.colour} butterfly with {self.shape} {self.pattern} wings on a {self.background} background"


def butterfly(seed: int, index: int) -> Butterfly:
    """Butterfly number `index` of the series `seed`."""
    rng = np.random.default_rng((seed, index))
    return Butterfly(
        colour=_pick(rng, tuple(COLOURS)),
        shape=_pick(rng, SHAPES),
        pattern=_pick(rng, PATTERNS),
        background=_pick(rng, tuple(BACKGROUNDS)),
        turn=float(rng.uniform(-20, 20)),
        size=float(rng.uniform(0.80, 0.94)),
        fold=float(rng.uniform(0.85, 1.0)),
        seed=int(rng.integers(2**31)),
    )


def _pick(rng: np.random.Generator, names: Sequence[str]) -> str:
    number = int(rng.integers(len(names)))
    return names[number]


def draw(subject: Butterfly, resolution: int) -> Image.Image:
    """The picture: RGB, resolution x resolution."""
    side = 4 * resolution
    rng = np.random.default_rng(subject.seed)
    picture = _background(subject, side, rng)
    wings, ink = _wings(subject, side)

    # The figure alone, so that it can be turned.
    figure = Image.new("RGBA", (side, side))
    figure.paste(ink, mask=wings)
    figure.alpha_composite(_body(side, subject.size))
    figure = figure.rotate(subject.turn, resample=Image.Resampling.BILINEAR)

    picture.paste(figure, mask=figure.getchannel("A"))
    return picture.resize((resolution, resolution), Image.Resampling.BOX)


def _shade(colour: Colour, factor: float) -> Colour:
    """A colour made darker, or, by a factor above 1, lighter."""
    shaded = [min(255, value * factor) for value in colour]
    red, green, blue = map(int, shaded)
    return red, green, blue


def _blank(side: int) -> Mask:
    """A mask in which nothing is set yet."""
    return Image.new("L", (side, side))


def _background(subject: Butterfly, side: int, rng: np.random.Generator) -> Image.Image:
    """A vertical gradient with a few soft blots."""
    # The gradient.
    base = BACKGROUNDS[subject.background]
    brightness = np.linspace(1.12, 0.88, side)
    ramp = brightness[:, None, None] * np.array(base)
    shape = (side, side, 3)
    values = np.broadcast_to(ramp.clip(0, 255), shape)
    pixels = values.astype(np.uint8)
    picture = Image.fromarray(pixels)

    # The blots, at an eighth of the size.
    blots = _blank(side // 8)
    pen = ImageDraw.Draw(blots)
    for _ in range(6):
        x = rng.uniform(0, side / 8)
        y = rng.uniform(0, side / 8)
        r = rng.uniform(side / 64, side / 24)
        pen.ellipse(_around(x, y, r), fill=90)
    blots = blots.filter(ImageFilter.GaussianBlur(side / 256))
    blots = blots.resize((side, side), Image.Resampling.BILINEAR)
    picture.paste(_shade(base, 0.8), mask=blots)
    return picture


def _spline(points: Sequence[Point], steps: int = 10) -> Points:
    """A closed Catmull-Rom curve through the points."""
    p = np.array(points)
    n = len(p)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    curves = []
    for i in range(n):
        a = p[i - 1]
        b = p[i]
        c = p[(i + 1) % n]
        d = p[(i + 2) % n]
        linear = (c - a) * t
        square = (2 * a - 5 * b + 4 * c - d) * t**2
        cubic = (3 * b - a - 3 * c + d) * t**3
        curves.append(0.5 * (2 * b + linear + square + cubic))
    return np.concatenate(curves)


def _wings(subject: Butterfly, side: int) -> tuple[Image.Image, Image.Image]:
    """Mask of the four wings, and what is painted through it."""
    colour = COLOURS[subject.colour]
    mask = _blank(side)
    ink = Image.new("RGB", (side, side), colour)
    pen = ImageDraw.Draw(ink)
    line_width = max(2, side // 90)
    tinted = (
        (_HIND[subject.shape], 0.86),
        (_FORE[subject.shape], 1.0),
    )
    for outline, tint in tinted:
        for mirror in (1, -1):
            curve = _spline(outline) * (mirror * subject.fold, 1.0)
            corners = _place(curve, side, subject.size)
            wing = _polygon(corners, side)
            ink.paste(_shade(colour, tint), mask=wing)
            _paint_pattern(ink, wing, subject, curve, tint)
            pen.line([*corners, corners[0]], fill=_OUTLINE, width=line_width, joint="curve")
            mask = ImageChops.lighter(mask, wing)
    return mask, ink


def _place(curve: Points, side: int, size: float) -> list[Point]:
    """From units of half the picture to pixels."""
    pixels = (curve * size + 1) * side / 2
    places = []
    for x, y in pixels:
        places.append((float(x), float(y)))
    return places


def _polygon(corners: Sequence[Point], side: int) -> Mask:
    """A mask of what lies inside some corners."""
    mask = _blank(side)
    pen = ImageDraw.Draw(mask)
    pen.polygon(corners, fill=255)
    return mask


def _paint_pattern(
    ink: Image.Image,
    wing: Mask,
    subject: Butterfly,
    curve: Points,
    tint: float,
) -> None:
    """Paint the pattern of one wing, inside the wing."""
    painters = {
        "spotted": _spots,
        "striped": _stripes,
        "dark-edged": _dark_edge,
        "eyespot": _eye,
    }
    if subject.pattern not in painters:
        return

    # The pattern, in dark paint.
    side = ink.width
    layer = painters[subject.pattern](curve, side, subject.size)
    inside = ImageChops.multiply(layer, wing)
    ink.paste(_DARK, mask=inside)
    if subject.pattern != "eyespot":
        return

    # The eye has a light pupil.
    light = (150, 150, 170)
    if subject.colour != "white":
        light = _shade(COLOURS[subject.colour], 1.5)
    pupil = _blank(side)
    _disc(pupil, _middle(curve), 0.10, subject.size)
    inside = ImageChops.multiply(pupil, wing)
    ink.paste(_shade(light, tint), mask=inside)


def _spots(curve: Points, side: int, size: float) -> Mask:
    """Mask of a row of spots along the edge."""
    layer = _blank(side)
    middle = _middle(curve)
    for share in np.linspace(0.15, 0.75, 5):
        on_edge = _at(curve, share)
        inside = middle + 0.62 * (on_edge - middle)
        _disc(layer, inside, 0.055, size)
    return layer


def _stripes(curve: Points, side: int, size: float) -> Mask:
    """Mask of stripes from the wing's root to its edge."""
    layer = _blank(side)
    brush = ImageDraw.Draw(layer)
    width = max(2, int(0.035 * _span(side, size)))
    for share in np.linspace(0.2, 0.8, 5):
        on_edge = _at(curve, share)
        stripe = np.stack([curve[0], on_edge])
        ends = _place(stripe, side, size)
        brush.line(ends, fill=255, width=width)
    return layer


def _dark_edge(curve: Points, side: int, size: float) -> Mask:
    """Mask of all but the middle of the wing."""
    middle = _middle(curve)
    inside = middle + 0.72 * (curve - middle)
    inner = _place(inside, side, size)
    return ImageChops.invert(_polygon(inner, side))


def _eye(curve: Points, side: int, size: float) -> Mask:
    """Mask of one large spot."""
    layer = _blank(side)
    _disc(layer, _middle(curve), 0.17, size)
    return layer


def _at(curve: Points, share: float) -> Points:
    """[2] the point at a share of the way around."""
    number = int(share * len(curve))
    return curve[number]


def _middle(curve: Points) -> Points:
    """[2] the mean of the points."""
    return curve.mean(axis=0)


def _span(side: int, size: float) -> float:
    """Pixels of half the butterfly's span."""
    return size * side / 2


def _disc(layer: Mask, centre: Points, radius: float, size: float) -> None:
    """Set a disc in a mask, around `centre` [2]; `radius` as a share of half the span."""
    side = layer.width
    x, y = _place(centre[None], side, size)[0]
    r = radius * _span(side, size)
    pen = ImageDraw.Draw(layer)
    pen.ellipse(_around(x, y, r), fill=255)


def _around(x: float, y: float, r: float) -> tuple[float, float, float, float]:
    """The corners of the square around a circle: left, top, right, bottom."""
    return x - r, y - r, x + r, y + r


def _body(side: int, size: float) -> Image.Image:
    """Body, head and antennae."""
    layer = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(layer)
    ink = (40, 30, 28, 255)
    span = _span(side, size)

    def at(x: float, y: float) -> Point:
        return side / 2 + x * span, side / 2 + y * span

    # Body and head.
    pen.ellipse((*at(-0.055, -0.20), *at(0.055, 0.44)), fill=ink)
    pen.ellipse((*at(-0.065, -0.31), *at(0.065, -0.18)), fill=ink)

    # Antennae, each with a knob at its end.
    r = side / 90
    width = max(2, side // 110)
    for mirror in (1, -1):
        curve = []
        for t in np.linspace(0, 1, 12):
            x = mirror * 0.26 * t**1.5
            y = -0.28 - 0.34 * t
            curve.append(at(x, y))
        pen.line(curve, fill=ink, width=width, joint="curve")
        x, y = curve[-1]
        pen.ellipse(_around(x, y, r), fill=ink)
    return layer
