"""`${spec.KEY}`: values of other keys, filled in once all layers lie on one another."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from dfmspec.diagnostics import Diagnostic, Path, Severity
from dfmspec.read.document import Budget, Document
from dfmspec.read.interpolation import Unfit, keys_in, with_keys
from dfmspec.read.scalars import as_field
from dfmspec.read.structure import meant_key, structural_findings
from dfmspec.spec.paths import PATH_KEYS, is_relative
from dfmspec.targets import catalogue, target_module

if TYPE_CHECKING:
    from dfmspec.read.resolve import Draft


def fill(draft: Draft, waiting: Sequence[str]) -> None:
    """Fill in the keys that refer to others, each after those that it refers to, and check their values.

    A reference to a key that is derived has the derived value. One that leads nowhere, or back to itself, is reported,
    and its key is unknown.
    """
    filling = _Filling(draft, waiting)
    for key in waiting:
        filling.fill(key, ())


class _Filling:
    """The keys that still refer to others."""

    def __init__(self, draft: Draft, waiting: Sequence[str]) -> None:
        self.draft = draft
        self.waiting = dict.fromkeys(waiting)
        self.sources = {derivation.key: derivation.sources for derivation in target_module(draft.spec.target).DERIVED}

    def fill(self, key: str, above: tuple[str, ...]) -> None:
        """Fill in one key; `above` are those that wait for it."""
        draft = self.draft
        if key in above:
            circle = " -> ".join((*above[above.index(key) :], key))
            self._report(key, "SPC108", "circular-reference", f"{circle} has no beginning", "write one of them out")
            return
        if key not in self.waiting:
            return
        written = draft.values[key]
        for name in keys_in(written):
            if name not in draft.values:
                self._report_unknown(key, name)
                return
            needed = (name, *self._followed(name))
            for source in needed:
                if source in self.waiting:
                    self.fill(source, (*above, key))
            # Where one is broken, or the circle has come round to this key, its value is not known.
            if key not in self.waiting or not draft.unknown.isdisjoint(needed):
                draft.unknown.add(key)
                self.waiting.pop(key, None)
                return
        self.waiting.pop(key, None)
        self._lay(key, written)

    def _followed(self, key: str) -> list[str]:
        """The keys from which the value of one follows, where nobody set it."""
        found: list[str] = []
        if self.draft.values[key] is None:
            for source in self.sources.get(key, ()):
                if source not in found and source in self.draft.values:
                    found += [source, *self._followed(source)]
        return found

    def _lay(self, key: str, written: Any) -> None:
        """Put the value in its place, typed and checked as if it had been written there."""
        draft = self.draft
        legal = catalogue(draft.spec.target)
        path: Path = tuple(key.split("."))
        try:
            value = as_field(key, with_keys(written, self._value), legal)
        except Unfit as unfit:
            self._report(key, "SPC106", "unresolved-reference", f"{key}: {unfit}", "refer to a key with one value")
            return
        node: Any = value
        for part in reversed(path):
            node = {part: node}
        origin = draft.origins[key]
        places = {path[: depth + 1]: origin.span for depth in range(len(path))}
        document = Document(origin.span.file, " ", keys=places, values=places)
        problems = list(structural_findings(node, document, legal, draft.spec.target, Budget()))
        draft.faults += problems
        if any(problem.severity is Severity.ERROR for problem in problems):
            draft.unknown.add(key)
            return
        draft.values[key] = self._located(key, written, value)
        shown = origin.note or (written if isinstance(written, str) else json.dumps(written))
        draft.origins[key] = origin._replace(note=shown)

    def _located(self, key: str, written: Any, value: Any) -> Any:
        """A relative path in a file, as seen from the working directory; what begins with a path is so already."""
        file = FilePath(self.draft.origins[key].span.file)
        is_located = any(str(written).startswith(f"${{spec.{other}}}") for other in PATH_KEYS)
        if key not in PATH_KEYS or is_located or not is_relative(value) or not file.is_file():
            return value
        return os.path.relpath(os.path.join(os.path.realpath(file.parent), value))

    def _value(self, key: str) -> Any:
        """The value of a key, derived where it is."""
        if self.draft.values[key] is None and key in self.sources:
            copied = copy.copy(self.draft)
            copied.values = dict(self.draft.values)
            copied.origins = dict(self.draft.origins)
            copied.unknown = self.draft.unknown | self.waiting.keys()
            copied.faults = []
            copied.derive()
            return copied.values[key]
        return self.draft.values[key]

    def _report_unknown(self, key: str, name: str) -> None:
        section, _, last = name.rpartition(".")
        meant = meant_key(last, section, self.draft.spec.target)
        hint = f"did you mean ${{spec.{meant}}}?" if meant else "dfmspec explain SECTION lists the keys of a section"
        message = f"{key}: ${{spec.{name}}} names no key that has a value"
        self._report(key, "SPC106", "unresolved-reference", message, hint)

    def _report(self, key: str, code: str, name: str, message: str, hint: str) -> None:
        draft = self.draft
        draft.unknown.add(key)
        self.waiting.pop(key, None)
        path: Path = tuple(key.split("."))
        draft.faults.append(Diagnostic(draft.origins[key].span, code, name, Severity.ERROR, message, hint, path))
