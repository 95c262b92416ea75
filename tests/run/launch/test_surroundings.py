"""What surrounds a launch - variables of another launcher, a pod, a shell - changes neither a plan nor its command."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from dfmspec.namesakes import namesakes, told
from dfmspec.plan.plan import Plan, make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.record.run_dir import RunDir
from dfmspec.run.bundle import bundle_files, write_bundle
from dfmspec.run.launch import Place, local
from tests.conftest import ROOT, dfmspec

GOLDEN = sorted((ROOT / "tests" / "golden").glob("*/spec.yaml"))
_TORCH = find_spec("torch")
assert _TORCH is not None
assert _TORCH.origin is not None
_RUN = Path(_TORCH.origin).with_name("distributed") / "run.py"
FLAGS = sorted(set(re.findall(r'"--([a-z][a-z_-]+)"', _RUN.read_text())))
"""torchrun's flags, each of which it takes from a variable too."""
STRAYS = (
    *(f"PET_{flag.replace('-', '_').upper()}" for flag in FLAGS),
    *(f"TORCHELASTIC_{word}" for word in ("ERROR_FILE", "RUN_ID", "RESTART_COUNT", "MAX_RESTARTS", "USE_AGENT_STORE")),
    *("TORCH_ELASTIC_WORKER_IDENTICAL", "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "NODE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "PYTHON_EXEC", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONOPTIMIZE"),
)
GIVEN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES", "CUDA_VISIBLE_DEVICES", "CDPATH", "PYTHONPATH", "HOSTNAME")
"""What a run was given, and what a person has: it stays, and is no part of the command."""
VALUES = ("0", "1", "7", "29500", "gpu-7", "/tmp/x y", "$(touch /tmp/broken)", "")


def _environments(count: int, **always: str) -> Iterator[dict[str, str]]:
    draw = random.Random(1)
    for _ in range(count):
        names = draw.sample(STRAYS, draw.randint(1, 12)) + draw.sample(GIVEN, draw.randint(0, 3))
        yield {name: draw.choice(VALUES) for name in names} | always


def _stub(folder: Path) -> Path:
    """A torchrun that leaves its words and its variables in the file `seen`."""
    folder.mkdir()
    stub = folder / "torchrun"
    stub.write_text(f'#!/bin/bash\n{{ printf "%s\\0" "$@"; echo; /usr/bin/env -0; }} > "{folder}/seen"\n')
    stub.chmod(0o755)
    return folder / "seen"


def _read(seen: Path) -> tuple[str, dict[str, str]]:
    """The words, and the variables less those that stay as they are given or that a shell counts up."""
    words, _, variables = seen.read_text().partition("\n")
    seen.unlink()
    env = dict(line.partition("=")[::2] for line in variables.split("\0") if line)
    return words, {name: value for name, value in env.items() if name not in (*GIVEN, "_", "SHLVL", "PWD", "OLDPWD")}


def _plan(name: str) -> Plan:
    return make_plan(resolve_spec(load_spec(ROOT / "tests" / "golden" / name / "spec.yaml")))


def test_a_plan_is_the_same_whatever_surrounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(2)
    for env in _environments(200):
        file = draw.choice(GOLDEN)
        plain = bundle_files(make_plan(resolve_spec(load_spec(file))))
        with monkeypatch.context() as surrounded:
            for name, value in env.items():
                surrounded.setenv(name, value)
            made = bundle_files(make_plan(resolve_spec(load_spec(file))))

        assert made == plain, env


@pytest.mark.parametrize("name", ["core_one_node", "core_howto"])
def test_a_script_starts_torchrun_the_same_whatever_surrounds_it(name: str, tmp_path: Path) -> None:
    """One node meets nobody; several meet where whoever starts them by hand says."""
    plan = _plan(name)
    seen = _stub(tmp_path / "bin")
    write_bundle(plan, tmp_path / "plan")
    (tmp_path / "7" / "plan").mkdir(parents=True)  # where CDPATH may lead
    always = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": "/nowhere"}
    if plan.nnodes > 1:
        always |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29411"}
    outcomes = set()
    for env in ({}, *_environments(100)):
        done = subprocess.run(
            ["bash", "plan/node0.sh"], cwd=tmp_path, env=env | always, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (env, done.stderr)
        words, variables = _read(seen)
        outcomes.add((words, tuple(sorted(variables.items()))))

    assert len(outcomes) == 1


def test_a_launch_starts_torchrun_the_same_whatever_surrounds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _stub(tmp_path / "bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(local, "free_port", lambda: 20001)
    monkeypatch.setattr(os, "environ", {"PATH": "/usr/bin:/bin", "HOME": "/nowhere"})
    around = dict(os.environ)
    plan = _plan("core_one_node")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    outcomes = set()
    for env in ({}, *_environments(100)):
        monkeypatch.setattr(os, "environ", env | around)
        handle = local.launch(plan, Place(run, 1, lambda line: None))
        while handle.poll() == [None]:
            os.sched_yield()
        handle.kill()
        words, variables = _read(seen)
        outcomes.add((words, tuple(sorted(variables.items()))))

    assert len(outcomes) == 1


def test_what_the_spec_names_reaches_torchrun(tmp_path: Path) -> None:
    seen = _stub(tmp_path / "bin")
    words = ["cluster.nproc_per_node=2", "data.source=mock", "launcher.setup=['export OMP_NUM_THREADS=8']"]
    spec = load_spec(None, [*words, "launcher.env={PET_MAX_RESTARTS: '3'}"])
    write_bundle(make_plan(resolve_spec(spec)), tmp_path / "plan")
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "DFMSPEC_MASTER_PORT": "20001", "PET_NNODES": "4"}
    subprocess.run(["bash", tmp_path / "plan" / "node0.sh"], cwd=tmp_path, env=env, check=True)
    _, variables = _read(seen)

    assert variables["OMP_NUM_THREADS"] == "8"
    assert variables["PET_MAX_RESTARTS"] == "3"
    assert variables["PET_MASTER_PORT"] == "20001"
    assert "PET_NNODES" not in variables


# Namesakes.


def test_files_that_would_be_imported_in_place_of_packages_are_named(tmp_path: Path) -> None:
    for name in ("torch/__init__.py", "yaml.py", "random.py", "mine.py", "megatron/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    assert [path.name for path in namesakes(f"/no/such:{tmp_path}")] == ["random.py", "torch", "yaml.py"]
    assert told(str(ROOT)) == ""
    assert told("") == ""


@pytest.mark.parametrize("part", ["", "."])
def test_a_namesake_that_stops_dfmspec_itself_is_named(part: str, tmp_path: Path) -> None:
    (tmp_path / "yaml.py").touch()
    result = dfmspec("validate", "spec.yaml", cwd=tmp_path, PYTHONPATH=f"{ROOT}:{part}")

    assert result.returncode == 4
    assert f"PYTHONPATH puts {tmp_path / 'yaml.py'} in place of what is installed" in result.stderr


def test_a_namesake_beside_the_spec_does_no_harm(tmp_path: Path) -> None:
    for name in ("yaml.py", "typer.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('a namesake')\n")
    (tmp_path / "spec.yaml").write_text("data: {source: mock}\n")

    assert dfmspec("validate", "spec.yaml", "--check", "spec", cwd=tmp_path).returncode == 0
