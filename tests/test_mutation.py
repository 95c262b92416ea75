"""Valid specs with one entry broken: the code of that fault fires, and besides it only what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dfmspec.catalogue import Catalogue, catalogue, types
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.document import parse_document, write_scalar
from dfmspec.load import load_spec
from dfmspec.resolve import resolve_spec
from dfmspec.rules import check_spec
from tests.conftest import ROOT

SPECS = sorted((ROOT / "specs").glob("*.yaml")) + sorted((ROOT / "tests" / "corpus" / "valid").glob("*.yaml"))


class Mutation(NamedTuple):
    """One edit of a spec's text, and the code that must fire."""

    what: str
    text: str
    code: str
    key: str
    without: str | None = None
    """The spec without the entry, where that is a line of its own."""


def findings(text: str, file: Path) -> tuple[Diagnostic, ...]:
    return check_spec(resolve_spec(load_spec(file, text=text)), levels=("spec",))


def mutations(file: Path) -> Iterator[Mutation]:
    """Every entry `section.field` of the file, broken in each way that its type has."""
    text = file.read_text()
    document = parse_document(text.encode(), str(file))
    legal = catalogue(load_spec(file).target)
    for path, span in document.keys.items():
        field = legal.field(".".join(map(str, path)))
        value = document.values[path]
        if len(path) != 2 or field is None or "properties" in field or span.line != value.line or value.line != value.end_line:
            continue
        key = ".".join(map(str, path))

        def replaced(span: Any, new: str) -> str:
            lines = text.splitlines(keepends=True)
            line = lines[span.line - 1]
            lines[span.line - 1] = line[: span.column - 1] + new + line[span.end_column - 1 :]
            return "".join(lines)

        lines = text.splitlines(keepends=True)
        line = lines[span.line - 1]
        if "&" in line:  # others refer to it
            continue
        alone = not line[: span.column - 1].strip()  # a line of its own
        without = "".join(lines[: span.line - 1] + lines[span.line :]) if alone else None
        yield Mutation("misspelt", replaced(span, f"{path[1]}_x"), "SPC201", key, without)
        if alone:
            yield Mutation("doubled", "".join([*lines[: span.line], *lines[span.line - 1 :]]), "SPC102", key)
        for what, bad, code in broken_values(field, legal):
            yield Mutation(what, replaced(value, write_scalar(bad) if not isinstance(bad, dict | list) else "{a: 1}"), code, key)


def broken_values(field: dict[str, Any], legal: Catalogue) -> Iterator[tuple[str, Any, str]]:
    """Values that the field cannot have."""
    if "enum" in field:
        yield "no choice", "no such choice", "SPC203"
        return
    declared = types(field)
    if "string" not in declared and "object" not in declared:
        yield "text", "some text", "SPC202"
    if "object" not in declared:
        yield "a mapping", {}, "SPC202"
    if "null" not in declared:
        yield "null", None, "SPC202"
    if "boolean" not in declared:
        yield "a truth value", True, "SPC202"
    if "integer" in declared and "number" not in declared:
        yield "a fraction", field.get("minimum", 2) + 0.5, "SPC202"
    if declared in (("boolean",), ("boolean", "null")):
        yield "a number", 1, "SPC202"
    if "minimum" in field:
        yield "below the least", field["minimum"] - 1, "SPC204"
    if "exclusiveMinimum" in field:
        yield "the excluded least", field["exclusiveMinimum"], "SPC204"
    if "maximum" in field:
        yield "above the most", field["maximum"] + 1, "SPC204"


ALL = [(file, mutation) for file in SPECS for mutation in mutations(file)]


def test_there_are_enough_of_them() -> None:
    assert len(ALL) >= 2000


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.stem)
def test_a_broken_entry_is_found_and_the_rest_stays_silent(file: Path) -> None:
    """A broken value silences the rules that ask for it; a misspelt key is as if it were not there."""
    before = {(finding.code, finding.path) for finding in findings(file.read_text(), file)}
    for mutation in (mutation for other, mutation in ALL if other == file):
        found = findings(mutation.text, file)
        errors = [finding for finding in found if finding.severity is Severity.ERROR]
        here = f"{mutation.key} {mutation.what}"

        assert mutation.code in {finding.code for finding in errors}, here
        allowed = before
        if mutation.what == "misspelt":
            if mutation.without is None:
                continue
            allowed = {(f.code, f.path) for f in findings(mutation.without, file)}
        assert [f"{f.code} {f.message}" for f in found if f.code != mutation.code and f.severity > Severity.HINT and (f.code, f.path) not in allowed] == [], here
