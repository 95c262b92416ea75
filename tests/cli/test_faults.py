"""A rule or a derivation that raises takes no finding of another with it: it is a finding, and the exit code is 70."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfmspec.check.report import REPORTERS
from tests.conftest import dfmspec, environment

BAD = "cluster: {nproc_per_node: 8}\nmodel:\n  tensor_model_parallel_size: 3\n"
PATCHES = {
    "rule": """
import dfmspec.check.rules as rules
def failing(view):
    yield from ()
    raise {error}("out of\\nluck")
rules.RULES = tuple(
    rule._replace(check=failing) if rule.code == "BAT101" else rule for rule in rules.RULES
)
""",
    "derivation": """
import dfmspec.read.resolve as resolve
from types import SimpleNamespace
original = resolve.target_module
def failing(values):
    raise {error}("out of\\nluck")
def with_a_fault(name):
    module = original(name)
    derived = tuple(
        each._replace(value=failing) if each.key == "scheduler.lr_decay_iters" else each for each in module.DERIVED
    )
    return SimpleNamespace(DERIVED=derived)
resolve.target_module = with_a_fault
""",
}
"""Code that breaks a part of dfmspec, before its command line is run."""
NAMED = {"rule": "rule BAT101", "derivation": "the derivation of scheduler.lr_decay_iters"}


def broken(part: str, *words: object, cwd: Path, error: str = "KeyError") -> subprocess.CompletedProcess[str]:
    """The command line of a dfmspec with a fault in one of its parts."""
    patch = PATCHES[part].replace("{error}", error)
    code = f"{patch}\nfrom dfmspec.cli.app import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=cwd,
        env=environment(TMPDIR=str(cwd)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def specs(tmp_path: Path) -> Path:
    """A folder with two specs, each with an error of its own."""
    (tmp_path / "a.yaml").write_text(BAD)
    (tmp_path / "b.yaml").write_text(BAD + "  num_layer: 3\n")
    return tmp_path


@pytest.mark.parametrize("part", PATCHES)
@pytest.mark.parametrize("form", REPORTERS)
def test_every_form_shows_the_fault_with_its_name_beside_all_other_findings(specs: Path, part: str, form: str) -> None:
    result = broken(part, "validate", "a.yaml", "b.yaml", "--format", form, cwd=specs)

    assert result.returncode == 70
    assert "internal error: this is a fault of dfmspec" in result.stderr
    for word in ("PAR101", "SPC201", "SPC501", NAMED[part]):
        assert word in result.stdout, word


@pytest.mark.parametrize("error", ["ValueError", "OSError", "RecursionError", "MemoryError", "AssertionError"])
def test_whatever_a_rule_raises_the_findings_of_both_specs_are_those_of_the_other_rules(
    specs: Path, error: str
) -> None:
    result = broken("rule", "validate", "a.yaml", "b.yaml", "--format", "json", cwd=specs, error=error)
    sound = dfmspec("validate", "a.yaml", "b.yaml", "--format", "json", "--ignore", "BAT101", cwd=specs)
    found = json.loads(result.stdout)["findings"]
    faults = [finding for finding in found if finding["code"] == "SPC501"]

    assert [finding["file"] for finding in faults] == ["a.yaml", "b.yaml"]
    assert [finding for finding in found if finding not in faults] == json.loads(sound.stdout)["findings"]
    assert all(f"{error}: out of" in finding["message"] for finding in faults)


def test_the_report_file_holds_the_command_and_every_traceback(specs: Path) -> None:
    result = broken("rule", "validate", "a.yaml", cwd=specs)
    (named,) = re.findall(r"details are in (\S+)", result.stderr)
    text = Path(named).read_text()

    assert "'validate', 'a.yaml'" in text
    assert "Traceback" in text
    assert "in failing" in text


def test_a_fault_can_be_neither_left_out_nor_accepted_nor_suppressed(specs: Path) -> None:
    (specs / "c.yaml").write_text("# dfmspec: ignore-file[SPC501] no\ndata: {source: mock}\n")
    for words in (["--ignore", "SPC"], ["--select", "PAR"], ["--write-baseline", "b.json"], ["--exit-zero"]):
        result = broken("rule", "validate", "c.yaml", "--format", "concise", *words, cwd=specs)
        assert result.returncode == 70, words
        assert "SPC501" in result.stdout, words


@pytest.mark.parametrize("command", ["plan", "run", "fix", "import"])
def test_every_command_that_judges_a_spec_ends_with_the_fault(specs: Path, command: str) -> None:
    (specs / "good.yaml").write_text("model: {num_layers: 3}\n")
    result = broken("rule", command, "good.yaml", cwd=specs)

    assert result.returncode == 70
    assert "details are in" in result.stderr
    assert "Traceback" not in result.stderr


def test_several_processes_keep_the_fault(specs: Path) -> None:
    for number in range(40):
        (specs / f"{number}.yaml").write_text(BAD)
    result = broken("rule", "validate", ".", "-j", "2", "--format", "json", cwd=specs)
    codes = [finding["code"] for finding in json.loads(result.stdout)["findings"]]

    assert result.returncode == 70
    assert codes.count("SPC501") == 42
    assert codes.count("PAR101") == 42


@pytest.mark.parametrize("part", PATCHES)
def test_a_derived_value_that_a_fault_hides_is_judged_by_no_rule(specs: Path, part: str) -> None:
    (specs / "good.yaml").write_text("data: {source: mock}\ncluster: {nproc_per_node: 1}\n")
    result = broken(part, "validate", "good.yaml", "--format", "json", cwd=specs)
    errors = [each["code"] for each in json.loads(result.stdout)["findings"] if each["severity"] == "error"]

    assert errors == ["SPC501"]
