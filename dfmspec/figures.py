"""Figures as people read them: counts with the right singular, sizes and operations in a unit that fits."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 node`, or `1,024 nodes`.

    Args:
        number: how many.
        one: of what, in the singular.
        many: the plural, where it is not the singular and an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def size(number: float) -> str:
    """A number of bytes: `12.1 GB`."""
    return with_prefix(number, "B")


def with_prefix(number: float, unit: str) -> str:
    """A number in thousands of its unit, with three digits: `214 TFLOP`."""
    power = 0
    while abs(number) >= 999.5 and power < len(_PREFIXES) - 1:
        number /= 1000
        power += 1
    return f"{number:.3g} {_PREFIXES[power]}{unit}"
