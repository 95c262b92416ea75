"""The recorded cases, and dfmspec's answer to each.

`python -m tests.targets.dfm.cases` prints the table of agreement.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dfmspec.check.rules import check_spec
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec

HERE = Path(__file__).parent
MENDING = ("SPC302", "SPC310", "CKP101", "ENV101")
"""Hints of what is mended: a derivation or a variable written out, a value that needs no quotes, a documented alias."""


def cases() -> Iterator[dict[str, Any]]:
    with (HERE / "verdicts.jsonl").open() as lines:
        yield from map(json.loads, lines)


def answer(case: dict[str, Any]) -> tuple[Diagnostic, ...]:
    """dfmspec's findings for target dfm, without looking at files."""
    return check_spec(compiled(case, "dfm"), levels=("spec",))


def compiled(case: dict[str, Any], target: str) -> Resolved:
    """The case as a spec for a target."""
    text = case.get("yaml_text")
    if text is None:
        text = yaml.safe_dump(case["yaml"]) if case.get("yaml") is not None else "{}\n"
    words = [*case.get("cli", ()), f"target={target}", f"cluster.nproc_per_node={case['world_size'] or 1}"]
    words += ["data.source=mock"] if case.get("mock") else []
    words += [f"launcher.env={json.dumps(case['env'])}"] if case.get("env") else []
    return resolve_spec(load_spec("override.yaml", words, text=text))


def outcome(case: dict[str, Any], findings: tuple[Diagnostic, ...]) -> str:
    """rejected, mended, missed; or accepted, warned, refused."""
    worst = max((finding.severity for finding in findings), default=Severity.HINT)
    if case["verdict_static"] == "reject":
        mended = any(finding.code in MENDING for finding in findings)
        return "rejected" if worst is Severity.ERROR else "mended" if mended else "missed"
    return ("accepted", "warned", "refused")[worst]


def stage(case: dict[str, Any]) -> str:
    return case.get("stage") or case.get("post_first_failure") or "none"


def family(case: dict[str, Any]) -> str:
    """Of the catalogue of constraints, from the case's first tag; the kind of case where the tag names none."""
    match = re.match(r"(PAR|PP|SEQ|BAT|MOD|PRE|OPT|DDP|CKP|EVL|LOG|DAT|ENV)", case["tags"][0])
    return match[0] if match else case["kind"]


def table() -> str:
    """The agreement by stage and by family, in Markdown."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for case in cases():
        found = outcome(case, answer(case))
        counts["stage of upstream's rejection", stage(case)][found] += 1
        counts["family", family(case)][found] += 1
        counts["all", ""][found] += 1
    names = ("rejected", "mended", "missed", "accepted", "warned", "refused")
    lines = [
        "| | upstream rejects: rejected | mended | missed | upstream accepts: accepted | warned | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kind, value), counter in sorted(counts.items()):
        lines.append(f"| {kind} {value} | " + " | ".join(str(counter[name]) for name in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
