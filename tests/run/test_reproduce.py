"""The chain of a run is followed, and a run is made again from its record alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dfmspec.errors import PreflightError
from dfmspec.plan.plan import make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.record.checkpoints import read_manifest
from dfmspec.record.manifest import read_manifest as record_of
from dfmspec.record.run_dir import RunDir
from dfmspec.run.chain import chain
from dfmspec.run.matching import Difference, difference, plan_again
from dfmspec.run.request import Request
from dfmspec.run.sources import Sources
from tests.conftest import ROOT, TINY, dfmspec, once
from tests.record.test_provenance import git
from tests.tokens import tokens

SPEC = """\
cluster: {device: cpu, nproc_per_node: 1}
dataset: {path: data, task_encoder_seq_length: 64}
train: {train_iters: 3, eval_iters: 0}
checkpoint: {save_interval: 1}
run: {git: patch}
"""
TINY_WORDS = [word for word in TINY if not word.startswith("train.")]


def _made(folder: Path) -> None:
    folder.mkdir()
    (folder / "s.yaml").write_text(SPEC)
    git(folder, "init", "-q", "-b", "main")
    (folder / ".gitignore").write_text("/data\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    (folder / "s.yaml").write_text(SPEC + "name: changed\n")
    dfmspec("data", "prepare", "data", "--num-samples", 32, cwd=folder)
    result = dfmspec("run", "s.yaml", *TINY_WORDS, cwd=folder)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def made(shared: Path, tmp_path: Path) -> Path:
    """A folder of one's own with a run that has finished, and with what it was made from."""
    folder = once(shared / "reproduced", _made)
    shutil.copytree(folder, tmp_path / "made", symlinks=True)
    return tmp_path / "made"


def run_in(folder: Path) -> RunDir:
    return RunDir((folder / "runs/changed/latest").resolve())


def states(folder: Path, *words: str) -> dict[str, str]:
    result = dfmspec("verify", "changed", "--format", "json", *words, cwd=folder)
    links = json.loads(result.stdout)["links"]
    broken = any(link["broken"] for link in links)
    assert result.returncode == int(broken), result.stderr
    return {link["name"]: link["state"] for link in links}


def moved(folder: Path) -> dict[str, Any]:
    """The record of a run in a copy, with the paths that the copy has."""
    file = run_in(folder).manifest
    text = file.read_text()
    before = json.loads(text)["checkpoints"][0]["path"].partition("/runs/")[0]
    file.write_text(text.replace(before, str(folder)))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_link_of_a_run_holds_and_has_the_digest_of_the_one_before(made: Path) -> None:
    record = moved(made)
    names = ["spec.yaml", "source.patch", "plan.json", "config.yaml", "code", "data"]

    assert states(made) == dict.fromkeys([*names, *(f"checkpoint {number}" for number in (1, 2, 3))], "holds")
    assert record["git"]["branch"] == "main"
    assert record["git"]["changed"] == ["s.yaml"]
    assert "+name: changed" in run_in(made).patch.read_text()
    for checkpoint in record["checkpoints"]:
        stored = read_manifest(Path(checkpoint["path"]))
        for key in ("run_id", "plan_id", "config_digest"):
            assert stored[key] == record[key]


FAULTS: dict[str, tuple[str, str, str]] = {
    "a spec that was edited": ("spec.yaml", "spec.yaml", "differs"),
    "a patch that was edited": ("source.patch", "source.patch", "differs"),
    "a plan that was edited": ("plan.json", "plan.json", "differs"),
    "a configuration that was edited": ("config.yaml", "config.yaml", "differs"),
    "a shard of a checkpoint": ("checkpoints/iter_0000003/common.pt", "checkpoint 3", "differs"),
    "the manifest of a checkpoint": ("checkpoints/iter_0000002/manifest.json", "checkpoint 2", "differs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_link_that_was_changed_is_named(made: Path, fault: str) -> None:
    file, name, state = FAULTS[fault]
    moved(made)
    with (run_in(made).path / file).open("ab") as stream:
        stream.write(b"\nx: 1\n")
    found = states(made)

    assert found.pop(name) == state
    assert set(found.values()) == {"holds"}


def test_what_is_gone_is_told_as_gone(made: Path) -> None:
    moved(made)
    run = run_in(made)
    run.spec.unlink()
    shutil.rmtree(run.path / "checkpoints/iter_0000003")
    shutil.rmtree(run.path / "checkpoints/iter_0000001")
    found = states(made)

    assert (found["spec.yaml"], found["checkpoint 3"], found["checkpoint 1"]) == ("gone", "gone", "unknown")


def test_other_data_and_other_code_break_no_run(made: Path) -> None:
    moved(made)
    file = run_in(made).manifest
    record = json.loads(file.read_text())
    record["guards"]["code"] = "sha256:0"
    file.write_text(json.dumps(record))
    with next((made / "data").glob("*.tar")).open("ab") as shard:
        shard.write(b"x")
    found = states(made, "--deep")

    assert (found["data"], found["code"]) == ("differs", "differs")


def test_a_record_of_an_earlier_version_is_followed_as_far_as_it_goes() -> None:
    run = RunDir(ROOT / "tests/formats/2ade833/runs/tiny/latest")
    found = {link.name: link for link in chain(RunDir(run.path.resolve()), record_of(run))}

    assert (found["plan.json"].state, found["config.yaml"].state) == ("holds", "holds")
    assert found["data"].state == "unknown"


def test_a_run_that_is_made_again_has_the_same_losses_to_the_last_bit(made: Path) -> None:
    moved(made)
    result = dfmspec("reproduce", "changed", "--exact", cwd=made)

    assert result.returncode == 0, result.stderr
    assert "losses of 3 iterations: the same to the last bit" in result.stderr
    assert len(list((made / "runs/changed").glob("2*"))) == 2


def test_it_is_made_from_anothers_record_alone(made: Path, tmp_path: Path) -> None:
    # The record is copied to where neither the spec nor its repository is; of the data, the place is told.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run_in(made).path, elsewhere / "record")
    shutil.move(made / "data", tmp_path / "their_data")
    shutil.rmtree(made)
    result = dfmspec("reproduce", "record", "--dataset-path", tmp_path / "their_data", "--exact", cwd=elsewhere)

    assert result.returncode == 0, result.stderr
    assert "losses of 3 iterations: the same to the last bit" in result.stderr
    assert "differs  spec's commit" in result.stderr
    assert "same     data's shards" in result.stderr
    assert f"changed: dataset.path is {tmp_path / 'their_data'}" in result.stderr


def test_what_is_not_here_is_told_and_nothing_is_started(made: Path) -> None:
    file = run_in(made).manifest
    record = json.loads(file.read_text())
    record["environment"]["packages"]["torch"] = "1.13.0"
    record["environment"]["gpus"] = [{"name": "NVIDIA H200"}]
    file.write_text(json.dumps(record))
    result = dfmspec("reproduce", "changed", "--dry-run", cwd=made)

    assert result.returncode == 0
    assert "differs  torch" in result.stderr
    assert "1.13.0 -> " in result.stderr
    assert "NVIDIA H200 -> none" in result.stderr
    assert len(list((made / "runs/changed").glob("2*"))) == 1


def iteration(at: int, loss: float) -> dict[str, Any]:
    figures = {"loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0, "seconds": 1.0, "padding": 0.0}
    return {"type": "iteration", "time": 1.0, "iteration": at, **figures}


def test_another_loss_is_told_by_its_iteration(tmp_path: Path) -> None:
    runs = []
    for name, losses in (("a", [1.0, 0.5, 0.25]), ("b", [1.0, 0.5, 0.2500001])):
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        lines = [json.dumps(iteration(at, loss)) for at, loss in enumerate(losses, 1)]
        run.events.write_text("\n".join(lines) + "\n")
        runs.append(run)
    found = difference(*runs)

    assert found == Difference(3, 3, pytest.approx(4e-7))
    assert not found.is_exact
    assert difference(runs[0], runs[0]).is_exact
    assert not difference(runs[0], RunDir(tmp_path / "none")).is_exact


def test_checkpoints_of_the_first_run_are_not_written_over(made: Path) -> None:
    resolved = resolve_spec(load_spec(None, [*TINY_WORDS, "data.source=mock", "checkpoint.save=/data/first"]))
    plan, changed = plan_again(make_plan(resolved), record_of(run_in(made)), None, None)

    assert plan.config["checkpoint"]["save"] == "${RUN_DIR}/checkpoints"
    assert plan.run["resume"] == "never"
    assert "checkpoint.save is in the run's own directory, and not in /data/first" in changed


def asked(folder: Path, policy: str) -> Request:
    words = [*TINY_WORDS, "data.source=mock", f"run.git={policy}", f"run.output_dir={folder}/runs"]
    return Request(make_plan(resolve_spec(load_spec(folder / "s.yaml", words))), str(folder / "s.yaml"), "", (), print)


def test_a_run_may_ask_for_a_clean_repository(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "s.yaml").write_text("name: x\n")
    with pytest.raises(PreflightError, match="is in no repository of git; commit, or set run"):
        Sources.of(asked(folder, "require-clean"))
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    (folder / "runs").mkdir()
    (folder / "runs/log").write_text("")
    assert Sources.of(asked(folder, "require-clean")).patch is None
    (folder / "new").write_text("")
    with pytest.raises(PreflightError, match="and new differ from the commit"):
        Sources.of(asked(folder, "require-clean"))


def test_a_patch_with_a_secret_is_not_kept(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / "s.yaml").write_text("name: x\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    (folder / "s.yaml").write_text("name: x\n# " + tokens(9)["github-classic"][0])
    request = asked(folder, "patch")
    with pytest.raises(PreflightError, match="what looks like a secret"):
        Sources.of(request)


def test_verify_says_what_it_cannot_read(made: Path) -> None:
    run_in(made).manifest.write_text("{")
    result = dfmspec("verify", str(run_in(made)), cwd=made)

    assert result.returncode != 0
    assert "Traceback" not in result.stderr


def test_git_is_asked_of_the_spec_and_not_of_where_one_stands(made: Path, tmp_path: Path) -> None:
    said = subprocess.run(["git", "-C", str(made), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)

    assert record_of(run_in(made)).git is not None
    assert (Sources.of(asked(made, "record")).git or {})["commit"] == said.stdout.strip()
