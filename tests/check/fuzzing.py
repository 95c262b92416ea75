"""Inputs that nobody would write, from a seed: bytes, YAML trees around real keys, override strings, command lines.

`python -m tests.check.fuzzing N [SEED]` gives N of them to every stage up to the plan and to every reporter; nothing
may raise.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

from dfmspec.check.report import REPORTERS, reporter
from dfmspec.check.rules import all_findings
from dfmspec.errors import DfmspecError
from dfmspec.plan.plan import make_plan
from dfmspec.read.document import parse_document
from dfmspec.read.fixes import fixed
from dfmspec.read.importing import import_command, split_command
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.targets import TARGETS, catalogue

KEYS = sorted({key for target in TARGETS for key, _ in catalogue(target).defaults()})
WORDS = [
    "true",
    "null",
    "none",
    "",
    "~",
    "1e-4",
    "010",
    "1:30",
    "yes",
    "0x1f",
    ".inf",
    "-1",
    "0",
    "2.0",
    "a b",
    "${RUN_DIR}/x",
    "${a.b}",
    "/data/x",
    "../x",
    "full",
    "selective",
    "bf16_mixed",
    "bf16_with_mxfp8_mixed",
    "torch.float32",
    "🦋",
    "\u2028",
    "\\",
    "'",
    '"',
    "# x",
    "~nouser/x",
    "x" * 5000,
    "a\0b",
    "dfmspec: ignore[PAR101] x",
    "WSD",
]
EXTRA = [
    "target",
    "recipe",
    "extends",
    "config_file",
    "name",
    "model",
    "train",
    "mixed_precision",
    "comm_overlap",
    "launcher.env",
    "checkpoint.checkpoint_dir",
    "checkpoint.load_checkpoint",
    "typo",
    "model.typo",
    "<<",
    "",
]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any tree, mostly small numbers."""
    kind = rng.randrange(12 if depth < 3 else 8)
    if kind < 3:
        return rng.choice([0, 1, 2, 3, 4, 8, 16, 64, 1152, -1, 10**30, rng.randrange(10000)])
    if kind < 5:
        return rng.choice(WORDS)
    if kind < 7:
        return rng.choice([None, True, False])
    if kind == 7:
        return rng.choice([0.5, 1e-4, -0.0, float("nan"), float("inf"), 1e300, 3.0])
    if kind < 10:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        str(rng.choice([*WORDS, rng.choice(KEYS).rpartition(".")[2]])): value(rng, depth + 1)
        for _ in range(rng.randrange(4))
    }


def tree(rng: random.Random) -> str:
    """A spec with some real keys and some values that fit them."""
    data: dict[str, Any] = {}
    if rng.random() < 0.6:
        data["target"] = rng.choice(["dfm", "megatron_core", "x", None])
    for _ in range(rng.randrange(12)):
        key = rng.choice(KEYS if rng.random() < 0.8 else EXTRA)
        section, _, name = key.partition(".")
        if name and isinstance(data.setdefault(section, {}), dict):
            data[section][name] = value(rng)
        else:
            data[section] = value(rng)
    return yaml.safe_dump(data, default_flow_style=rng.choice([None, True, False]), allow_unicode=True)


def damaged(rng: random.Random) -> bytes:
    """A spec with bytes cut out, doubled or replaced; or no spec at all."""
    raw = bytearray(tree(rng).encode(errors="surrogatepass"))
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(3)
        if kind == 0:
            raw.insert(at, rng.randrange(256))
        elif kind == 1:
            del raw[at : at + rng.randrange(9)]
        else:
            raw.extend(raw[at : at + 20])
    return bytes(raw) if rng.random() < 0.8 else rng.randbytes(rng.randrange(200))


def override(rng: random.Random) -> str:
    """An override, or something like one."""
    key = rng.choice(
        [
            rng.choice(KEYS),
            rng.choice(EXTRA),
            "~" + rng.choice(KEYS),
            "++" + rng.choice(KEYS),
            "a..b",
            "=",
            "model.num_layers.x",
        ]
    )
    text = rng.choice([rng.choice(WORDS), json.dumps(value(rng)), str(value(rng)), "[1, 2", "{a: 1}", "{a", "&x *x"])
    return rng.choice([f"{key}={text}", key, f"{key}=", f"{key} = {text}", text])


def through_everything(text: bytes, overrides: list[str]) -> Counter[str]:
    """Every stage; the codes that were found."""
    decoded = text.decode("utf-8", errors="replace")
    parse_document(text, "spec.yaml")
    resolved = resolve_spec(load_spec("spec.yaml", overrides, text=decoded))
    findings = all_findings(resolved, levels=("spec", "paths"))
    assert not any(finding.traceback for finding in findings), findings
    texts = {document.file: document.text for document in resolved.spec.documents}
    for name in REPORTERS:
        reporter(name)(findings, texts)
    fixed(resolved.spec.documents[0], findings, unsafe=True)
    if not any(finding.severity == 2 for finding in findings):
        make_plan(resolved)
    return Counter(finding.code for finding in findings)


def run(count: int, seed: int, progress: Callable[[int], None] = lambda done: None) -> Counter[str]:
    """The codes that `count` inputs gave; any exception but a usage error is the caller's."""
    rng, codes = random.Random(seed), Counter[str]()
    for number in range(count):
        text = damaged(rng) if number % 3 == 0 else tree(rng).encode()
        overrides = [override(rng) for _ in range(rng.randrange(4))]
        try:
            codes += through_everything(text, overrides)
            if number % 10 == 0:
                import_command(
                    split_command("torchrun pretrain_dit_model.py " + " ".join(override(rng) for _ in range(4)))
                )
        except DfmspecError:
            codes["usage error"] += 1
        except Exception as error:
            raise AssertionError(f"input {number} of seed {seed}: {text!r} {overrides!r}") from error
        progress(number)
    return codes


if __name__ == "__main__":
    began, wanted, first = time.perf_counter(), int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    found = run(wanted, first)
    print(f"{wanted} inputs, no exception, {len(found)} codes seen, {time.perf_counter() - began:.0f} s")
