"""The manual that tools/generate.py writes: a page for each rule, a page of keys for each target, and their indexes.

The pages of the rules are written by running the rules on their examples, tests/corpus/rules/CODE.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfmspec.check.rules import LETTERS, LEVELS, all_findings
from dfmspec.check.rules.base import ALL, Rule, UnknownValue, View
from dfmspec.cli.rule import null_words, type_words
from dfmspec.diagnostics import Diagnostic
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec
from dfmspec.targets import TARGETS, target_module

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "corpus" / "rules"

# What a rule asks for, and what it says.


class _Watched(View):
    """A view that remembers which keys a rule asked for."""

    def __init__(self, resolved: Resolved) -> None:
        super().__init__(resolved)
        self.asked: set[str] = set()

    def or_null(self, key: str) -> Any:
        self.asked.add(key)
        return super().or_null(key)

    def is_set_by_user(self, key: str) -> bool:
        self.asked.add(key)
        return super().is_set_by_user(key)


_MANY = 40
"""A rule that asks for more keys looks at the spec as a whole."""


def valid_specs() -> list[Resolved]:
    """Every valid spec of the corpus."""
    files = sorted((ROOT / "tests" / "corpus" / "valid").glob("*.yaml"))
    return [resolve_spec(load_spec(file)) for file in files]


def keys_of(rule: Rule, specs: Sequence[Resolved]) -> set[str]:
    """The keys that a rule asks for on some specs."""
    asked: set[str] = set()
    for resolved in specs:
        if resolved.spec.target not in rule.targets:
            continue
        view = _Watched(resolved)
        with contextlib.suppress(UnknownValue, ZeroDivisionError):
            list(rule.check(view))
        asked |= view.asked
    if len(asked) > _MANY:
        return set()
    return asked


def examples(rule: Rule) -> tuple[dict[str, list[Diagnostic]], set[str]]:
    """What a rule says of its bad example for each target that the example is for; and the keys that it asks for."""
    found: dict[str, list[Diagnostic]] = {}
    asked: set[str] = set()
    # Our own trainer first, then DiT's script; a rule for neither shows its first target.
    targets = sorted({*rule.targets} & {"megatron_core", "dfm"}, reverse=True) or rule.targets[:1]
    folder = CORPUS / rule.code
    if not folder.is_dir():
        raise SystemExit(f"{rule.code} has no examples: write {folder}/bad.yaml and good.yaml")
    with contextlib.chdir(folder):
        for target in targets:
            resolved = resolve_spec(load_spec("bad.yaml", _example_words(target)))
            findings = all_findings(resolved, levels=LEVELS)
            found[resolved.spec.target] = [finding for finding in findings if finding.code == rule.code]
            asked |= keys_of(rule, [resolved])
    return found, asked


def _example_words(target: str) -> list[str]:
    """The overrides of the bad example in this folder, with the target where its spec names none."""
    words = []
    if "target:" not in Path("bad.yaml").read_text():
        words.append(f"target={target}")
    if Path("bad.txt").exists():
        words += Path("bad.txt").read_text().splitlines()
    return words


# A rule's page.

LOOKS_AT = {
    "load": "the file as it is read",
    "spec": "the spec",
    "paths": "the spec and the files it names",
    "data": "samples of the dataset",
    "deep": "Megatron's own objects",
    "policy": "the policy of the site",
    "fault": "dfmspec itself",
}
"""The level of a rule, in words."""
WITHOUT_EXAMPLE = ("deep", "policy", "fault")
"""Levels of rules that no file alone makes fire."""
_DEPENDS_ON_THE_MACHINE = ("CKP113", "DAT212")
"""Rules whose message is another one on every machine."""


def rule_page(rule: Rule, found: dict[str, list[Diagnostic]]) -> str:
    """A rule's manual."""
    said = next((findings[0] for findings in found.values() if findings), None)

    # What it is.
    targets = ", ".join(rule.targets)
    lines = [
        f"# {rule.code} {rule.name}",
        "",
        f"{_severity(rule, said)}. Targets: {targets}. Looks at {LOOKS_AT[rule.level]}.",
        "",
        "## What happens",
        "",
        rule.why,
        "",
        f"Source: {rule.source}.",
        "",
    ]

    # Its examples, and what it says of the bad one.
    if rule.level not in WITHOUT_EXAMPLE:
        folder = CORPUS / rule.code
        lines += ["## Fires on", "", *_example(folder, "bad")]
        if said is not None and rule.code not in _DEPENDS_ON_THE_MACHINE:
            lines += _message(said)
        lines += ["## Silent on", "", *_example(folder, "good")]

    # How to have it silent.
    if rule.level not in ("load", *WITHOUT_EXAMPLE):
        comment = f"`# dfmspec: ignore[{rule.code}] reason`"
        lines += [f"Meant all the same? {comment} on the line, or above the block.", ""]
    return "\n".join(lines)


def rule_as_data(rule: Rule, found: dict[str, list[Diagnostic]], keys: set[str]) -> dict[str, Any]:
    """What a rule's page says, as data."""
    said = next((findings[0] for findings in found.values() if findings), None)
    if rule.code in _DEPENDS_ON_THE_MACHINE:
        said = None
    examples = {}
    for name in ("bad", "good"):
        spec = CORPUS / rule.code / f"{name}.yaml"
        words = spec.with_suffix(".txt")
        if spec.exists():
            overrides = words.read_text().splitlines() if words.exists() else []
            examples[name] = {"spec": spec.read_text(), "overrides": overrides}
    return {
        "code": rule.code,
        "name": rule.name,
        "severity": rule.severity.label,
        "targets": list(rule.targets),
        "level": rule.level,
        "why": rule.why,
        "source": rule.source,
        "keys": sorted(keys),
        "message": said.message if said else None,
        "hint": said.hint if said else None,
        "examples": examples,
        "url": f"https://dfmspec.dev/rules/{rule.code}.html",
    }


def _severity(rule: Rule, said: Diagnostic | None) -> str:
    label = rule.severity.label.capitalize()
    if said is None or said.severity == rule.severity:
        return label
    return f"{label}, or {said.severity.label}, by case"


def _message(said: Diagnostic) -> list[str]:
    lines = ["```text", f"{said.severity.label}: {said.message}"]
    if said.hint:
        lines.append(f"help: {said.hint}")
    return [*lines, "```", ""]


def _example(folder: Path, name: str) -> list[str]:
    spec = (folder / f"{name}.yaml").read_text()
    lines = ["```yaml", *spec.splitlines(), "```", ""]
    words = folder / f"{name}.txt"
    if words.exists():
        lines += ["With the overrides:", "", "```text", *words.read_text().splitlines(), "```", ""]
    return lines


# The index of the rules.


def rules_index(rules: Sequence[Rule]) -> str:
    """All rules by family, a line each."""
    families: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        families[rule.code[:3]].append(rule)

    # The families.
    lines = [
        "# Rules",
        "",
        f"{len(rules)} rules in {len(families)} families. "
        "`dfmspec rule CODE` prints a rule's page, `dfmspec rule` lists all of them. A code is never used twice.",
        "",
        "| family | rules | about |",
        "|---|---|---|",
    ]
    for letters, about in LETTERS.items():
        anchor = letters.lower()
        lines.append(f"| [{letters}](#{anchor}) | {len(families[letters])} | {about} |")

    # The rules of each.
    for letters, about in LETTERS.items():
        heading = "| rule | severity | targets | what happens |"
        lines += ["", f"## {letters}", "", f"{about}.", "", heading, "|---|---|---|---|"]
        lines += [_rule_line(rule) for rule in families.pop(letters)]
    unknown = ", ".join(families)
    assert not families, f"LETTERS has no words for {unknown}"
    return "\n".join([*lines, ""])


def _rule_line(rule: Rule) -> str:
    targets = "all" if rule.targets == ALL else ", ".join(rule.targets)
    happens = _text(first_sentence(rule.why))
    return f"| [{rule.code}]({rule.code}.md) {rule.name} | {rule.severity.label} | {targets} | {happens} |"


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    head, stop, _ = text.partition(". ")
    if not stop:
        return head
    return f"{head}."


# The pages of the keys.


def sections_of(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """section -> field -> node; the keys of no section under the empty name, first."""
    top = {}
    sections = {}
    for name, node in schema["properties"].items():
        if "properties" in node:
            sections[name] = node["properties"]
        else:
            top[name] = node
    return {"": top, **sections}


def keys_index(targets: dict[str, dict[str, Any]]) -> str:
    """Which page has which target's keys, and how many keys a section has for each."""
    counts = {target: _counts(schema) for target, schema in targets.items()}

    # The targets.
    lines = [
        "# Keys",
        "",
        "What a spec may hold: a page for each target. "
        "`dfmspec explain KEY` prints one of them, `dfmspec schema TARGET` all as JSON Schema.",
        "",
        "| target | keys | what trains |",
        "|---|---|---|",
    ]
    for target in TARGETS:
        subject = target_module(target).SUBJECT
        total = sum(counts[target].values())
        lines.append(f"| [{target}]({target}.md) | {total} | {subject} |")

    # The sections, in the order in which the targets have them.
    lines += [
        "",
        "The sections, with the number of their keys:",
        "",
        _row("section", *TARGETS),
        "|---|" + "---|" * len(TARGETS),
    ]
    names: dict[str, None] = {}
    for sections in counts.values():
        names |= dict.fromkeys(sections)
    for name in names:
        cells = []
        for target in TARGETS:
            count = counts[target].get(name)
            cells.append("" if count is None else f"[{count}]({target}.md#{_anchor(name)})")
        lines.append(_row(name or "top level", *cells))
    return "\n".join([*lines, "", *_NULL, ""])


_NULL = (
    "## Null",
    "",
    "The column `null` of a page says what a null that a spec writes does, in a file or as `KEY=null`:",
    "",
    "| null | what it does |",
    "|---|---|",
    "| kept | It means something, and what trains is given it: no checkpoints, no packing, no FP8. |",
    "| derived | The key takes the value that follows from others, as the column `default` says. |",
    "| default | As if the key were left out. |",
    "| invalid | The key takes no null: an error. |",
    "",
    "A null takes the place of what a file below it has. `upstream: ...` is what DFM's script for DiT was seen to do",
    "with one: kept, filled with a value of its own, or rejected. Where nothing is said, nobody has seen one, and the",
    "type of upstream's field decides.",
)


def _counts(schema: dict[str, Any]) -> dict[str, int]:
    return {section: len(fields) for section, fields in sections_of(schema).items()}


def _anchor(section: str) -> str:
    return section.lower() or "top-level"


def keys_page(target: str, schema: dict[str, Any], rules: dict[str, list[str]]) -> str:
    """Every key of a target; `rules`: the codes of the rules that look at a key."""
    lines = [
        f"# Keys of target {target}",
        "",
        f"For {target_module(target).SUBJECT}. Other targets: [the index](README.md).",
        "What null does: [the index](README.md#null).",
        "",
    ]
    for section, fields in sections_of(schema).items():
        heading = section or "Top level"
        lines += [f"## {heading}", "", _row("key", "type", "default", "null", "meaning", "rules")]
        lines.append("|---|---|---|---|---|---|")
        for name, field in fields.items():
            key = f"{section}.{name}" if section else name
            lines.append(_key_row(key, field, rules.get(key, [])))
        lines.append("")
    return "\n".join(lines)


def _key_row(key: str, field: dict[str, Any], codes: Sequence[str]) -> str:
    links = ", ".join(f"[{code}](../rules/{code}.md)" for code in codes)
    types = _text(type_words(field))
    default = _cell(_default(field))
    meaning = _text(_meaning(field))
    return _row(f"`{key}`", types, default, null_words(field), meaning, links)


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if "x-derived" in field and default is None:
        return f"derived: {field['x-derived']}"
    return f"`{json.dumps(default)}`"


def _meaning(field: dict[str, Any]) -> str:
    """What a key means, then what upstream does with it."""
    marks = {
        "x-upstream": "Upstream: ",
        "x-no-effect": "No effect: ",
        "x-overwritten-by": "Overwritten by ",
    }
    facts = [field.get("description", "")]
    for mark, words in marks.items():
        if mark in field:
            facts.append(f"{words}{field[mark]}")
    return ". ".join(fact.rstrip(".") for fact in facts) + "."


# Markdown.


def _row(*cells: str) -> str:
    inner = " | ".join(cells)
    return f"| {inner} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _text(text: str) -> str:
    """A cell of words that Markdown is not to take for its own: <name> is no tag, and _target_ is not slanted."""
    return re.sub(r"(?<!\w)_|_(?!\w)|[<*]", _escaped, _cell(text))


def _escaped(found: re.Match[str]) -> str:
    if found[0] == "<":
        return "&lt;"
    return f"\\{found[0]}"
