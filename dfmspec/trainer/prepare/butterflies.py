"""Procedural butterflies: pictures with captions that describe them, drawn from a seed.

What varies is what the caption says: the colour of the wings, their shape, their pattern and the background; and, unsaid,
the pose. Drawn at four times the resolution and reduced, so that 64 px has smooth edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

COLOURS = {
    "orange": (238, 126, 30), "blue": (52, 106, 214), "yellow": (246, 206, 48), "white": (240, 240, 236),
    "red": (206, 44, 44), "purple": (134, 70, 184), "green": (88, 168, 70), "pink": (240, 130, 176),
}  # fmt: skip
BACKGROUNDS = {"sky": (168, 208, 236), "leafy": (112, 150, 84), "sandy": (222, 200, 158), "dusky": (84, 78, 112)}
PATTERNS = ("plain", "spotted", "striped", "dark-edged", "eyespot")

# Outlines of the right wings, in units of half the picture, body at x = 0, y downwards.
_FORE = {
    "round": [(0.02, -0.10), (0.22, -0.52), (0.55, -0.70), (0.80, -0.52), (0.76, -0.18), (0.45, 0.02), (0.02, 0.06)],
    "pointed": [(0.02, -0.10), (0.30, -0.50), (0.66, -0.78), (0.95, -0.80), (0.80, -0.36), (0.48, 0.00), (0.02, 0.06)],
    "swallow-tailed": [(0.02, -0.10), (0.26, -0.54), (0.62, -0.76), (0.90, -0.66), (0.76, -0.28), (0.44, 0.00), (0.02, 0.06)],
}
_HIND = {
    "round": [(0.02, 0.00), (0.40, 0.00), (0.64, 0.16), (0.60, 0.46), (0.36, 0.60), (0.14, 0.44), (0.02, 0.20)],
    "pointed": [(0.02, 0.00), (0.42, -0.02), (0.66, 0.14), (0.64, 0.44), (0.40, 0.66), (0.16, 0.42), (0.02, 0.20)],
    "swallow-tailed": [(0.02, 0.00), (0.40, -0.02), (0.62, 0.14), (0.60, 0.40), (0.50, 0.56), (0.46, 0.88), (0.38, 0.90),
                       (0.36, 0.60), (0.16, 0.44), (0.02, 0.20)],
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
        return f"{self.colour} butterfly with {self.shape} {self.pattern} wings on a {self.background} background"


def butterfly(seed: int, index: int) -> Butterfly:
    """Butterfly number `index` of the series `seed`."""
    rng = np.random.default_rng((seed, index))
    pick = lambda names: names[int(rng.integers(len(names)))]  # noqa: E731
    return Butterfly(
        colour=pick(tuple(COLOURS)), shape=pick(SHAPES), pattern=pick(PATTERNS), background=pick(tuple(BACKGROUNDS)),
        turn=float(rng.uniform(-20, 20)), size=float(rng.uniform(0.80, 0.94)), fold=float(rng.uniform(0.85, 1.0)),
        seed=int(rng.integers(2**31)),
    )  # fmt: skip


def draw(subject: Butterfly, resolution: int) -> Image.Image:
    """The picture: RGB, resolution x resolution."""
    side = 4 * resolution
    rng = np.random.default_rng(subject.seed)
    wings, ink = _wings(subject, side)
    body = _body(side, subject.size)
    picture = _background(subject, side, rng)
    figure = Image.new("RGBA", (side, side))
    figure.paste(ink, mask=wings)
    figure.alpha_composite(body)
    figure = figure.rotate(subject.turn, resample=Image.Resampling.BILINEAR)
    picture.paste(figure, mask=figure.getchannel("A"))
    return picture.resize((resolution, resolution), Image.Resampling.BOX)


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(int(min(255, value * factor)) for value in colour)  # type: ignore[return-value]


def _background(subject: Butterfly, side: int, rng: np.random.Generator) -> Image.Image:
    """A vertical gradient with a few soft blots."""
    base = BACKGROUNDS[subject.background]
    ramp = np.linspace(1.12, 0.88, side)[:, None, None] * np.array(base)
    picture = Image.fromarray(np.broadcast_to(ramp.clip(0, 255), (side, side, 3)).astype(np.uint8))
    blots = Image.new("L", (side // 8, side // 8))
    pen = ImageDraw.Draw(blots)
    for _ in range(6):
        x, y, r = rng.uniform(0, side / 8), rng.uniform(0, side / 8), rng.uniform(side / 64, side / 24)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=90)
    blots = blots.filter(ImageFilter.GaussianBlur(side / 256)).resize((side, side), Image.Resampling.BILINEAR)
    picture.paste(_shade(base, 0.8), mask=blots)
    return picture


def _spline(points: list[tuple[float, float]], steps: int = 10) -> np.ndarray:
    """A closed Catmull-Rom curve through the points."""
    p = np.array(points)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    curves = []
    for i in range(len(p)):
        a, b, c, d = p[i - 1], p[i], p[(i + 1) % len(p)], p[(i + 2) % len(p)]
        curves.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return np.concatenate(curves)


def _wings(subject: Butterfly, side: int) -> tuple[Image.Image, Image.Image]:
    """Mask of the four wings, and what is painted through it."""
    colour = COLOURS[subject.colour]
    mask, ink = Image.new("L", (side, side)), Image.new("RGB", (side, side), colour)
    pen = ImageDraw.Draw(ink)
    for outline, tint in ((_HIND[subject.shape], 0.86), (_FORE[subject.shape], 1.0)):
        for mirror in (1, -1):
            curve = _spline(outline) * (mirror * subject.fold, 1.0)
            wing = Image.new("L", (side, side))
            corners = _place(curve, side, subject.size)
            ImageDraw.Draw(wing).polygon(corners, fill=255)
            ink.paste(_shade(colour, tint), mask=wing)
            _pattern(pen, ink, wing, subject, curve, tint, side)
            pen.line([*corners, corners[0]], fill=(38, 28, 26), width=max(2, side // 90), joint="curve")
            mask = ImageChops.lighter(mask, wing)
    return mask, ink


def _place(curve: np.ndarray, side: int, size: float) -> list[tuple[float, float]]:
    """From units of half the picture to pixels."""
    return [(float(x), float(y)) for x, y in (curve * size + 1) * side / 2]


def _pattern(pen: ImageDraw.ImageDraw, ink: Image.Image, wing: Image.Image, subject: Butterfly, curve: np.ndarray, tint: float, side: int) -> None:
    """Paint the wing's pattern, inside the wing."""
    dark, light = (44, 32, 30), _shade(COLOURS[subject.colour], 1.5) if subject.colour != "white" else (150, 150, 170)
    layer, middle = Image.new("L", (side, side)), curve.mean(axis=0)
    brush, paint = ImageDraw.Draw(layer), dark
    span = subject.size * side / 2

    def disc(centre: np.ndarray, radius: float, value: int = 255) -> None:
        (x, y), r = _place(centre[None], side, subject.size)[0], radius * span
        brush.ellipse((x - r, y - r, x + r, y + r), fill=value)

    if subject.pattern == "spotted":
        for share in np.linspace(0.15, 0.75, 5):
            disc(middle + 0.62 * (curve[int(share * len(curve))] - middle), 0.055)
    elif subject.pattern == "striped":
        root = curve[0]
        for share in np.linspace(0.2, 0.8, 5):
            ends = _place(np.stack([root, curve[int(share * len(curve))]]), side, subject.size)
            brush.line(ends, fill=255, width=max(2, int(0.035 * span)))
    elif subject.pattern == "dark-edged":
        layer = ImageChops.invert(Image.new("L", (side, side)))
        inner = _place(middle + 0.72 * (curve - middle), side, subject.size)
        ImageDraw.Draw(layer).polygon(inner, fill=0)
    elif subject.pattern == "eyespot":
        disc(middle, 0.17)
    ink.paste(paint, mask=ImageChops.multiply(layer, wing))
    if subject.pattern == "eyespot":
        layer = Image.new("L", (side, side))
        brush = ImageDraw.Draw(layer)
        disc(middle, 0.10)
        ink.paste(_shade(light, tint), mask=ImageChops.multiply(layer, wing))


def _body(side: int, size: float) -> Image.Image:
    """Body, head and antennae."""
    layer = Image.new("RGBA", (side, side))
    pen, ink, span = ImageDraw.Draw(layer), (40, 30, 28, 255), size * side / 2
    at = lambda x, y: (side / 2 + x * span, side / 2 + y * span)  # noqa: E731
    pen.ellipse((*at(-0.055, -0.20), *at(0.055, 0.44)), fill=ink)
    pen.ellipse((*at(-0.065, -0.31), *at(0.065, -0.18)), fill=ink)
    for mirror in (1, -1):
        curve = [at(mirror * 0.26 * t**1.5, -0.28 - 0.34 * t) for t in np.linspace(0, 1, 12)]
        pen.line(curve, fill=ink, width=max(2, side // 110), joint="curve")
        x, y = curve[-1]
        r = side / 90
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    return layer
