"""Findings and where they are: the vocabulary between rules and reporters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

Path = tuple[str | int, ...]
"""A route of keys and list indices into a spec, such as ("model", "num_layers")."""


class Severity(IntEnum):
    """How bad a finding is; only errors fail a validation."""

    HINT = 0
    WARNING = 1
    ERROR = 2

    @property
    def label(self) -> str:
        """In lower case."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A place in a file; lines and columns from 1, the end exclusive. `file` may also be "<command line>" or "<defaults>"."""

    file: str
    line: int = 0
    column: int = 0
    end_line: int = 0
    end_column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule says: about which key, what is and what is needed, and one way out."""

    path: Path
    message: str
    hint: str = ""
    severity: Severity | None = None
    """None: the rule's own."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A finding with its rule and its place."""

    span: Span
    code: str
    name: str
    severity: Severity
    message: str
    hint: str = ""
    path: Path = ()

    @property
    def sort_key(self) -> tuple[Span, int, str, str]:
        """By place, then errors first."""
        return (self.span, -self.severity, self.code, self.message)


def dotted(path: Path) -> str:
    """`("model", "num_layers")` as `model.num_layers`."""
    return ".".join(map(str, path))
