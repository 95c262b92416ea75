"""What can be said of a sample's tensors without torch: shapes, formats and plain statistics."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from dfmspec.data.samples import Part, axes_fault, infinite_fault
from dfmspec.data.tensor_files import BF16, F16, F32, F64, Format, Values, read_values

_INFINITE = 2.0**128 - 2.0**103
"""From this on a number is infinite as fp32, in which the trainer takes what a file has as fp64."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """What can be said of a tensor: its shape, its number format, and its values taken together."""

    shape: tuple[int, ...]
    format: str
    finite: bool
    """Whether all values are, as fp32."""
    largest: float
    """The largest absolute value."""
    mean: float
    mean_square: float

    def fault(self, part: Part) -> str:
        """What keeps it from being that part of a sample; empty: nothing."""
        wrong = axes_fault(self.shape, part)
        if not wrong and not self.finite:
            wrong = infinite_fault(part)
        return wrong


def read_tensor(data: bytes, part: str, *, statistics: bool = True) -> Tensor:
    """The tensor of a file, `part` being its suffix: ".pth" or ".pickle".

    Without `statistics` only its shape, its format and whether it is finite are right, which takes no time.

    Raises:
        DataError: there is none that can be trained on, or the file wants to run code.
    """
    values = read_values(data, part)
    shape = values.shape
    name = values.format.name
    if not _is_finite(values):
        return Tensor(shape, name, finite=False, largest=math.inf, mean=0.0, mean_square=0.0)
    if not statistics:
        return Tensor(shape, name, finite=True, largest=0.0, mean=0.0, mean_square=0.0)
    numbers = _distinct(values, _floats(values.format, values.data))
    count = len(numbers)
    return Tensor(
        shape,
        name,
        finite=True,
        largest=max(map(abs, numbers)),
        mean=math.fsum(numbers) / count,
        mean_square=math.fsum(number * number for number in numbers) / count,
    )


_SUSPECTS = {BF16: (0x7F,), F32: (0x7F,), F16: (0x7C, 0x7D, 0x7E, 0x7F), F64: tuple(range(0x47, 0x80))}
"""What the highest byte of a number that is infinite as fp32, or none, may be without its sign."""


def _is_finite(values: Values) -> bool:
    """Whether all numbers that a window shows are finite as fp32."""
    # Hardly any has such a byte, and to look for one is quick.
    highest = values.data[values.format.width - 1 :: values.format.width]
    if not any(byte in highest or byte | 0x80 in highest for byte in _SUSPECTS[values.format]):
        return True
    numbers = _distinct(values, _floats(values.format, values.data))
    return all(-_INFINITE < number < _INFINITE for number in numbers)  # which no NaN is


def _distinct(values: Values, numbers: Sequence[float]) -> Sequence[float]:
    """The numbers that a window shows, in any order; what an axis repeats counts once."""
    axes = [axis for axis in zip(values.stride, values.shape, strict=True) if axis[0] and axis[1] > 1]
    if _without_gaps(axes):
        return numbers
    offsets = [[step * index for index in range(size)] for step, size in axes]
    return [numbers[sum(places)] for places in product(*offsets)]


def _without_gaps(axes: Sequence[tuple[int, int]]) -> bool:
    """Whether (stride, size) of some axes, in any order, lead to each number of a row once."""
    row = 1
    for step, size in sorted(axes):
        if step != row:
            return False
        row *= size
    return True


def _floats(format_: Format, data: bytes) -> Sequence[float]:
    """The numbers in some bytes."""
    if format_ is BF16:  # the upper half of a float
        halves = array("H", data)
        words = array("I", [half << 16 for half in halves])
        return array("f", words.tobytes())
    if format_ is F16:
        count = len(data) // 2
        return struct.unpack(f"<{count}e", data)
    if format_ is F32:
        return array("f", data)
    return array("d", data)
