"""What a node is looked at for before anything starts: each check, with place, what is, what is needed, a way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dfmspec.errors import PreflightError
from dfmspec.plan.plan import Plan, make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.run import probe
from dfmspec.run.preflight import Preflight, interpreter_lines, look_here, question
from tests.conftest import dfmspec

STAND_IN = Path(__file__).parent / "standin"
PROBE = Path(probe.__file__)


def plan_of(*words: str) -> Plan:
    return make_plan(resolve_spec(load_spec(None, ["target=dfm", "data.source=mock", *words])))


def asked(**other: Any) -> dict[str, Any]:
    nothing: dict[str, Any] = {
        "modules": {}, "distributions": [], "sources": [], "together": [], "gpus": 0, "any_revision": False,
        "root": "/nowhere", "variable": "DFM_ROOT",
    }  # fmt: skip
    return nothing | other


def faults(question_: dict[str, Any], tmp_path: Path, **env: str) -> list[dict[str, str]]:
    """What the probe finds, run as a node runs it."""
    file, answer = tmp_path / "question.json", tmp_path / "answer.json"
    file.write_text(json.dumps(question_))
    done = subprocess.run(
        [sys.executable, str(PROBE), str(file), str(answer)], env=os.environ | env, capture_output=True, check=False
    )
    found: list[dict[str, str]] = json.loads(answer.read_text())["faults"]
    assert done.returncode == (4 if found else 0)
    assert done.stderr.count(b"error: ") == len(found)
    return found


def installed(folder: Path, name: str, version: str, *modules: str) -> None:
    """A distribution in a folder, with empty modules."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module in modules:
        (folder / f"{module}.py").touch()


def source(place: Path, **other: Any) -> dict[str, Any]:
    (place / "package").mkdir(parents=True)
    (place / "package" / "__init__.py").write_text("a = 1\n")
    digest = probe._digest(place / "package")
    return {"name": "Package", "revision": "abc1234", "module": "package", "digest": digest} | other


def test_code_at_its_revision_passes_and_changed_code_does_not(tmp_path: Path) -> None:
    known = source(tmp_path / "code")
    words = asked(sources=[known])
    path = str(tmp_path / "code")
    assert not faults(words, tmp_path, PYTHONPATH=path)

    (tmp_path / "code" / "package" / "__init__.py").write_text("a = 2\n")
    (found,) = faults(words, tmp_path, PYTHONPATH=path)
    assert found["check"] == "revision"
    assert found["place"] == f"{path}/package"
    assert "another revision than abc1234, or was changed" in found["is"]
    assert "--allow-revision" in found["way_out"]
    assert not faults(words | {"any_revision": True}, tmp_path, PYTHONPATH=path)


def test_a_file_more_is_another_revision_and_bytecode_is_not(tmp_path: Path) -> None:
    known = source(tmp_path / "code")
    package = tmp_path / "code" / "package"
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("")
    assert probe._digest(package) == known["digest"]
    (package / "more.py").touch()
    assert probe._digest(package) != known["digest"]


def test_code_that_is_not_there_names_what_to_set(tmp_path: Path) -> None:
    known = source(tmp_path / "code")
    (found,) = faults(asked(sources=[known]), tmp_path)
    assert found["place"] == "/nowhere"
    assert found["is"] == "there is no such folder"
    for word in ("launcher.root", "DFM_ROOT", "launcher.python", "PYTHONPATH"):
        assert word in found["way_out"]

    (found,) = faults(asked(sources=[known], root=str(tmp_path)), tmp_path)
    assert found["place"] == sys.executable
    assert "does not find package" in found["is"]
    (found,) = faults(asked(sources=[known | {"module": "a/b.py"}], root=str(tmp_path)), tmp_path)
    assert found["place"] == f"{tmp_path}/a/b.py"


def test_an_interpreter_without_torch_is_told_apart(tmp_path: Path) -> None:
    (found,) = faults(asked(modules={"torch_of_nobody": "install it"}), tmp_path)

    assert (found["place"], found["way_out"]) == (sys.executable, "install it")


@pytest.mark.parametrize(
    ("others", "needed"),
    [
        ([("multi-storage-client", "1.3.1")], "multi-storage-client<1"),
        ([("multi-storage-client", "1.0")], "multi-storage-client<1"),
        ([("multi-storage-client", "0.33.0")], None),
    ],
)
def test_versions_that_fail_together_come_with_the_line_that_mends_them(
    others: list[tuple[str, str]], needed: str | None, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    installed(site, "megatron-energon", "6.0.1", "av", "bitstring", "ebmlite", "soundfile")
    for name, version in others:
        installed(site, name, version)
    words = question(plan_of(), Preflight())
    of_data = question(plan_of("data.source=webdataset", "dataset.path=/data"), Preflight())
    assert words["together"] == []

    found = faults(asked(together=of_data["together"]), tmp_path, PYTHONPATH=str(site))
    assert [fault["way_out"] for fault in found] == ([f"pip install '{needed}'"] if needed else [])


def test_energon_6_without_its_decoder_is_told(tmp_path: Path) -> None:
    site = tmp_path / "site"
    installed(site, "megatron-energon", "6.0.1", "av")
    installed(site, "multi-storage-client", "0.33.0")
    of_data = question(plan_of("data.source=webdataset", "dataset.path=/data"), Preflight())
    (found,) = faults(asked(together=of_data["together"]), tmp_path, PYTHONPATH=f"{site}")

    assert "without bitstring, ebmlite, soundfile" in found["is"]
    assert found["way_out"] == "pip install 'megatron-energon[av_decode]<7'"


def test_a_machine_without_a_driver_or_with_a_torch_for_the_cpu_is_told(tmp_path: Path) -> None:
    found = faults(asked(gpus=2), tmp_path, CUDA_VISIBLE_DEVICES="0")
    checks = {fault["check"] for fault in found}

    assert "torch" in checks or "driver" in checks
    assert all(fault["way_out"] for fault in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#!/opt/venv/bin/python3.12\nimport re\n", "/opt/venv/bin/python3.12"),
        ("#!/usr/bin/env python3\nimport re\n", "python3"),
        ("#!/bin/sh\n'''exec' \"/a long/venv/bin/python\" \"$0\" \"$@\"\n' '''\n", "/a long/venv/bin/python"),
        ("#!/bin/sh\n'''exec' /venv/bin/python \"$0\" \"$@\"\n' '''\n", "/venv/bin/python"),
        ("#!/usr/bin/env bash\nexec python\n", "python3"),
        ("#!/opt/venv/bin/python -s\nimport re\n", "/opt/venv/bin/python"),
    ],
)
def test_the_interpreter_is_the_one_that_torchrun_has(text: str, expected: str, tmp_path: Path) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(text)
    torchrun.chmod(0o755)
    lines = [*interpreter_lines(plan_of()), 'echo "$python"']
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", "\n".join(lines)], env=env, capture_output=True, text=True, check=False)

    assert done.stdout.strip() == expected, done.stderr


def test_a_named_interpreter_is_taken_and_one_that_is_not_there_told(tmp_path: Path) -> None:
    here = plan_of(f"launcher.python={sys.executable}", "cluster.device=cpu", f"launcher.root={STAND_IN}")
    assert look_here(here, Preflight(any_revision=True))["interpreter"] == sys.executable

    with pytest.raises(PreflightError, match="/nowhere/python"):
        look_here(plan_of("launcher.python=/nowhere/python"), Preflight())


def test_no_torchrun_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfmspec.run.preflight.path_here", lambda: "/usr/bin:/bin")
    with pytest.raises(PreflightError, match=r"torchrun is not found on PATH .* set launcher.python"):
        look_here(plan_of(), Preflight())


def test_nothing_is_made_before_all_is_there(tmp_path: Path) -> None:
    words = ["target=dfm", "data.source=mock", "cluster.device=cpu"]
    (tmp_path / "spec.yaml").write_text("spec_version: 1\n")
    done = dfmspec("run", "spec.yaml", *words, cwd=tmp_path, DFM_ROOT=str(tmp_path / "gone"))

    assert done.returncode == 4
    assert f"{tmp_path}/gone: there is no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["spec.yaml"]


def test_levels_are_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("spec_version: 1\n")
    done = dfmspec("run", "spec.yaml", "--preflight", "all", cwd=tmp_path)

    assert done.returncode == 2
    assert "--preflight all: one of off, quick" in done.stderr


def test_a_temporary_folder_may_have_a_name_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    here = plan_of(f"launcher.python={sys.executable}", "cluster.device=cpu", f"launcher.root={STAND_IN}")

    assert look_here(here, Preflight(any_revision=True))["interpreter"] == sys.executable


def test_a_look_that_takes_too_long_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 5\n")
    slow.chmod(0o755)
    monkeypatch.setattr("dfmspec.run.preflight._SECONDS", 1)

    with pytest.raises(PreflightError, match="took more than 60 s"):
        look_here(plan_of(f"launcher.python={slow}"), Preflight())


def test_the_interpreter_that_is_looked_at_is_the_one_that_trains(tmp_path: Path) -> None:
    """Also where launcher.setup puts another torchrun first."""
    other = tmp_path / "bin"
    other.mkdir()
    torchrun = other / "torchrun"
    torchrun.write_text(f"#!{sys.executable}\nimport sys; sys.exit('the other torchrun')\n")
    torchrun.chmod(0o755)
    (tmp_path / "spec.yaml").write_text("spec_version: 1\n")
    words = ["target=dfm", "data.source=mock", "cluster.device=cpu", f"launcher.root={STAND_IN}"]
    words += [f'launcher.setup=["export PATH={other}:$PATH"]', "--allow-revision"]
    done = dfmspec("run", "spec.yaml", *words, cwd=tmp_path)

    assert done.returncode == 1
    assert "the other torchrun" in done.stderr
