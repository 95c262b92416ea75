"""Writes what is generated: the schemas, the pages of rules, keys and deviations, the golden plans.

`python tools/generate.py [--check]`; --check writes nothing and fails when something is stale.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dfmspec.check.rules import RULES  # noqa: E402
from dfmspec.check.rules.base import Rule  # noqa: E402
from dfmspec.diagnostics import Diagnostic, dotted  # noqa: E402
from dfmspec.plan.deviations import DEVIATIONS  # noqa: E402
from dfmspec.plan.plan import make_plan  # noqa: E402
from dfmspec.plan.scripts import RANK_PROGRAM  # noqa: E402
from dfmspec.read.load import load_spec  # noqa: E402
from dfmspec.read.resolve import Resolved, resolve_spec  # noqa: E402
from dfmspec.record.manifest import manifest_schema  # noqa: E402
from dfmspec.run.bundle import GUARDS, at, bundle_files  # noqa: E402
from dfmspec.targets import TARGETS, catalogue  # noqa: E402
from tools.formats import events, findings, plan  # noqa: E402
from tools.pages import (  # noqa: E402
    WITHOUT_EXAMPLE,
    examples,
    keys_index,
    keys_of,
    keys_page,
    rule_as_data,
    rule_page,
    rules_index,
    valid_specs,
)
from tools.schemas import NETWORKS, dfm, experiment, megatron_core, with_names  # noqa: E402

SCHEMAS = ROOT / "schemas"
RULE_PAGES = ROOT / "docs" / "rules"
KEY_PAGES = ROOT / "docs" / "keys"
GOLDENS = ROOT / "tests" / "golden"

Files = dict[Path, str]
"""What a file is to hold, by its path."""


def schemas() -> Files:
    """The schemas and what they must hold."""
    ours = megatron_core()
    targets = {"megatron_core": ours}
    for target in NETWORKS:
        targets[target] = dfm(target, ours)
    for target in TARGETS.keys() - targets.keys():
        by_hand = json.loads((ROOT / TARGETS[target].schema).read_text())
        targets[target] = with_names(target, by_hand)
    made = {ROOT / TARGETS[name].schema: schema for name, schema in targets.items()}
    made[SCHEMAS / "experiment.schema.json"] = experiment(targets)
    made[SCHEMAS / "manifest.schema.json"] = manifest_schema()
    made[SCHEMAS / "findings.schema.json"] = findings()
    made[SCHEMAS / "plan.schema.json"] = plan()
    made[SCHEMAS / "events.schema.json"] = events()
    return {path: _json(schema) for path, schema in made.items()}


def pages() -> Files:
    """The manual, which the rules write by running: after the schemas, which they read."""
    files: Files = {}

    # A page a rule, and the same as data; and by the way, which rules look at a key.
    codes: dict[str, list[str]] = defaultdict(list)
    known: dict[str, Any] = {}
    valid = valid_specs()
    for rule in RULES:
        found, keys = _run(rule, valid)
        files[RULE_PAGES / f"{rule.code}.md"] = rule_page(rule, found)
        known[rule.code] = rule_as_data(rule, found, keys)
        for key in sorted(keys):
            codes[key].append(rule.code)
    files[SCHEMAS / "rules.json"] = _json(known)
    files[SCHEMAS / "rules_of_keys.json"] = _json(dict(sorted(codes.items())))
    files[RULE_PAGES / "README.md"] = rules_index(RULES)

    # A page of keys a target.
    targets = {target: catalogue(target).schema for target in TARGETS}
    for target, schema in targets.items():
        files[KEY_PAGES / f"{target}.md"] = keys_page(target, schema, codes)
    files[KEY_PAGES / "README.md"] = keys_index(targets)
    return files


def _run(rule: Rule, valid: list[Resolved]) -> tuple[dict[str, list[Diagnostic]], set[str]]:
    """What a rule says of its examples, by target; and the keys that it looks at."""
    found: dict[str, list[Diagnostic]] = {}
    keys: set[str] = set()
    # A rule that needs no files is asked on every valid spec, too.
    if rule.level == "spec":
        keys |= keys_of(rule, valid)
    if rule.level not in WITHOUT_EXAMPLE:
        found, asked = examples(rule)
        keys |= asked
    for said in found.values():
        paths = [finding.path for finding in said]
        keys.update(dotted(path) for path in paths if len(path) == 2)
    return found, keys


def deviations() -> Files:
    """The table of what the trainer does otherwise than NVIDIA DFM's, under what the page says above it."""
    page = ROOT / "docs" / "deviations.md"
    above, line, _ = page.read_text().partition("|---|---|---|---|\n")
    rows = [f"| {each.subject} | {each.there} | {each.here} | {each.reason} |\n" for each in DEVIATIONS]
    return {page: "".join([above, line, *rows])}


def goldens() -> Files:
    """What plans compile to, byte for byte: tests/golden/NAME/plan of each tests/golden/NAME/spec.yaml."""
    files: Files = {}
    for spec in sorted(GOLDENS.glob("*/spec.yaml")):
        folder = spec.parent / "plan"
        plan = make_plan(resolve_spec(load_spec(spec)))
        for name, text in bundle_files(at(plan, folder)).items():
            # Programs travel as they are in the package, and guards change with every line of code.
            if not name.startswith("examples/") and name not in (RANK_PROGRAM, GUARDS):
                files[folder / name] = text
    return files


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


class Step(NamedTuple):
    """Files that are made together, and where others like them may be left over."""

    make: Callable[[], Files]
    places: tuple[str, ...] = ()


STEPS = (
    Step(schemas),
    Step(pages, places=("docs/rules/*.md", "docs/keys/*.md")),
    Step(deviations),
    Step(goldens, places=("tests/golden/*/plan/*",)),
)
"""In this order: each reads what those before it wrote."""


def main() -> int:
    for step in STEPS:
        files = step.make()
        stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
        left = []
        for place in step.places:
            left += [path for path in ROOT.glob(place) if path not in files]

        # With --check, only say so.
        if "--check" in sys.argv and (stale or left):
            for path in stale + left:
                name = path.relative_to(ROOT)
                print(f"{name} is stale; run: python tools/generate.py")
            return 1

        for path in left:
            path.unlink()
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
            name = path.relative_to(ROOT)
            print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
