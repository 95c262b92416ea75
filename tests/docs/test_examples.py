"""examples/ci and examples/editors: valid by the schemas of those who read them, and their steps do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT, dfmspec, environment

CI = ROOT / "examples" / "ci"
EDITORS = ROOT / "examples" / "editors"
GOOD = "cluster: {nproc_per_node: 8}\ndata: {source: mock}\ntrain: {train_iters: 1000}\n"


@pytest.mark.parametrize(
    ("schema", "file"),
    [
        ("vendor.github-workflows", CI / "github.yml"),
        ("vendor.github-actions", ROOT / "action.yml"),
        ("vendor.gitlab-ci", CI / "gitlab.yml"),
    ],
    ids=str,
)
def test_a_file_for_a_ci_is_valid_by_its_own_schema(schema: str, file: Path) -> None:
    command = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", schema, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


def test_pre_commit_takes_its_files() -> None:
    for what, file in (("config", CI / "pre-commit-config.yaml"), ("manifest", ROOT / ".pre-commit-hooks.yaml")):
        command = [sys.executable, "-m", "pre_commit", f"validate-{what}", file]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a spec and its plan on main, and a branch that changes the spec."""
    folder = tmp_path / "repository"
    (folder / "specs").mkdir(parents=True)
    (folder / "specs" / "night.yaml").write_text(GOOD)
    assert dfmspec("plan", "specs", "-o", "plans", cwd=folder).returncode == 0
    for words in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "specs"],
        ["update-ref", "refs/remotes/origin/main", "HEAD"],
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def steps_of_github(job: str) -> list[str]:
    workflow: dict[str, Any] = yaml.safe_load((CI / "github.yml").read_text())
    return [step["run"] for step in workflow["jobs"][job]["steps"] if "run" in step]


def steps_of_gitlab() -> list[str]:
    job: dict[str, Any] = yaml.safe_load((CI / "gitlab.yml").read_text())["specs"]
    return [*job["before_script"], *job["script"]]


def run(steps: list[str], folder: Path, **env: str) -> list[subprocess.CompletedProcess[str]]:
    """The steps one after the other, with what is installed already in place of pip's work."""
    stubs = folder.parent / "stubs"
    stubs.mkdir(exist_ok=True)
    (stubs / "pip").write_text("#!/bin/sh\nexit 0\n")
    (stubs / "dfmspec").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dfmspec "$@"\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
    done = []
    for step in steps:
        command = ["bash", "-eo", "pipefail", "-c", step]
        result = subprocess.run(
            command, cwd=folder, env=environment(PATH=path, **env), capture_output=True, text=True, check=False
        )
        done.append(result)
        if result.returncode:
            break
    return done


def test_githubs_steps_show_the_plans_and_refuse_stale_ones(repository: Path) -> None:
    summary = repository.parent / "summary.md"
    fresh = run(steps_of_github("plan"), repository, GITHUB_STEP_SUMMARY=str(summary))
    assert [step.returncode for step in fresh] == [0, 0, 0], fresh[-1].stderr
    assert summary.read_text().strip() == "**night**: the plan is the same"

    summary.unlink()
    (repository / "specs" / "night.yaml").write_text(GOOD.replace("1000", "2000"))
    stale = run(steps_of_github("plan"), repository, GITHUB_STEP_SUMMARY=str(summary))
    assert [step.returncode for step in stale] == [0, 0, 3]
    assert "| `train.train_iters` | `1000` | `2000` |" in summary.read_text()


def test_gitlabs_steps_count_only_what_the_branch_has_changed(repository: Path) -> None:
    env = {"GITLAB_CI": "true", "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main"}
    assert [step.returncode for step in run(steps_of_gitlab(), repository, **env)] == [0, 0, 0]

    (repository / "specs" / "night.yaml").write_text(GOOD + "optimizer: {lrr: 1.0}\n")
    failed = run(steps_of_gitlab(), repository, **env)
    report = json.loads((repository / "gl-code-quality-report.json").read_text())
    assert [step.returncode for step in failed] == [0, 1]
    assert [(issue["check_name"], issue["location"]["path"]) for issue in report if issue["severity"] == "major"] == [
        ("SPC201", "specs/night.yaml")
    ]


def test_a_problem_matcher_matches_what_is_printed(repository: Path) -> None:
    matcher = json.loads((CI / "problem-matcher.json").read_text())["problemMatcher"][0]["pattern"][0]
    (repository / "specs" / "night.yaml").write_text("optimizer: {lrr: 1.0}\n")
    said = dfmspec("validate", "specs", "--format", "concise", cwd=repository).stdout
    found = [match for line in said.splitlines() if (match := re.match(matcher["regexp"], line))]

    assert [(match[matcher["file"]], match[matcher["line"]]) for match in found] == [("specs/night.yaml", "1")]


def test_the_editors_files_name_a_schema_that_takes_what_a_spec_may_write(tmp_path: Path) -> None:
    settings = json.loads((EDITORS / ".vscode" / "settings.json").read_text())
    helix = tomllib.loads((EDITORS / "helix" / "languages.toml").read_text())
    (place,) = settings["yaml.schemas"]
    assert place in helix["language-server"]["yaml-language-server"]["config"]["yaml"]["schemas"]
    assert place in (EDITORS / "neovim.lua").read_text()

    # It is what `dfmspec schema` prints, as the page says.
    page = (EDITORS / "README.md").read_text()
    command = re.search(r"```bash\n(.*?)```", page, re.DOTALL)
    assert command is not None
    run([command[1]], tmp_path)
    schema = json.loads((tmp_path / place).read_text())
    check = jsonschema.Draft7Validator(schema)
    written = yaml.safe_load(
        "target: dfm@7cb7634\ntrain: {train_iters: 20k, exit_duration_in_mins: 1h30m, global_batch_size: 64}\n"
        "optimizer: {lr: '${env:LR:-1.0e-4}'}\ncheckpoint: {save_interval: '${spec.train.train_iters}'}\n"
        "launcher: {time_limit: 4h, stop_before: 3m}\nmatrix: {rng.seed: [1, 2]}\n"
    )
    assert [error.message for error in check.iter_errors(written)] == []
    wrong = yaml.safe_load("target: dfm@1234567\n")
    assert list(check.iter_errors(wrong))
    for key, value in (("train_iters", "4h"), ("train_iters", "20 k"), ("exit_duration_in_mins", "20k")):
        assert list(check.iter_errors({"target": "dfm", "train": {key: value}})), (key, value)
