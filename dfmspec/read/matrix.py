"""`matrix:`: one spec, and many runs of it; each cell is a layer between the spec and the command line.

    matrix:
      optimizer.lr: [1e-4, 3e-4]
      train.global_batch_size: [64, 128]
      exclude:
        - {optimizer.lr: 3e-4, train.global_batch_size: 64}
      include:
        - {optimizer.lr: 1e-3, train.train_iters: 20k}

Its axes are multiplied; a cell that has all values of an entry of `exclude` is left out, and each entry of `include` is
a further cell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from itertools import product
from typing import Any, NamedTuple

from dfmspec.diagnostics import Diagnostic, Path, Severity, Span, dotted
from dfmspec.read.document import Document
from dfmspec.read.scalars import as_field, plain
from dfmspec.spec.catalogue import COMPOSITION, MATRIX, Catalogue

MAX_CELLS = 256
"""How many cells a matrix has."""
_EXTRA = ("include", "exclude")
_LONGEST_NAME = 100
_NO_AXES = ("spec_version", "target", "recipe", "name", *COMPOSITION)
"""Keys that are needed before a cell is laid, or that a cell has of its own."""


class Setting(NamedTuple):
    """What a cell sets."""

    key: str
    value: Any
    place: Span
    """Of the value."""
    key_place: Span


class Cell(NamedTuple):
    """One run of a matrix."""

    name: str
    """A word for folders: each axis with its value, such as `lr-0.0001_global_batch_size-64`."""
    settings: tuple[Setting, ...]

    def layer(self) -> tuple[dict[str, Any], Document]:
        """What it sets, as data and as the document that findings are placed by."""
        data: dict[str, Any] = {}
        keys: dict[Path, Span] = {}
        values: dict[Path, Span] = {}
        for key, value, place, key_place in self.settings:
            path: Path = tuple(key.split("."))
            node = data
            for depth, part in enumerate(path[:-1], 1):
                keys[path[:depth]] = key_place
                node = node.setdefault(str(part), {})
            keys[path] = key_place
            values[path] = place
            node[str(path[-1])] = value
        return data, Document(self.settings[0].place.file, " ", keys=keys, values=values)


_Axes = dict[str, tuple[Any, Document]]
"""The entries of a matrix, each with the document that has it."""


def _laid(matrices: Iterable[tuple[Any, Document]]) -> _Axes:
    """Matrices of layers laid on one another, axis by axis; a null takes an axis out."""
    axes: _Axes = {}
    for matrix, document in matrices:
        for name, value in matrix.items():
            axes[name] = (value, document)
            if plain(value) is None:
                del axes[name]
    return axes


def cells_of(
    matrices: Iterable[tuple[Any, Document]], overridden: Collection[str], legal: Catalogue
) -> tuple[list[Cell], list[Diagnostic]]:
    """The cells of a matrix, in the order of its axes, and what is wrong with it; no cells where something is.

    Args:
        matrices: those of all layers, the lowest first, each with its document.
        overridden: keys of the command line, which lie over every cell: as axes they would only repeat cells.
        legal: the target's keys, by whose types values are the same or not.
    """
    axes = _laid(matrices)
    problems: list[Diagnostic] = []
    columns: list[list[Setting]] = []
    for key, (value, document) in axes.items():
        if key in _EXTRA or key in overridden:
            continue
        column = _column(key, value, document, problems, legal)
        columns.append(column)
    count = 1
    for column in columns:
        count *= len(column)
    # Of an axis that the command line replaces, no value is left that could be excluded.
    excluded = [_values(entry, legal) for entry in _entries("exclude", axes, overridden, problems)]
    included = _entries("include", axes, overridden, problems)
    names = [*axes, *(setting.key for entry in included for setting in entry)]
    for key in dict.fromkeys(names):
        outer = next((name for name in names if key.startswith(f"{name}.")), None)
        if outer is not None:
            _, document = next(iter(axes.values()))
            problems.append(_malformed(document, (MATRIX,), f"{outer} is all of what {key} is a part of", "name keys"))
    if problems:
        return [], problems

    # Their number first: a product may be too large to be made.
    if count + len(included) > 100 * MAX_CELLS:
        return [], [_too_many(axes, count + len(included))]
    rows = [row for row in product(*columns) if not any(_has(row, entry) for entry in excluded)] if columns else []
    rows += [tuple(entry) for entry in included]
    rows = list({_identity(row, legal): row for row in reversed(rows) if row}.values())[::-1]
    if not rows and axes:
        _, document = next(iter(axes.values()))
        return [], [_malformed(document, (MATRIX,), "no cell is left", "exclude fewer, or take the matrix out")]
    if len(rows) > MAX_CELLS:
        return [], [_too_many(axes, len(rows))]
    return _named(rows), []


def _values(row: Iterable[Setting], legal: Catalogue) -> dict[str, Any]:
    """What a cell or an entry sets, each value as its field has it, so that 20k and 20000 are one."""
    return {setting.key: as_field(setting.key, setting.value, legal) for setting in row}


def _identity(row: Iterable[Setting], legal: Catalogue) -> str:
    """What a cell sets, whatever the order and however it is written."""
    return json.dumps(_values(row, legal), sort_keys=True, default=str)


def _column(key: str, value: Any, document: Document, problems: list[Diagnostic], legal: Catalogue) -> list[Setting]:
    """The settings of one axis, each at the place of its value."""
    path: Path = (MATRIX, key)
    if key in _NO_AXES:
        problems.append(_malformed(document, path, f"{key} is no axis: it is the same in all cells"))
    if re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key) is None or legal.is_section(key):
        problems.append(_malformed(document, path, f"{key!r} is no key with a value", at_key=True))
        return []
    near = get_close_matches(key, _EXTRA, n=1)
    if near:
        problems.append(_malformed(document, path, f"{key} is no key", f"did you mean {near[0]}?", at_key=True))
        return []
    if not isinstance(value, list) or not value:
        problems.append(_malformed(document, path, f"{key} must be a list of the values that it takes, at least one"))
        return []
    column = []
    for index, item in enumerate(value):
        place = document.values.get((*path, index)) or document.span(path)
        column.append(Setting(key, as_field(key, item, legal), place, document.span(path)))
    if len({_identity([setting], legal) for setting in column}) < len(column):
        problems.append(_malformed(document, path, f"{key} has a value twice"))
    return column


def _entries(name: str, axes: _Axes, overridden: Collection[str], problems: list[Diagnostic]) -> list[list[Setting]]:
    """The entries of include or exclude, each as settings."""
    if name not in axes:
        return []
    value, document = axes[name]
    is_list = isinstance(value, list) and all(isinstance(entry, dict) and entry for entry in value)
    if not is_list:
        message = f"{name} must be a list of mappings from keys to values"
        problems.append(_malformed(document, (MATRIX, name), message))
        return []
    if len(value) > MAX_CELLS:
        problems.append(_malformed(document, (MATRIX, name), f"{name} has more than {MAX_CELLS} entries"))
        return []
    found = []
    for index, entry in enumerate(value):
        settings = []
        for key, item in entry.items():
            path: Path = (MATRIX, name, index, key)
            known = [axis for axis in axes if axis not in _EXTRA]
            if key in _NO_AXES or (name == "exclude" and key not in known):
                what = "is no axis" if name == "exclude" else "is the same in all cells"
                problems.append(_malformed(document, path, f"{key} {what}"))
            if key not in overridden or name == "exclude":
                key_place = document.span(path)
                settings.append(Setting(key, item, document.values.get(path) or key_place, key_place))
        found.append(settings)
    return found


def _has(row: Iterable[Setting], entry: Mapping[str, Any]) -> bool:
    """Whether a cell, of axes alone, has all values of an entry."""
    values = {setting.key: setting.value for setting in row}
    return all(key in values and values[key] == value for key, value in entry.items())


def _named(rows: list[tuple[Setting, ...]]) -> list[Cell]:
    """The cells with their names, the short names of keys where those are enough; what is there twice, once."""
    keys = list(dict.fromkeys(setting.key for row in rows for setting in row))
    lasts = [key.rpartition(".")[2] for key in keys]
    short = {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}
    cells: dict[str, Cell] = {}
    for row in rows:
        whole = "_".join(f"{short[setting.key]}-{_word(setting.value)}" for setting in row)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", whole).strip("-.")
        # What a file name has no room or no letters for, a digest stands for.
        if len(name) > _LONGEST_NAME or name in cells:
            import hashlib

            digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
            name = f"{name[:_LONGEST_NAME]}-{digest}"
        cells.setdefault(name, Cell(name, row))
    return list(cells.values())


def _word(value: Any) -> str:
    """A value as it stands in a name."""
    value = plain(value)
    return value if isinstance(value, str) else json.dumps(value)


def _too_many(axes: _Axes, count: int) -> Diagnostic:
    _, document = next(iter(axes.values()))
    message = f"the matrix has {count:,} cells, and at most {MAX_CELLS} are planned"
    return _malformed(document, (MATRIX,), message, "take an axis out, or exclude cells")


def _malformed(document: Document, path: Path, message: str, hint: str = "", *, at_key: bool = False) -> Diagnostic:
    """What is wrong with a matrix."""
    place = document.span(path) if at_key else document.values.get(path)
    return Diagnostic(
        place or document.span(path),
        "SPC109",
        "malformed-matrix",
        Severity.ERROR,
        message if path == (MATRIX,) else f"{dotted(path[:1])}: {message}",
        hint or "matrix: {optimizer.lr: [1e-4, 3e-4], exclude: [...], include: [...]}",
        path,
    )


def chosen(cells: Iterable[Cell], name: str) -> Cell | None:
    """The cell of a name, or of a number from 1; None: there is none."""
    listed = list(cells)
    by_name: Mapping[str, Cell] = {cell.name: cell for cell in listed}
    if name in by_name:
        return by_name[name]
    is_number = name.isdecimal() and 1 <= int(name) <= len(listed)
    return listed[int(name) - 1] if is_number else None
