"""Profiles of a site, a user and a project: found, laid under the spec, checked, told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfmspec.plan.environment import environment, reason
from dfmspec.plan.plan import make_plan
from dfmspec.read.load import Spec, load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.read.sites import places
from tests.conftest import dfmspec


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The folders of profiles of a site, a user and a project, in a working directory of their own."""
    project = tmp_path / "project"
    found = {"site": tmp_path / "site", "user": tmp_path / "home/.config/dfmspec", "project": project / ".dfmspec"}
    for folder in found.values():
        (folder / "profiles").mkdir(parents=True)
    (project / ".git").mkdir()
    (project / "specs").mkdir()
    monkeypatch.setenv("DFMSPEC_SITE", str(found["site"]))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/.config"))
    monkeypatch.chdir(project)
    return found


def profile(folder: Path, name: str, text: str) -> None:
    (folder / "profiles" / f"{name}.yaml").write_text(text)


def spec(text: str, *overrides: str) -> Spec:
    Path("specs/s.yaml").write_text(text)
    return load_spec("specs/s.yaml", overrides)


def codes(found: Spec) -> list[str]:
    return [problem.code for problem in found.problems]


def test_a_profile_lies_under_the_spec_and_the_projects_over_the_users_over_the_sites(folders: dict[str, Path]) -> None:
    profile(folders["site"], "big", "cluster: {gpu: h100, nnodes: 2}\nlauncher: {kind: slurm, account: site}\n")
    profile(folders["user"], "big", "launcher: {account: ada, partition: debug}\n")
    profile(folders["project"], "big", "launcher: {partition: long}\n")
    found = spec("profile: big\ncluster: {nnodes: 4}\n")

    assert found.problems == ()
    assert (found.values["cluster.gpu"], found.values["cluster.nnodes"]) == ("h100", 4)
    assert (found.values["launcher.account"], found.values["launcher.partition"]) == ("ada", "long")
    assert found.origins["launcher.account"].layer == "profile"
    assert str(found.origins["launcher.account"].span) == f"{folders['user']}/profiles/big.yaml:1:12"
    assert str(found.origins["launcher.partition"].span) == ".dfmspec/profiles/big.yaml:1:12"


def test_profiles_are_laid_in_the_order_of_their_names_and_those_of_the_command_line_alone(
    folders: dict[str, Path],
) -> None:
    profile(folders["user"], "one", "cluster: {nnodes: 1}\nlauncher: {account: one}\n")
    profile(folders["user"], "two", "cluster: {nnodes: 2}\n")
    both = spec("profile: [one, two]\n")
    other = spec("profile: [one, two]\n", "profile=one")
    swapped = spec("profile: one\n", "profile=two,one")
    none = spec("profile: one\n", "profile=null")

    assert (both.values["cluster.nnodes"], both.values["launcher.account"]) == (2, "one")
    assert other.values["cluster.nnodes"] == 1
    assert swapped.values["cluster.nnodes"] == 1
    assert none.values["launcher.account"] is None


def test_a_profile_of_a_base_counts_where_the_spec_names_none(folders: dict[str, Path]) -> None:
    profile(folders["user"], "one", "cluster: {nnodes: 3}\n")
    Path("specs/base.yaml").write_text("profile: one\n")

    assert spec("extends: base.yaml\n").values["cluster.nnodes"] == 3


def test_a_profile_extends_and_its_paths_are_relative_to_it(folders: dict[str, Path]) -> None:
    (folders["project"] / "profiles/common.yaml").write_text("cluster: {gpu: h200}\n")
    profile(folders["project"], "one", "extends: common.yaml\ndataset: {path: ../../data}\n")
    found = spec("profile: one\n")

    assert found.values["cluster.gpu"] == "h200"
    assert found.values["dataset.path"] == "data"


def test_a_profile_is_checked_like_a_spec(folders: dict[str, Path]) -> None:
    profile(folders["user"], "one", "launcher: {partitoin: debug}\n")
    problem = spec("profile: one\n").problems[0]

    assert (problem.code, problem.span.file) == ("SPC201", f"{folders['user']}/profiles/one.yaml")
    assert "partition" in problem.hint


@pytest.mark.parametrize(
    ("name", "code"),
    [("tow", "SPC110"), ("../two", "SPC110"), (".", "SPC110"), ("'two,oen'", "SPC110"), ("7", "SPC202")],
)
def test_a_profile_that_is_nowhere_is_an_error(folders: dict[str, Path], name: str, code: str) -> None:
    profile(folders["user"], "two", "cluster: {nnodes: 2}\n")
    (folders["user"] / "two.yaml").write_text("cluster: {nnodes: 2}\n")

    assert codes(spec(f"profile: {name}\n")) == [code]


def test_a_near_name_is_told(folders: dict[str, Path]) -> None:
    profile(folders["site"], "h200", "cluster: {gpu: h200}\n")

    assert "did you mean h200?" in spec("profile: h20\n").problems[0].message


@pytest.mark.parametrize("text", ["name: x\n", "profile: one\n", "matrix: {optimizer.lr: [1, 2]}\n"])
def test_a_profile_has_no_keys_of_one_spec(folders: dict[str, Path], text: str) -> None:
    profile(folders["user"], "one", text)
    found = spec("profile: one\n")

    assert codes(found) == ["SPC111"]
    assert (found.name, found.cells) == ("s", ())


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"- a\n", b"a: [", b"7"])
def test_what_is_no_spec_is_told_in_the_profile(folders: dict[str, Path], content: bytes) -> None:
    (folders["user"] / "profiles/one.yaml").write_bytes(content)
    found = spec("profile: one\n")

    assert found.problems[0].span.file == f"{folders['user']}/profiles/one.yaml"


def test_a_profile_that_cannot_be_read_is_told(folders: dict[str, Path]) -> None:
    (folders["user"] / "profiles/one.yaml").symlink_to("/nowhere")
    (folders["user"] / "profiles/two.yaml").mkdir()

    assert codes(spec("profile: [one, two]\n")) == ["SPC104", "SPC104"]


def test_a_folder_above_the_repository_is_no_projects(folders: dict[str, Path]) -> None:
    outside = folders["project"].parent.parent / ".dfmspec/profiles"
    outside.mkdir(parents=True)
    inner = folders["project"].parent / "specs"
    (inner / ".git").mkdir()

    assert [place.whose for place in places(str(inner))] == ["site", "user"]


def test_a_spec_without_a_profile_reads_no_folder(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfmspec.read.sites.places", None)

    assert spec("train: {train_iters: 7}\n").problems == ()


def test_profiles_are_listed(folders: dict[str, Path]) -> None:
    profile(folders["site"], "big", "cluster: {nnodes: 2}\n")
    profile(folders["user"], "big", "cluster: {nnodes: 2}\n")
    found = json.loads(dfmspec("profiles", "specs", "--format", "json").stdout)

    assert found["folders"]["project"] == ".dfmspec"
    assert found["profiles"] == {
        "big": [f"{folders['site']}/profiles/big.yaml", f"{folders['user']}/profiles/big.yaml"]
    }


def test_profiles_of_the_command_line_reach_validate_and_plan(folders: dict[str, Path]) -> None:
    profile(folders["user"], "one", "launcher: {account: ada}\n")
    Path("specs/s.yaml").write_text("train: {train_iters: 7}\n")
    planned = dfmspec("plan", "specs/s.yaml", "--profile", "one", "--why", "launcher.account")
    checked = dfmspec("validate", "--check", "spec", "specs/s.yaml", "--profile", "one", "--profile", "nope")

    assert planned.stdout.startswith('launcher.account = "ada"  profile: ')
    assert checked.returncode == 1
    assert "SPC110" in checked.stdout


def test_an_empty_name_on_the_command_line_is_refused(folders: dict[str, Path]) -> None:
    Path("specs/s.yaml").write_text("")

    assert dfmspec("validate", "specs/s.yaml", "--profile", "").returncode == 2


def test_presets_are_variables_under_those_of_the_spec() -> None:
    presets = "launcher.env_presets=[infiniband, nccl_debug]"
    resolved = resolve_spec(load_spec(None, [presets, "launcher.env.NCCL_DEBUG=WARN"]))
    found = environment(resolved.values)

    assert (found["NCCL_NET"], found["NCCL_IB_TIMEOUT"], found["NCCL_DEBUG"]) == ("IB", "22", "WARN")
    assert reason("NCCL_NET", resolved.values).startswith("launcher.env_presets infiniband: ends a run")
    assert reason("NCCL_DEBUG", resolved.values) == "launcher.env"
    assert "env_presets" not in make_plan(resolved).launcher


def test_a_preset_that_is_not_known_is_an_error() -> None:
    problem = load_spec(None, ["launcher.env_presets=[infinband]"]).problems[0]

    assert (problem.code, problem.hint) == ("SPC203", "did you mean infiniband?")
