"""Findings and where they are: the vocabulary between rules and reporters."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple

Path = tuple[str | int, ...]
"""A route of keys and list indices into a spec, such as ("model", "num_layers")."""

COMMAND_LINE = "<command line>"
"""The "file" of overrides: one a line."""


class Severity(IntEnum):
    """How bad a finding is; only errors fail a validation."""

    HINT = 0
    WARNING = 1
    ERROR = 2

    @property
    def label(self) -> str:
        """The name in lower case, as reports write it."""
        return self.name.lower()


class Span(NamedTuple):
    """A place in a file; lines and columns from 1, the end exclusive. Line 0 is the file as a whole."""

    file: str
    """Its path as it was given; or "<command line>", "<defaults>" or "<derived>"."""
    line: int = 0
    column: int = 0
    end_line: int = 0
    end_column: int = 0

    def __str__(self) -> str:
        # An override has no line that a reader could look up.
        if not self.line or self.file == COMMAND_LINE:
            return self.file
        return f"{self.file}:{self.line}:{self.column}"


class Edit(NamedTuple):
    """A change of one entry of a file: another name for its key, another value, or a further entry behind it."""

    kind: str
    """"rename", "set", "insert", or "move" to another section."""
    path: Path
    value: Any = None
    """The new name; the new value; (name, value); or the path to move to."""
    safe: bool = True
    """Whether it keeps what the file means, or says what can only have been meant."""


class Finding(NamedTuple):
    """What a rule says: about which key, what is and what is needed, and one way out."""

    path: Path
    message: str
    hint: str = ""
    severity: Severity | None = None
    """None: the rule's own."""
    fix: tuple[Edit, ...] = ()


class Diagnostic(NamedTuple):
    """A finding with its rule and its place."""

    span: Span
    code: str
    name: str
    severity: Severity
    message: str
    hint: str = ""
    path: Path = ()
    layer: str = ""
    """The layer that set the value, when that is not the spec itself: "recipe dit_xl", "override", ..."""
    suppression: str | None = None
    """Why it is not shown: the reason given in a comment, or "baseline"."""
    fix: tuple[Edit, ...] = ()
    baseline: str = ""
    """"new", or "unchanged" where it was there before; "": nothing was compared."""
    traceback: str = ""
    """Of a fault of dfmspec's own: what a report of it needs."""

    @property
    def is_of_the_site(self) -> bool:
        """Whether the site's policy says it, which is nobody's to accept or leave out."""
        return self.code.startswith("POL")

    @property
    def is_of_nobody(self) -> bool:
        """Whether it is about a value that nobody set; its place is where that would stand."""
        return self.layer in ("default", "derived") or self.layer.startswith("recipe ")

    @property
    def fingerprint(self) -> str:
        """The finding's identity: what and about which key, not where."""
        return f"{self.code}:{dotted(self.path)}"

    @property
    def sort_key(self) -> tuple[Span, int, str, str]:
        """Findings sort by place, and errors first where places are equal."""
        return (self.span, -self.severity, self.code, self.message)


UNASKED = "SPC502"
"""The code of the note that tells of rules which could not judge."""
FAULT = "SPC501"
"""The code of a fault of dfmspec's own."""


def fault(what: str, error: Exception, span: Span) -> Diagnostic:
    """An exception of dfmspec's own as a finding, so that it takes none of the others with it.

    Args:
        what: a rule or a derivation, by its name.
        error: what it raised.
        span: the spec, on which it did.
    """
    import traceback

    kind = type(error).__name__
    lines = str(error).splitlines() or ["no message"]
    said = lines[0][:200]
    return Diagnostic(
        span,
        FAULT,
        "fault-of-dfmspec",
        Severity.ERROR,
        f"{what} failed on this spec, and says nothing of it: {kind}: {said}",
        "this is a fault of dfmspec, not of your spec: please report it, with the file that is named at the end",
        traceback="".join(traceback.format_exception(error)),
    )


def not_suppressed(findings: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """The findings that nothing suppresses."""
    return tuple(finding for finding in findings if finding.suppression is None)


def dotted(path: Path) -> str:
    """A route as a spec's users write it: `("model", "num_layers")` as `model.num_layers`."""
    return ".".join(map(str, path))
