"""Comments cover what they stand over: many comments over many findings, each place met once."""

from __future__ import annotations

import random

from dfmspec.check.suppressions import _covers, _Suppression, suppressed
from dfmspec.diagnostics import Diagnostic, Severity, Span
from dfmspec.read.document import Document

LEVELS = {"AAA101": "spec", "BBB101": "spec"}


def found(line: int, code: str) -> Diagnostic:
    return Diagnostic(Span("s.yaml", line, 1, line, 2), code, "x", Severity.ERROR, "m")


def test_the_first_comment_that_covers_a_finding_gives_its_reason() -> None:
    rng = random.Random(0)
    for _ in range(200):
        comments = []
        for number in range(rng.randrange(8)):
            first = rng.randrange(20)
            codes = tuple(rng.choices(list(LEVELS), k=rng.randrange(1, 3)))
            comments.append(_Suppression(Span("s.yaml", number), codes, str(number), first, first + rng.randrange(9)))
        findings = [found(rng.randrange(20), rng.choice(list(LEVELS))) for _ in range(20)]
        covers = _covers(findings, comments)

        for finding in findings:
            line = finding.span.line
            meant = (each for each in comments if finding.code in each.codes and each.first <= line <= each.last)
            assert covers.get(("s.yaml", finding.code, line)) == next(meant, None)


def test_a_comment_covers_the_block_below_it_and_no_line_more() -> None:
    lines = ["a:", "  # dfmspec: ignore[AAA101] why", "  # more", "", "  b:", "    c: 1", "", "    d: 2", "  e: 3"]
    document = Document("s.yaml", "\n".join(lines) + "\n")
    findings = [found(line, "AAA101") for line in range(1, 10)]
    out = suppressed(findings, [document], set(LEVELS), LEVELS)

    assert [finding.span.line for finding in out if finding.suppression] == [5, 6, 7, 8]
