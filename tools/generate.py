"""Writes what is generated: the schemas, the pages of the rules and of the keys with their indexes, the golden plans.

`python tools/generate.py [--check]`; --check writes nothing and fails when something is stale.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dfmspec.check.rules import LEVELS, RULES, all_findings  # noqa: E402
from dfmspec.check.rules.base import ALL, Rule, UnknownValue, View  # noqa: E402
from dfmspec.cli.rule import type_words  # noqa: E402
from dfmspec.diagnostics import Diagnostic, dotted  # noqa: E402
from dfmspec.plan.plan import make_plan  # noqa: E402
from dfmspec.read.load import load_spec  # noqa: E402
from dfmspec.read.resolve import Resolved, resolve_spec  # noqa: E402
from dfmspec.record.manifest import manifest_schema  # noqa: E402
from dfmspec.run.bundle import at, bundle_files  # noqa: E402
from dfmspec.spec.experiment import Experiment  # noqa: E402
from dfmspec.spec.launchers import LAUNCHERS  # noqa: E402
from dfmspec.targets import TARGETS, catalogue, recipes_of, target_module  # noqa: E402
from dfmspec.targets.dfm.bridge import CLASSES  # noqa: E402

OWN_SECTIONS = ("cluster", "launcher", "run")
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "list": "array", "map": "object"}
DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.half", "torch.uint8")


def megatron_core() -> dict[str, Any]:
    """The catalogue of our own trainer, from the spec's models."""
    source = Experiment.model_json_schema()
    properties = {name: _flat(node, source["$defs"]) for name, node in source["properties"].items()}
    properties["recipe"] = _one_of(recipes_of("megatron_core"), properties["recipe"])
    properties["target"] = _one_of(TARGETS, properties["target"])
    kinds = properties["launcher"]["properties"]
    kinds["kind"] = _one_of(LAUNCHERS, kinds["kind"])
    return _document("megatron_core-0.16.1", "An experiment for dfmspec's trainer on megatron-core 0.16.1.", _with_derivations(properties, "megatron_core"))


def _one_of(names: Iterable[str], node: dict[str, Any]) -> dict[str, Any]:
    """A text that is one of the names of a table."""
    return {**{key: value for key, value in node.items() if key != "type"}, "enum": list(names)}


REVISION = "7cb7634"
NETWORKS = {"dfm": "DiT", "dfm_wan": "WAN", "dfm_flux": "FLUX"}


def dfm(target: str, ours: dict[str, Any]) -> dict[str, Any]:
    """The catalogue of NVIDIA DFM at its pinned revision for one of its networks, from tools/dfm*_fields.yaml, with our own sections."""
    table = _table(target)
    properties = {name: dict(node) for name, node in ours["properties"].items() if "properties" not in node or name in OWN_SECTIONS}
    properties["recipe"] |= {"enum": list(recipes_of(target)), "default": TARGETS[target].default_recipe}
    properties["data"] = _dfm_data(ours["properties"]["data"])
    for section, fields in table.items():
        named = "recipe" in fields
        optional = "_target_" in fields or named or section == "profiling"
        properties[section] = {
            "type": ["object", *(["string"] if named else []), *(["null"] if optional else [])], "additionalProperties": False,
            "description": f"DFM's {section} section.", "properties": {name: _dfm_field(entry) for name, entry in fields.items()},
        }  # fmt: skip
        if not optional:
            properties[section]["type"] = "object"
        if "_target_" in fields:  # upstream would import and call whatever stands there
            properties[section]["properties"]["_target_"] = _dfm_field({**fields["_target_"], "values": [CLASSES[section]]})
    title = f"An experiment for NVIDIA DFM {REVISION} (Megatron-Bridge 953aabf7), {NETWORKS[target]}."
    return _document(Path(TARGETS[target].schema).name.removesuffix(".schema.json"), title, _with_derivations(properties, target))


def _table(target: str) -> dict[str, dict[str, dict[str, Any]]]:
    """section -> field -> facts: DiT's, or another network's own over it."""
    table: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load((ROOT / "tools" / "dfm_fields.yaml").read_text())
    if target == "dfm":
        return table
    own = yaml.safe_load((ROOT / "tools" / f"{target}_fields.yaml").read_text())
    for section, same in own["same_as_dit"].items():
        table[section] = {name: table[section][name] for name in same} | own[section]
    for key, value in own["recipe"].items():
        section, name = key.split(".")
        field = table[section][name]
        if value is None:
            table[section][name] = {**field, "upstream": field["default"], "default": None}  # derived here
        else:
            table[section][name] = {**field, ("upstream" if field["default"] is None else "default"): value}
    return table


def _dfm_data(node: dict[str, Any]) -> dict[str, Any]:
    """`data` for DFM: a WebDataset, or its own random tensors (--mock)."""
    source = {**node["properties"]["source"], "enum": ["webdataset", "mock"], "description": "webdataset: dataset.path. mock: DFM's random tensors (--mock)."}
    return {**node, "properties": {"source": source}}


def _dfm_field(entry: dict[str, Any]) -> dict[str, Any]:
    kind: str = entry["type"]
    null, kind = kind.endswith("?"), kind.rstrip("?")
    marks = {f"x-{name.replace('_', '-')}": entry[name] for name in ("upstream", "no_effect", "overwritten_by", "mock_only", "energon_only") if name in entry}
    if kind == "callable":
        return {"enum": [None], "default": None, "description": entry["meaning"], "x-callable": True, **marks}
    choices = DTYPES if kind == "dtype" else entry.get("values")
    if choices:
        field: dict[str, Any] = {"enum": [*choices, *([None] if null else [])]}
    else:
        names = [_TYPES[name] for name in kind.split("|")]
        field = {"type": [*names, "null"] if null else names if len(names) > 1 else names[0]}
        limits = {"minimum": "exclusiveMinimum" if entry.get("exclusive") else "minimum", "maximum": "maximum"}
        field |= {word: entry[name] for name, word in limits.items() if name in entry}
    return {**field, "default": entry["default"], "description": entry["meaning"], **marks}


def _with_derivations(properties: dict[str, Any], target: str) -> dict[str, Any]:
    """With the formula of each derived value, as its target computes it."""
    for derivation in target_module(target).DERIVED:
        section, field = derivation.key.split(".")
        if field in properties.get(section, {}).get("properties", {}):
            properties[section]["properties"][field]["x-derived"] = derivation.formula
    return properties


def _document(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    composition = {
        "extends": {"type": ["array", "string"], "items": {"type": "string"}, "description": "Specs whose keys lie under this one's, left to right."},
        "config_file": {"type": "string", "description": "An override file whose keys lie under this spec's own."},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#", "$id": f"https://dfmspec.dev/schemas/targets/{name}.schema.json",
        "title": name, "description": description, "type": "object", "additionalProperties": False,
        "properties": {**properties, **composition},
    }  # fmt: skip


def _flat(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Without $ref, and in the subset that draft-07 readers know."""
    if "$ref" in node:
        node = {**definitions[node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}
    if node.get("x-derived") is True:  # as written it may be null, as resolved it never is
        words = {k: node[k] for k in ("default", "description", "title") if k in node}
        value = {k: v for k, v in node.items() if k not in (*words, "x-derived")}
        node = {"anyOf": [value, {"type": "null"}], **words}
    if "anyOf" in node:
        variants = [_flat(variant, definitions) for variant in node["anyOf"]]
        merged: dict[str, Any] = {}
        for variant in variants:
            merged |= {k: v for k, v in variant.items() if k not in ("type", "enum")}
        if any("enum" in variant for variant in variants):
            merged["enum"] = [value for variant in variants for value in variant.get("enum", [None])]
        else:
            merged["type"] = [variant["type"] for variant in variants]
        node = merged | {k: v for k, v in node.items() if k != "anyOf"}
    if "const" in node:
        node = {**{k: v for k, v in node.items() if k != "const"}, "enum": [node["const"]]}
    kept = {k: v for k, v in node.items() if k not in ("title", "default") or (k == "default" and "properties" not in node)}
    if "enum" in kept:
        kept.pop("type", None)
    if "properties" in kept:
        kept["properties"] = {name: _flat(child, definitions) for name, child in kept["properties"].items()}
    return kept


def experiment(targets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The schema of any spec, for editors: chosen by `target`."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://dfmspec.dev/schemas/experiment.schema.json",
        "title": "dfmspec experiment", "type": "object",
        **_chosen(list(targets.items())),
    }  # fmt: skip


def _chosen(targets: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The first target is what a spec that names none is for."""
    (_, schema), others = targets[0], targets[1:]
    node = {k: v for k, v in schema.items() if not k.startswith("$")}
    for target, other in reversed(others):
        condition = {"properties": {"target": {"const": target}}, "required": ["target"]}
        node = {"if": condition, "then": {k: v for k, v in other.items() if not k.startswith("$")}, "else": node}
    return node


CORPUS = ROOT / "tests" / "corpus" / "rules"
_DEPENDS_ON_THE_MACHINE = ("CKP113", "DAT212")
"""Rules whose message is another one on every machine."""


def examples(rule: Rule, asked: set[str]) -> dict[str, list[Diagnostic]]:
    """target -> what the rule says of its bad example, of those that its example is for; the keys that it asks for are added to `asked`."""
    folder, found, here = CORPUS / rule.code, {}, Path.cwd()
    os.chdir(folder)
    try:
        for target in sorted({*rule.targets} & {"megatron_core", "dfm"}, reverse=True) or rule.targets[:1]:
            words = [] if "target:" in Path("bad.yaml").read_text() else [f"target={target}"]
            words += Path("bad.txt").read_text().splitlines() if Path("bad.txt").exists() else []
            resolved = resolve_spec(load_spec("bad.yaml", words))
            found[resolved.spec.target] = [finding for finding in all_findings(resolved, levels=LEVELS) if finding.code == rule.code]
            asked |= keys_of(rule, [resolved])
    finally:
        os.chdir(here)
    return found


LOOKS_AT = {
    "load": "the file as it is read", "spec": "the spec", "paths": "the spec and the files it names", "data": "samples of the dataset",
    "deep": "Megatron's own objects",
}  # fmt: skip


class _Watched(View):
    """A view that remembers which keys a rule asked for."""

    def __init__(self, resolved: Resolved) -> None:
        super().__init__(resolved)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def is_users(self, key: str) -> bool:
        self.asked.add(key)
        return super().is_users(key)


_MANY = 40
"""A rule that asks for more keys looks at the spec as a whole."""


def keys_of(rule: Rule, specs: list[Resolved]) -> set[str]:
    """The keys that a rule asks for, on its examples and, when it needs no files, on every valid spec of the corpus."""
    asked: set[str] = set()
    for resolved in specs:
        if resolved.spec.target in rule.targets:
            view = _Watched(resolved)
            with contextlib.suppress(UnknownValue, ZeroDivisionError):
                list(rule.check(view))
            asked |= view.asked
    return asked if len(asked) <= _MANY else set()


def _valid_specs() -> list[Resolved]:
    return [resolve_spec(load_spec(file)) for file in sorted((ROOT / "tests" / "corpus" / "valid").glob("*.yaml"))]


def page(rule: Rule, found: dict[str, list[Diagnostic]]) -> str:
    """A rule's manual."""
    said = next((findings[0] for findings in found.values() if findings), None)
    severity = rule.severity.label.capitalize() + (f", or {said.severity.label}, by case" if said is not None and said.severity != rule.severity else "")
    lines = [
        f"# {rule.code} {rule.name}", "", f"{severity}. Targets: {', '.join(rule.targets)}. Looks at {LOOKS_AT[rule.level]}.", "",
        "## What happens", "", rule.why, "", f"Source: {rule.source}.", "",
    ]  # fmt: skip
    if rule.level != "deep":
        folder = CORPUS / rule.code
        lines += ["## Fires on", "", *_example(folder, "bad")]
        if said is not None and rule.code not in _DEPENDS_ON_THE_MACHINE:
            lines += ["```text", f"{said.severity.label}: {said.message}", *([f"help: {said.hint}"] if said.hint else []), "```", ""]
        lines += ["## Silent on", "", *_example(folder, "good")]
    if rule.level not in ("load", "deep"):
        lines += [f"Meant all the same? `# dfmspec: ignore[{rule.code}] reason` on the line, or above the block.", ""]
    return "\n".join(lines)


def _example(folder: Path, name: str) -> list[str]:
    words = folder / f"{name}.txt"
    overrides = ["With the overrides:", "", "```text", *words.read_text().splitlines(), "```", ""] if words.exists() else []
    return ["```yaml", *(folder / f"{name}.yaml").read_text().splitlines(), "```", "", *overrides]


FAMILIES = {
    "SPC": "The spec itself: reading it, its keys and types, values that follow from others", "SEC": "Secrets",
    "PAR": "How ranks are arranged, and what the arrangement must divide", "PIP": "Pipeline stages", "SEQ": "The length of packs, and how ranks share it",
    "BAT": "Batch sizes and the length of a run", "MOD": "The network, and what it recomputes", "SMP": "The sampler", "WAN": "NVIDIA DFM's WAN",
    "FLX": "NVIDIA DFM's FLUX", "PRE": "Number formats", "OPT": "Optimizer, schedules, seeds", "DDP": "Gradients and parameters over data-parallel ranks",
    "CKP": "What is saved, where, and what a run resumes from", "EVL": "Evaluation while training", "DAT": "The dataset, its metadata and its samples",
    "RUN": "Processes, machines, launchers, paths", "ENV": "Environment variables",
}  # fmt: skip
"""The letters of a code, and what such rules look at."""


def rules_index(rules: Sequence[Rule]) -> str:
    """All rules by family, a line each."""
    families: dict[str, list[Rule]] = defaultdict(list)
    for rule in rules:
        families[rule.code[:3]].append(rule)
    lines = [
        "# Rules", "",
        f"{len(rules)} rules in {len(families)} families. `dfmspec rule CODE` prints a rule's page, `dfmspec rule` lists all of them. "
        "A code is never used twice.", "",
        "| family | rules | about |", "|---|---|---|",
        *(f"| [{letters}](#{letters.lower()}) | {len(families[letters])} | {about} |" for letters, about in FAMILIES.items()),
    ]  # fmt: skip
    for letters, about in FAMILIES.items():
        lines += ["", f"## {letters}", "", f"{about}.", "", "| rule | severity | targets | what happens |", "|---|---|---|---|"]
        for rule in families.pop(letters):
            targets = "all" if rule.targets == ALL else ", ".join(rule.targets)
            lines.append(f"| [{rule.code}]({rule.code}.md) {rule.name} | {rule.severity.label} | {targets} | {_text(first_sentence(rule.why))} |")
    assert not families, f"FAMILIES has no words for {', '.join(families)}"
    return "\n".join([*lines, ""])


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    head, stop, _ = text.partition(". ")
    return head + "." if stop else head


_UPSTREAM = "[NVIDIA DFM](https://github.com/NVIDIA-NeMo/DFM)"
SUBJECTS = {
    "megatron_core": "dfmspec's own trainer on [Megatron-Core](https://github.com/NVIDIA/Megatron-LM)",
    **{target: f"{_UPSTREAM}'s script for {network}" for target, network in NETWORKS.items()},
}
"""Each target in words, in the order of the index."""


def keys_index(targets: dict[str, dict[str, Any]]) -> str:
    """Which page has which target's keys, and how many keys a section has for each."""
    counts = {target: {section: len(fields) for section, fields in sections_of(schema).items()} for target, schema in targets.items()}
    names = list(dict.fromkeys(section for sections in counts.values() for section in sections))
    lines = [
        "# Keys", "", "What a spec may hold: a page for each target. `dfmspec explain KEY` prints one of them, `dfmspec schema TARGET` all as JSON Schema.", "",
        "| target | keys | what trains |", "|---|---|---|",
        *(f"| [{target}]({target}.md) | {sum(counts[target].values())} | {subject} |" for target, subject in SUBJECTS.items()), "",
        "The sections, with the number of their keys:", "",
        f"| section | {' | '.join(SUBJECTS)} |", f"|---|{'---|' * len(SUBJECTS)}",
    ]  # fmt: skip
    for name in names:
        cells = [f"[{counts[target][name]}]({target}.md#{_anchor(name)})" if name in counts[target] else "" for target in SUBJECTS]
        lines.append(f"| {name or 'top level'} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def sections_of(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """section -> field -> node; the keys of no section under the empty name, first."""
    top = {name: node for name, node in schema["properties"].items() if "properties" not in node}
    return {"": top} | {name: node["properties"] for name, node in schema["properties"].items() if "properties" in node}


def _anchor(section: str) -> str:
    return section.lower() or "top-level"


def keys_page(target: str, schema: dict[str, Any], rules: dict[str, list[str]]) -> str:
    """Every key of a target."""
    lines = [f"# Keys of target {target}", "", f"For {SUBJECTS[target]}. Other targets: [the index](README.md).", ""]
    for section, fields in sections_of(schema).items():
        lines += [f"## {section or 'Top level'}", "", "| key | type | default | meaning | rules |", "|---|---|---|---|---|"]
        for name, field in fields.items():
            key = f"{section}.{name}" if section else name
            links = ", ".join(f"[{code}](../rules/{code}.md)" for code in rules.get(key, []))
            cells = (f"`{key}`", _text(type_words(field)), _cell(_default(field)), _text(_meaning(field)), links)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _default(field: dict[str, Any]) -> str:
    return f"derived: {field['x-derived']}" if "x-derived" in field and field.get("default") is None else f"`{json.dumps(field.get('default'))}`"


def _meaning(field: dict[str, Any]) -> str:
    marks = (("x-upstream", "Upstream: "), ("x-no-effect", "No effect: "), ("x-overwritten-by", "Overwritten by "))
    facts = [field.get("description", ""), *(f"{words}{field[name]}" for name, words in marks if name in field)]
    return ". ".join(fact.rstrip(".") for fact in facts) + "."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _text(text: str) -> str:
    """A cell of words that Markdown is not to take for its own: <name> is no tag, and _target_ is not slanted."""
    return re.sub(r"(?<!\w)_|_(?!\w)|[<*]", lambda found: "&lt;" if found[0] == "<" else f"\\{found[0]}", _cell(text))


def schemas() -> dict[Path, str]:
    """The schemas and what they must hold."""
    ours = megatron_core()
    targets = {"megatron_core": ours} | {target: dfm(target, ours) for target in NETWORKS}
    files = {ROOT / TARGETS[name].schema: schema for name, schema in targets.items()}
    files[ROOT / "schemas" / "experiment.schema.json"] = experiment(targets)
    files[ROOT / "schemas" / "manifest.schema.json"] = manifest_schema()
    return {path: json.dumps(schema, indent=2) + "\n" for path, schema in files.items()}


def pages() -> dict[Path, str]:
    """The manual, which the rules write by running: after the schemas, which they read."""
    rules: dict[str, list[str]] = defaultdict(list)
    out: dict[Path, str] = {}
    valid = _valid_specs()
    for rule in RULES:
        asked: set[str] = keys_of(rule, valid) if rule.level == "spec" else set()
        found = examples(rule, asked) if rule.level != "deep" else {}
        out[ROOT / "docs" / "rules" / f"{rule.code}.md"] = page(rule, found)
        for key in sorted(asked | {dotted(finding.path) for findings in found.values() for finding in findings if len(finding.path) == 2}):
            rules[key].append(rule.code)
    out[ROOT / "schemas" / "rules_of_keys.json"] = json.dumps(dict(sorted(rules.items())), indent=2) + "\n"
    out[ROOT / "docs" / "rules" / "README.md"] = rules_index(RULES)
    targets = {target: catalogue(target).schema for target in TARGETS}
    out |= {ROOT / "docs" / "keys" / f"{target}.md": keys_page(target, schema, rules) for target, schema in targets.items()}
    out[ROOT / "docs" / "keys" / "README.md"] = keys_index(targets)
    return out


def goldens() -> dict[Path, str]:
    """What plans compile to, byte for byte: tests/golden/NAME/plan of each tests/golden/NAME/spec.yaml; the entry script is the package's own."""
    out: dict[Path, str] = {}
    for spec in sorted((ROOT / "tests" / "golden").glob("*/spec.yaml")):
        made = replace(make_plan(resolve_spec(load_spec(spec))), guards={})  # which change with every line of code
        out |= {spec.parent / "plan" / name: text for name, text in bundle_files(at(made, spec.parent / "plan")).items() if not name.startswith("examples/")}
    return out


def main() -> int:
    for wanted in (schemas, pages, goldens):
        files = wanted()
        stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
        places = {pages: ("docs/rules/*.md", "docs/keys/*.md"), goldens: ("tests/golden/*/plan/*",)}
        left = [path for place in places.get(wanted, ()) for path in ROOT.glob(place) if path not in files]
        if "--check" in sys.argv and (stale or left):
            print("\n".join(f"{path.relative_to(ROOT)} is stale; run: python tools/generate.py" for path in stale + left))
            return 1
        for path in left:
            path.unlink()
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
