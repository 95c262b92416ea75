"""Null in every key, and in keys that are read together: what the catalogue says happens, and never an exception."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import pytest

from dfmspec.check.rules import RULES, all_findings
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.plan.describe import described
from dfmspec.plan.plan import make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec
from dfmspec.run.bundle import programs
from dfmspec.targets import TARGETS, catalogue, target_module
from tests.conftest import CORPUS
from tools.pages import keys_of

Pair = tuple[str, str]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths that specs name are not there


def taken(target: str, keys: Sequence[str], file: Path | None = None) -> tuple[Resolved, tuple[Diagnostic, ...]]:
    """A spec with null in some keys, through every stage that reads it: load, resolve, check, and plan where it may."""
    words = [] if file else ["data.source=mock"]
    words += [f"target={target}", *(f"{key}=null" for key in keys)]
    resolved = resolve_spec(load_spec(file, words))
    findings = all_findings(resolved)
    if not any(finding.severity is Severity.ERROR for finding in findings):
        assert not resolved.unknown
        described(resolved, make_plan(resolved))
    return resolved, findings


def settable(target: str) -> list[str]:
    """The keys of a target that an override can name."""
    return [key for key, _ in catalogue(target).defaults() if key not in ("extends", "config_file", "target")]


# One key.


def happened(target: str, key: str) -> str:
    """What a null in a key did, in the catalogue's words."""
    resolved, findings = taken(target, [key])
    if any(finding.severity is Severity.ERROR and finding.code.startswith("SPC2") for finding in findings):
        places = {".".join(map(str, finding.path)) for finding in findings if finding.code.startswith("SPC2")}
        return "invalid" if places == {key} and all(finding.hint for finding in findings) else "another's finding"
    origin = resolved.origins[key]
    if origin.is_set_by_user:
        return "kept" if resolved[key] is None else "another value"
    if origin.layer == "derived":
        return "derived" if key == "name" or resolved[key] == resolved.derived[key] else "another value"
    plain = resolve_spec(load_spec(None, [f"target={target}", "data.source=mock"]))
    return "default" if resolved[key] == plain[key] else "another value"


@pytest.mark.parametrize("target", TARGETS)
def test_a_null_does_what_the_catalogue_says_of_its_key(target: str) -> None:
    wrong = {}
    for key in settable(target):
        found = happened(target, key)
        if found != catalogue(target).null_of(key):
            wrong[key] = found

    assert wrong == {}


def test_a_null_over_a_lower_layers_value_is_that_null(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("checkpoint: {save: /ckpt}\nmodel: {ffn_hidden_size: 1024}\n")
    (tmp_path / "spec.yaml").write_text(
        "target: dfm\nextends: base.yaml\ncheckpoint: {save: null}\nmodel: {ffn_hidden_size: null}\n"
    )
    resolved = resolve_spec(load_spec(tmp_path / "spec.yaml"))

    assert resolved["checkpoint.save"] is None
    assert resolved["model.ffn_hidden_size"] == 4608


def test_a_null_that_is_kept_reaches_the_plan_and_the_script() -> None:
    resolved = resolve_spec(
        load_spec(None, ["target=dfm", "data.source=mock", "checkpoint.save=null", "train.eval_iters=0"])
    )
    made = make_plan(resolved)
    read = target_module("dfm").read_back(resolved.values, "checkpoint:\n  save: null\n")

    assert made.config["checkpoint"]["save"] is None
    assert made.config["checkpoint"]["load"] is None
    assert read is not None
    assert read["checkpoint.save"] is None
    assert "no checkpoints" in described(resolved, made)


def test_a_key_that_is_left_out_is_derived_as_ever() -> None:
    made = make_plan(resolve_spec(load_spec(None, ["target=dfm", "data.source=mock"])))

    assert made.config["checkpoint"]["save"] == "${oc.env:DFMSPEC_RUN_DIR}/checkpoints"


def test_a_job_that_is_given_no_time_to_save_at_is_told_so_and_says_so() -> None:
    heedless = "train.exit_signal_handler=false"
    words = ["target=dfm", "data.source=mock", "launcher.kind=slurm", "launcher.time_limit=4:00:00", heedless]
    given = make_plan(resolve_spec(load_spec(None, words)))
    resolved = resolve_spec(load_spec(None, [*words, "train.exit_duration_in_mins=null"]))

    assert "RUN123" in {finding.code for finding in all_findings(resolved)}
    assert "heeds neither signal nor clock" in programs(make_plan(resolved))["job.sbatch"]
    assert "heeds neither signal nor clock" not in programs(given)["job.sbatch"]


# Keys that are read together.


def specs_of(target: str) -> list[Path]:
    """The specs of the corpus that are for a target, or for any."""
    found = []
    for file in sorted([*(CORPUS / "valid").glob("*.yaml"), *(CORPUS / "rules").glob("*/*.yaml")]):
        named = re.search(r"^target: *(\w+)", file.read_text(), re.MULTILINE)
        if (named[1] if named else target) == target:
            found.append(file)
    return found


@lru_cache
def related(target: str) -> tuple[Pair, ...]:
    """The pairs of keys that a rule asks for together, or that a derivation reads and gives."""
    resolved = [resolve_spec(load_spec(file, [f"target={target}"])) for file in specs_of(target)[::8]]
    groups = [keys_of(rule, resolved) for rule in RULES if rule.level == "spec"]
    groups += [{derivation.key, *derivation.sources} for derivation in target_module(target).DERIVED]
    known = {*settable(target)}
    pairs = set()
    for group in groups:
        pairs.update(itertools.combinations(sorted(group & known), 2))
    return tuple(sorted(pairs))


def across(target: str, count: int) -> Iterator[Pair]:
    """Pairs of keys of different sections, the same ones each time."""
    chance = random.Random(20_000)
    keys = settable(target)
    while count:
        one, other = chance.sample(keys, 2)
        if one.partition(".")[0] != other.partition(".")[0]:
            yield one, other
            count -= 1


def through(target: str, pairs: Sequence[Pair]) -> list[str]:
    """Each pair as null over a spec of the corpus, another one each time; what raised an exception."""
    raised = []
    for pair, file in zip(pairs, itertools.cycle(specs_of(target)), strict=False):
        try:
            taken(target, pair, file)
        except Exception as error:
            raised.append(f"{pair} over {file.parent.name}/{file.name}: {type(error).__name__}: {error}")
    return raised


@pytest.mark.parametrize("target", TARGETS)
def test_some_pairs_of_nulls_are_answered(target: str) -> None:
    pairs = [*random.Random(1000).sample(related(target), 250), *across(target, 50)]

    assert through(target, pairs) == []


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_every_pair_of_related_nulls_is_answered(target: str) -> None:
    assert len(related(target)) > 300
    assert through(target, [*related(target), *across(target, 2000)]) == []


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_every_pair_of_nulls_of_a_section_is_answered(target: str) -> None:
    keys = [key for key in settable(target) if catalogue(target).null_of(key) != "invalid"]
    pairs = [pair for pair in itertools.combinations(keys, 2) if pair[0].split(".")[0] == pair[1].split(".")[0]]

    assert through(target, pairs) == []


@pytest.mark.parametrize("target", ["dfm", "dfm_wan", "dfm_flux"])
@pytest.mark.parametrize(
    "words",
    [
        ["train.train_iters=null", "train.train_samples=1000", "scheduler.lr_decay_iters=20000"],
        ["train.train_samples=1000", "scheduler.lr_decay_iters=20000"],
        ["train.train_iters=null", "scheduler.lr_decay_iters=20000"],
        ["train.train_iters=null", "scheduler.lr_warmup_iters=20000"],
        ["scheduler.lr_decay_iters=null", "train.train_samples=1000", "scheduler.lr_warmup_fraction=0.5"],
    ],
)
def test_a_length_in_samples_beside_a_schedule_in_iterations_is_an_error_and_no_exception(
    target: str, words: list[str]
) -> None:
    findings = all_findings(resolve_spec(load_spec(None, [f"target={target}", "data.source=mock", *words])))

    assert any(finding.severity is Severity.ERROR for finding in findings)
