"""What upstream was seen to do with null, key by key, against the catalogue and against what we make of it."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from dfmspec.check.rules import check_spec
from dfmspec.diagnostics import Severity
from dfmspec.plan.plan import make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.targets import catalogue
from dfmspec.targets.dfm.upstream import recipe
from tests.targets.dfm.cases import HERE, answer, cases, compiled

DEFAULTS = json.loads((HERE / "defaults.json").read_text())
LEGAL = catalogue("dfm")
ALLOWED = {"kept": {"kept"}, "filled": {"derived", "default"}, "rejected": {"invalid", "derived"}}
"""What a null may do here, by what upstream was seen to do with one; what it rejects may be derived instead."""
KEPT_AND_OF_NO_USE = {
    # The loader, which was never built there, is cut by it.
    "dataset.micro_batch_size": "derived",
    # Packs are cut by it.
    "dataset.task_encoder_seq_length": "invalid",
    # A switch, to which null is off in silence.
    "model.sequence_parallel": "invalid",
    # The first save has no such format.
    "checkpoint.ckpt_format": "invalid",
}
"""Keys whose null upstream kept as far as anybody looked, and whose declared type has none."""


def entries(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Key and value of every leaf of a tree."""
    if not isinstance(node, dict):
        yield ".".join(path), node
        return
    for key, value in node.items():
        yield from entries(value, (*path, str(key)))


def given(case: dict[str, Any]) -> dict[str, Any]:
    """The keys that a case sets, in its file and on its command line."""
    tree = case.get("yaml")
    if tree is None and "yaml_text" in case:
        try:
            tree = yaml.safe_load(case["yaml_text"])
        except yaml.YAMLError:
            tree = None
    found = dict(entries(tree)) if isinstance(tree, dict) else {}
    for word in case.get("cli", ()):
        key, equals, value = word.partition("=")
        if equals:
            found[key] = None if value in ("null", "~") else value
    return found


def seen(key: str, case: dict[str, Any], others: set[str]) -> str | None:
    """What upstream did with the null of a key in a case; None where something else decided."""
    if case["verdict_static"] == "accept":
        resolved = DEFAULTS | case["resolved_changed"]
        if key not in resolved:
            return None
        return "kept" if resolved[key] is None else "filled"
    error = case.get("error_message") or case.get("post_error", {}).get("error_message") or ""
    return "rejected" if not others or "NoneType" in error else None


@pytest.fixture(scope="module")
def nulled() -> dict[str, list[tuple[dict[str, Any], str]]]:
    """By key, the cases that tell what became of its null; more than one null tells nothing of a rejection."""
    found = defaultdict(list)
    for case in cases():
        values = given(case)
        nulls = {key for key, value in values.items() if value is None}
        for key in nulls:
            field = LEGAL.field(key)
            what = seen(key, case, {*values} - {key})
            if field is None or LEGAL.is_section(key) or what is None or (what == "rejected" and len(nulls) > 1):
                continue
            found[key].append((case, what))
    return dict(found)


def test_the_catalogue_says_what_was_seen_and_nothing_else(nulled: dict[str, list]) -> None:
    told = {key: field["x-null-upstream"] for key, field in fields() if "x-null-upstream" in field}
    recorded = {key: {what for _, what in found} for key, found in nulled.items()}

    assert {key for key in told if told[key] not in recorded.get(key, ())} == set()
    assert recorded.keys() <= told.keys()


def fields() -> Iterator[tuple[str, dict[str, Any]]]:
    for key, _ in LEGAL.defaults():
        yield key, LEGAL.field(key) or {}


def test_what_a_null_does_agrees_with_what_was_seen_or_has_a_reason() -> None:
    apart = {}
    for key, field in fields():
        upstream = field.get("x-null-upstream")
        if upstream and field["x-null"] not in ALLOWED[upstream]:
            apart[key] = field["x-null"]

    assert apart == KEPT_AND_OF_NO_USE


def test_a_null_that_upstream_was_seen_to_keep_is_kept_here(nulled: dict[str, list]) -> None:
    lost = []
    for key, found in nulled.items():
        for case, what in found:
            if what == "kept" and LEGAL.null_of(key) == "kept" and compiled(case, "dfm")[key] is not None:
                lost.append((case["id"], key))

    assert lost == []


def test_a_null_that_upstream_was_seen_to_reject_is_an_error_or_a_derived_value_that_is_told(
    nulled: dict[str, list],
) -> None:
    unsaid = []
    for key, found in nulled.items():
        for case, what in found:
            findings = answer(case)
            told = any(finding.severity is Severity.ERROR or key in finding.message for finding in findings)
            if what == "rejected" and not told:
                unsaid.append((case["id"], key))

    assert unsaid == []


def test_a_function_that_upstream_puts_back_takes_no_null() -> None:
    """Upstream's command line has no such key: it is no part of the configuration that words are laid over."""
    model = recipe("dfm")["model"]
    absent = {key for key, field in fields() if "x-callable" in field and key.startswith("model.")} - {
        f"model.{name}" for name in model
    }
    refused = {key for key, field in fields() if "x-callable" in field and LEGAL.null_of(key) == "invalid"}

    assert refused == absent
    for key in refused:
        findings = check_spec(resolve_spec(load_spec(None, ["target=dfm", f"{key}=null"])), levels=("spec",))
        assert [finding.code for finding in findings if finding.severity is Severity.ERROR] == ["SPC205"]


@pytest.mark.long
@pytest.mark.parametrize("target", ["dfm", "dfm_wan", "dfm_flux"])
def test_two_nulls_over_any_recorded_case_are_answered(target: str) -> None:
    chance = random.Random(7)
    keys = [key for key, _ in catalogue(target).defaults() if catalogue(target).null_of(key) != "invalid"]
    planned = 0
    for case in cases():
        nulls = [f"{key}=null" for key in chance.sample(keys, 2)]
        resolved = compiled({**case, "cli": [*case.get("cli", ()), *nulls]}, target)
        findings = check_spec(resolved, levels=("spec",))
        if not any(finding.severity is Severity.ERROR for finding in findings):
            planned += 1
            make_plan(resolved)

    assert planned > 20


@pytest.mark.parametrize("section", ["model", "train", "dist", "optimizer", "logger", "tokenizer"])
@pytest.mark.parametrize("word", ["null", "~"])
def test_a_section_that_upstream_cannot_do_without_takes_no_null(section: str, word: str) -> None:
    in_a_file = resolve_spec(load_spec("spec.yaml", text=f"target: dfm\n{section}: {word}\n"))
    on_the_command_line = resolve_spec(load_spec(None, ["target=dfm", f"{section}={word}"]))

    assert "SPC202" in {finding.code for finding in check_spec(in_a_file)}
    assert "SPC202" in {finding.code for finding in check_spec(on_the_command_line)}
