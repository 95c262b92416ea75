"""dfmspec against upstream's recorded verdicts.

Nothing that upstream rejects passes, and what is refused besides has a reason.
"""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from dfmspec.check.rules import RULES
from dfmspec.diagnostics import Severity
from tests.targets.dfm.cases import answer, cases, outcome

WHY = {rule.code: rule.why for rule in RULES}
SILENT = re.compile(r"silence|accepted", re.IGNORECASE)
"""Words with which a manual page says what happens without an error."""


@pytest.fixture(scope="module")
def judged() -> list[tuple[dict, tuple]]:
    return [(case, answer(case)) for case in cases()]


def test_every_case_that_upstream_rejects_is_rejected_or_mended_in_words(judged: list) -> None:
    missed = [case["id"] for case, findings in judged if outcome(case, findings) == "missed"]

    assert missed == []


def test_what_upstream_accepts_and_we_do_not_has_a_page_that_names_the_silent_fault(judged: list) -> None:
    silent: dict[str, list[str]] = defaultdict(list)
    for case, findings in judged:
        if case["verdict_static"] == "accept":
            for finding in findings:
                if finding.severity > Severity.HINT and not SILENT.search(WHY[finding.code]):
                    silent[finding.code].append(case["id"])

    assert dict(silent) == {}


def test_the_plain_recipe_and_the_good_cases_are_not_refused_for_nothing(judged: list) -> None:
    """Of the cases made to be good, only those with a named silent fault are refused."""
    refused: dict[str, set[str]] = defaultdict(set)
    good = [
        (case, findings) for case, findings in judged if "good" in case["tags"] and case["verdict_static"] == "accept"
    ]
    for case, findings in good:
        for finding in findings:
            if finding.severity is Severity.ERROR:
                refused[finding.code].add(case["id"])

    assert len(good) > 50
    assert set(refused) <= {
        "BAT102",
        "SPC201",
        "SPC206",
        "SPC301",
        "SPC304",
        "SEQ103",
        "SEQ111",
        "PRE103",
        "PIP103",
        "CKP103",
        "CKP123",
        "BAT104",
        "DDP102",
        "PAR113",
        "SEQ102",
        "SEQ110",
    }, refused
