"""dfmspec validate: what it reads, which findings it keeps, and every form of report."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from sarif_pydantic import Sarif

from dfmspec.check.report import REPORTERS
from tests.conftest import ROOT, dfmspec

BAD = """\
cluster: {nproc_per_node: 8}
data: {source: mock}
model:
  tensor_model_parallel_size: 3
train:
  train_iters: 500
scheduler: {lr_decay_iters: 10000}
"""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    file = tmp_path / "specs" / "bad.yaml"
    file.parent.mkdir()
    file.write_text(BAD)
    return file


def codes(result: subprocess.CompletedProcess[str]) -> set[str]:
    return set(re.findall(r"\[([A-Z]{3}\d{3}) ", result.stdout))


def test_every_form_is_well_formed_and_names_the_place(bad: Path, tmp_path: Path) -> None:
    forms = {name: tmp_path / f"out.{name}" for name in REPORTERS}
    result = dfmspec(
        "validate",
        str(bad),
        "--check",
        "spec",
        "--hints",
        *(word for name, file in forms.items() for word in ("--report", f"{name}={file}")),
        cwd=tmp_path,
    )
    text = {name: file.read_text() for name, file in forms.items()}

    assert result.returncode == 1
    assert text["full"].strip() == result.stdout.strip()
    assert f"{bad}:4:3: error: " in text["concise"]
    assert {entry["code"] for entry in json.loads(text["json"])["findings"]} == {
        json.loads(line)["code"] for line in text["jsonl"].splitlines()
    }
    assert f"file={bad.relative_to(tmp_path)},line=4,col=3" in text["github"]
    assert all(len(issue["fingerprint"]) == 64 for issue in json.loads(text["gitlab"]))
    assert Xml.fromstring(text["junit"].split("\n", 1)[1]).find(".//failure") is not None
    assert json.loads(text["rdjson"])["diagnostics"][0]["location"]["range"]["start"]["line"] >= 1
    assert "| error | PAR101" in text["markdown"]
    sarif = Sarif.model_validate(json.loads(text["sarif"]))
    assert sarif.version == "2.1.0"
    assert {found.rule_id for found in sarif.runs[0].results or []} >= {"PAR101", "SPC301"}


def test_the_full_form_shows_the_line_a_caret_and_the_layer(bad: Path) -> None:
    own = dfmspec("validate", str(bad), "model.num_heads=4", "--check", "spec").stdout
    other = dfmspec("validate", str(bad), "cluster.nproc_per_node=6", "recipe=dit_s", "--check", "spec").stdout

    assert "  4 |   tensor_model_parallel_size: 3\n    |   ^^^^^^^^^^^^^^^^^^^^^^^^^^" in own
    assert "<command line>: error: unknown key model.num_heads" in own
    assert "did you mean model.num_attention_heads?" in own
    assert "PAR102" not in other


def test_colours_are_for_terminals_only_and_no_color_wins(bad: Path) -> None:
    assert "\x1b[" not in dfmspec("validate", str(bad), "--check", "spec").stdout
    assert "\x1b[" in dfmspec("validate", str(bad), "--check", "spec", FORCE_COLOR="1").stdout
    assert "\x1b[" not in dfmspec("validate", str(bad), "--check", "spec", FORCE_COLOR="1", NO_COLOR="1").stdout


def test_select_and_ignore_take_beginnings_of_codes(bad: Path) -> None:
    assert codes(dfmspec("validate", str(bad), "--check", "spec", "--format", "concise", "--select", "PAR,spc301")) == {
        "PAR101",
        "PAR102",
        "PAR114",
        "SPC301",
    }
    assert "PAR101" not in codes(
        dfmspec("validate", str(bad), "--check", "spec", "--format", "concise", "--ignore", "PAR")
    )
    assert dfmspec("validate", str(bad), "--select", "XYZ").returncode == 2


def test_what_select_and_ignore_do_not_reach_is_said(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("data: {source: mock}\nmodel: {num_layers: many}  # dfmspec: ignore[SPC202] why not\n")
    for words in (["--ignore", "SPC202"], ["--select", "PAR"]):
        result = dfmspec("validate", str(file), "--check", "spec", "--format", "concise", *words)
        assert "SPC202" in codes(result)
        assert "SPC202 are of reading" in result.stderr
    assert "it is an error of reading" in dfmspec("validate", str(file), "--check", "spec").stdout
    assert dfmspec("validate", str(file), "--check", "spec").stderr == ""


def test_exit_codes_follow_fail_on_and_exit_zero(bad: Path) -> None:
    only_warnings = ("validate", str(bad), "--check", "spec", "--select", "SPC301")

    assert dfmspec(*only_warnings).returncode == 0
    assert dfmspec(*only_warnings, "--fail-on", "warning").returncode == 1
    assert dfmspec("validate", str(bad), "--exit-zero").returncode == 0


@pytest.mark.parametrize("form", REPORTERS)
def test_a_file_whose_name_is_no_text_is_in_every_form(form: str, tmp_path: Path) -> None:
    """Old archives have names in Latin-1; an override may have such bytes too."""
    name = os.fsdecode(b"caf\xe9.yaml")
    (tmp_path / name).write_text("recipe: dit_tiny\nmodel: {num_layer: 1}\n")
    words = ["validate", ".", f"model.{name}=1", "--check", "spec", "-q", "--format", form, "--report"]
    result = dfmspec(*words, f"{form}=out", cwd=tmp_path)
    written = (tmp_path / "out").read_text(encoding="utf-8")
    uris = re.findall(r'"uri": "(.*?)"', written)

    assert result.returncode == 1, result.stderr
    for text in (result.stdout, written):
        assert "num_layer" in text
        assert "caf" in text
    assert form != "sarif" or "caf%E9.yaml" in uris
    assert form != "junit" or Xml.fromstring(written).tag == "testsuites"


def test_a_comment_suppresses_on_its_line_above_a_block_or_in_the_file_and_must_be_of_use(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(
        "# dfmspec: ignore-file[PAR114] we have six GPUs\n"
        "data: {source: mock}\n"
        "cluster: {nproc_per_node: 8}\n"
        "# dfmspec: ignore[PAR101, PAR102] to be changed\n"
        "model:\n  tensor_model_parallel_size: 3\n  pipeline_model_parallel_size: 1  # dfmspec: ignore[PIP101] never\n"
        "train: {train_iters: 5}  # dfmspec: ignore[OPT101]\n"
    )
    result = dfmspec("validate", str(file), "--check", "spec", "--format", "concise")

    assert codes(result) == {"SPC401", "SPC402"}
    assert result.returncode == 0
    assert ":7:" in result.stdout
    assert ":8:" in result.stdout
    sarif = json.loads(dfmspec("validate", str(file), "--check", "spec", "--format", "sarif").stdout)
    kept = [found for found in sarif["runs"][0]["results"] if "suppressions" in found]
    assert {found["ruleId"] for found in kept} == {"PAR101", "PAR102", "PAR114"}
    assert kept[0]["suppressions"][0]["kind"] == "inSource"


def test_a_structural_error_cannot_be_suppressed(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("model:\n  typo: 3  # dfmspec: ignore[SPC201] I know\n")

    assert codes(dfmspec("validate", str(file), "--format", "concise")) >= {"SPC201", "SPC402"}


def test_a_baseline_accepts_what_is_there_and_nothing_new(bad: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    assert dfmspec("validate", str(bad), "--check", "spec", "--write-baseline", str(baseline)).returncode == 0
    assert dfmspec("validate", str(bad), "--check", "spec", "--baseline", str(baseline)).returncode == 0
    bad.write_text("# a line more\n" + BAD + "optimizer: {lr: 1.0e-5, min_lr: 1.0e-4}\n")
    result = dfmspec("validate", str(bad), "--check", "spec", "--baseline", str(baseline), "--format", "concise")

    assert result.returncode == 1
    assert codes(result) == {"OPT101"}


def test_folders_globs_stdin_and_several_processes_give_the_same_findings(tmp_path: Path) -> None:
    folder = tmp_path / "specs"
    folder.mkdir()
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "no.yaml").write_text("nonsense: 1\n")
    for number in range(40):
        (folder / f"{number:02d}.yaml").write_text(BAD.replace("3", str(3 + number % 2)))
    words = ("--check", "spec", "--format", "jsonl")
    whole = dfmspec("validate", "specs", *words, cwd=tmp_path).stdout

    assert (
        whole
        == dfmspec("validate", "specs/*.yaml", *words, cwd=tmp_path).stdout
        == dfmspec("validate", "specs", "-j", "2", *words, cwd=tmp_path).stdout
    )
    assert "nonsense" not in whole
    assert len({json.loads(line)["file"] for line in whole.splitlines()}) == 40
    from_stdin = subprocess.run(
        [sys.executable, "-m", "dfmspec", "validate", "-", "--format", "concise", "--check", "spec"],
        input=BAD,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "<stdin>:4:3: error:" in from_stdin.stdout
    assert from_stdin.returncode == 1


def test_under_github_actions_a_summary_is_written(bad: Path, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    dfmspec("validate", str(bad), "--check", "spec", "--format", "github", GITHUB_STEP_SUMMARY=str(summary))

    assert "| error | PAR101 world-size-not-divisible |" in summary.read_text()


def test_the_problem_matcher_matches_the_concise_form(bad: Path) -> None:
    matcher = json.loads((ROOT / "examples" / "ci" / "problem-matcher.json").read_text())["problemMatcher"][0][
        "pattern"
    ][0]
    lines = [
        line
        for line in dfmspec("validate", str(bad), "--check", "spec", "--format", "concise").stdout.splitlines()
        if ":4:3:" in line
    ]
    match = re.match(matcher["regexp"], lines[0])

    assert match
    assert match[matcher["line"]] == "4"
    assert match[matcher["code"]] == "PAR101"
    assert match[matcher["severity"]] == "error"


def test_the_action_runs_what_it_says(bad: Path, tmp_path: Path) -> None:
    """The action's last step, as a runner would run it; its other steps install Python and dfmspec."""
    import yaml

    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = action["runs"]["steps"][-1]
    given = {name: f"${{{{ inputs.{name} }}}}" for name in action["inputs"]}
    assert set(step["env"].values()) == {given[name] for name in ("specs", "arguments", "check", "sarif")}
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dfmspec").write_text(f'#!/bin/sh\nexec {sys.executable} -m dfmspec "$@"\n')
    (folder / "dfmspec").chmod(0o755)
    env = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "SPECS": "specs",
        "ARGUMENTS": "--select PAR",
        "CHECK": "spec",
        "SARIF": "out.sarif",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1, done.stderr
    assert "::error file=specs/bad.yaml,line=4" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out.sarif").read_text())["version"] == "2.1.0"


@pytest.mark.parametrize(
    "file",
    sorted((ROOT / "tests" / "corpus" / "valid").glob("*.yaml")) + sorted((ROOT / "specs").glob("*.yaml")),
    ids=lambda file: file.stem,
)
def test_a_valid_spec_raises_no_alarm(file: Path) -> None:
    from dfmspec.check.rules import check_spec
    from dfmspec.diagnostics import Severity
    from dfmspec.read.load import load_spec
    from dfmspec.read.resolve import resolve_spec

    assert [
        finding
        for finding in check_spec(resolve_spec(load_spec(file)), levels=("spec",))
        if finding.severity > Severity.HINT
    ] == []
