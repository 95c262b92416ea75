"""Secrets of a run: by reference alone, there for its processes, and in nothing that is written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from dfmspec.check.rules import check_spec
from dfmspec.errors import PreflightError
from dfmspec.plan.environment import environment as variables
from dfmspec.plan.plan import make_plan
from dfmspec.plan.scripts import node_script
from dfmspec.plan.secrets import shell_lines
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.record.scrub import scrub
from dfmspec.redaction import MASK
from dfmspec.run import secrets
from dfmspec.run.secrets import filled_in
from tests.conftest import TINY, dfmspec
from tests.tokens import tokens

REFERENCES = {"A_KEY": "env:MY_VALUE", "B": "file:~/secret", "C": "cmd:cat ~/other"}
VALUES = {"A_KEY": "of a variable", "B": "of a file", "C": "of-a-command"}

PHRASE = "correct horse battery staple"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with what REFERENCES name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MY_VALUE", VALUES["A_KEY"])
    monkeypatch.setattr("dfmspec.redaction._remembered", set())
    (tmp_path / "secret").write_text(f"{VALUES['B']}\n")
    (tmp_path / "other").write_text(f"{VALUES['C']}\n")
    return tmp_path


def under(folder: Path) -> str:
    """All that is written under a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return "\n".join(f"{file}\n{file.read_bytes().decode(errors='replace')}" for file in files)


def test_references_are_filled_in_alike_by_a_script_and_by_a_launch(home: Path) -> None:
    script = "\n".join(["set -euo pipefail", *shell_lines(REFERENCES), "env -0"])
    told = subprocess.run(["bash", "-xc", script], capture_output=True, text=True, check=True)
    by_script = dict(line.split("=", 1) for line in told.stdout.split("\0") if "=" in line)

    assert filled_in(REFERENCES) == VALUES
    assert {name: by_script[name] for name in VALUES} == VALUES
    assert not any(value in told.stderr for value in VALUES.values())


@pytest.mark.parametrize("reference", ["env:NOT_SET", "file:/not/there", "cmd:false", "cmd:exit 7"])
def test_a_secret_that_is_not_there_ends_the_start_by_its_name(home: Path, reference: str) -> None:
    script = "\n".join(["set -euo pipefail", *shell_lines({"X": reference}), "echo on"])
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)

    assert (told.returncode, told.stdout) == (4, "")
    assert told.stderr == f"error: the secret of X, {reference}, is not on this node\n"
    with pytest.raises(PreflightError, match=f"the secret of X, {reference}, is not on this machine"):
        filled_in({"X": reference})


def test_a_command_that_does_not_end_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_SECONDS", 0.2)

    with pytest.raises(PreflightError, match="did not end"):
        filled_in({"X": "cmd:sleep 9"})


def test_a_plan_holds_the_reference_alone() -> None:
    words = ["launcher.env.HF_TOKEN.secret=env:MY_TOKEN", "launcher.env.NCCL_DEBUG=WARN", "data.source=mock"]
    resolved = resolve_spec(load_spec(None, words))
    made = make_plan(resolved)

    assert "SEC101" not in {finding.code for finding in check_spec(resolved, levels=("spec",))}
    assert "HF_TOKEN" not in variables(resolved.values)
    assert made.secrets == {"HF_TOKEN": "env:MY_TOKEN"}
    assert 'export HF_TOKEN="$MY_TOKEN"' in node_script(made, 0)


@pytest.mark.parametrize("reference", ["MY_TOKEN", "env:MY TOKEN", "file:relative", "cmd:", "vault:x"])
def test_a_reference_of_no_kind_is_an_error(reference: str) -> None:
    problem = load_spec(None, [f"launcher.env.HF_TOKEN.secret={reference}"]).problems[0]

    assert problem.code in ("SPC202", "SPC204")
    assert "env:NAME, file:/PATH or cmd:COMMAND" in f"{problem.message} {problem.hint}"


def test_a_container_is_given_the_names_of_secrets() -> None:
    words = ["launcher.env.MY_SECRET.secret=file:/x", "launcher.container=a/b:c", "recipe=dit_tiny"]
    script = node_script(make_plan(resolve_spec(load_spec(None, words))), 0)

    assert " MY_SECRET; do words+=(--env" in script
    assert script.index("MY_SECRET=$(cat -- /x") < script.index("docker run")
    assert 'if [ -z "${DFMSPEC_INSIDE:-}" ]; then\n    { set +x; }' in script


@pytest.mark.parametrize("kind", tokens(5))
def test_a_literal_secret_is_an_error_wherever_it_stands_and_is_not_shown(tmp_path: Path, kind: str) -> None:
    text, secret = tokens(5)[kind]
    quoted = json.dumps(text)
    places = {
        "setup": f"launcher: {{setup: [{quoted}]}}",
        "options": f"launcher: {{kind: slurm, sbatch_options: [{json.dumps('--comment=' + text)}]}}",
        "env": f"launcher: {{env: {{INNOCENT: {quoted}}}}}",
        "path": f"dataset: {{path: {quoted}}}",
        "comment": "train: {train_iters: 7}\n" + "\n".join(f"# {line}" for line in text.splitlines()),
    }
    file = tmp_path / "s.yaml"
    for place, spec in places.items():
        file.write_text(spec + "\n")
        resolved = resolve_spec(load_spec(file))
        found = check_spec(resolved, levels=("spec",))
        # A key of several lines is none in comments or an option.
        if "\n" in text and place in ("comment", "options"):
            continue
        assert "SEC101" in {finding.code for finding in found}, place
        assert secret not in str(found), place


def test_a_secret_over_two_lines_and_one_of_digits_is_an_error_and_not_shown(tmp_path: Path) -> None:
    token = tokens(5)["github-classic"][0]
    file = tmp_path / "s.yaml"
    for spec, secret in (
        (f'launcher:\n  env:\n    FOO: "{token[:20]}\\\n      {token[20:]}"\n', token),
        ("launcher: {env: {DB_PASSWORD: 48291734}}\n", "48291734"),
        (f"x_{token}: 1\n", token),
    ):
        file.write_text(spec)
        result = dfmspec("validate", "--check", "spec", file)
        assert "SEC101" in result.stdout, spec
        assert secret not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "variable", ["USE_AUTH_TOKEN=true", "HF_HUB_DISABLE_IMPLICIT_TOKEN=1", "HF_TOKEN=none", "CLASS_TOKEN=learned"]
)
def test_a_switch_is_no_secret(variable: str) -> None:
    resolved = resolve_spec(load_spec(None, [f"launcher.env.{variable}"]))

    assert "SEC101" not in {finding.code for finding in check_spec(resolved, levels=("spec",))}


def test_nothing_that_a_run_writes_has_a_secret(home: Path) -> None:
    made = tokens(6)
    said = home / "said.txt"
    said.write_text("\n".join(text for text, _ in made.values()))
    (home / "s.yaml").write_text(
        "data: {source: mock}\ncluster: {device: cpu, nproc_per_node: 1}\n"
        "dataset: {task_encoder_seq_length: 64}\n"
        "train: {train_iters: 2}\ncheckpoint: {save_interval: 2}\n"
        "launcher:\n"
        f"  setup: ['cat {said}', 'printf \"%s\\n\" \"<$A_KEY> <$B> <$C>\"', 'echo \"the rest\"']\n"
        f"  env: {json.dumps({name: {'secret': reference} for name, reference in REFERENCES.items()})}\n"
    )
    planned = dfmspec("plan", "s.yaml", *TINY[1:], "-o", "b", cwd=home)
    result = dfmspec("run", "s.yaml", *TINY[1:], cwd=home, HF_TOKEN=PHRASE)
    written = under(home / "runs") + under(home / "b") + result.stdout + result.stderr + planned.stdout + planned.stderr

    assert result.returncode == 0, result.stderr
    for name, value in {**VALUES, "HF_TOKEN": PHRASE}.items():
        assert value not in written, name
    for kind, (_, secret) in made.items():
        assert secret not in written, kind
    log = next((home / "runs/s").glob("2*/attempts/1/node0/torchrun.log")).read_text()
    assert f"<{MASK}> <{MASK}> <{MASK}>" in log
    assert "the rest" in log


def test_a_failure_is_told_without_its_secrets(home: Path) -> None:
    token = tokens(7)["hugging-face"][0]
    (home / "s.yaml").write_text("cluster: {device: cpu, nproc_per_node: 1}\ndataset: {task_encoder_seq_length: 64}\n")
    result = dfmspec("run", "s.yaml", "data.source=mock", f"model.num_layers={token}", cwd=home)

    assert result.returncode == 1
    assert token not in result.stdout + result.stderr


def test_files_without_secrets_stay_as_they_are_and_long_ones_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"loss \xff 0.5\n")
    before = plain.stat()
    token = tokens(8)["github-classic"][0]
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/log").write_bytes(b"\xff " + token.encode() + b" end\n")
    (tmp_path / "link").symlink_to("/etc/hostname")
    monkeypatch.setattr("dfmspec.record.scrub._MOST", 100)
    (tmp_path / "long").write_text("x" * 101)

    assert scrub(tmp_path) == [tmp_path / "long"]
    assert plain.stat().st_ino == before.st_ino
    assert (tmp_path / "inner/log").read_bytes() == b"\xff " + MASK.encode() + b" end\n"
    assert (tmp_path / "link").readlink() == Path("/etc/hostname")
