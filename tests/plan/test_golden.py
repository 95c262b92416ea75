"""The golden plans (tests/golden/NAME, written by tools/generate.py): the same bytes anywhere, safe in every shell."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmspec.plan.describe import described
from dfmspec.plan.plan import VARIABLES, Plan, make_plan
from dfmspec.plan.scripts import RANK_PROGRAM, shell_command
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.run.bundle import GUARDS, at, bundle_files
from dfmspec.run.preflight import RANK_FILE
from tests.conftest import ROOT, dfmspec

GOLDEN = sorted((ROOT / "tests" / "golden").glob("*/spec.yaml"))
NAMES = [file.parent.name for file in GOLDEN]


def plan_of(file: Path, *overrides: str, text: str | None = None) -> Plan:
    return make_plan(resolve_spec(load_spec(file, overrides, text=text)))


def test_the_goldens_cover_every_target_and_launcher() -> None:
    plans = [plan_of(file) for file in GOLDEN]

    assert len(plans) >= 12
    assert {plan.target for plan in plans} == {"megatron_core", "dfm", "dfm_wan", "dfm_flux"}
    assert {(plan.launcher["kind"], plan.nnodes > 1) for plan in plans} >= {
        (kind, True) for kind in ("local", "ssh", "slurm", "kubernetes")
    } | {("local", False)}


@pytest.mark.parametrize("file", GOLDEN, ids=NAMES)
def test_a_plan_compiles_to_its_golden_bundle(file: Path) -> None:
    plan = plan_of(file)
    bundle = bundle_files(at(plan, file.parent / "plan"))
    del bundle[GUARDS]
    programs = {name for name in bundle if name.startswith("examples/") or name == RANK_PROGRAM}
    made = {name: text.encode() for name, text in bundle.items() if name not in programs}
    golden = {
        str(path.relative_to(file.parent / "plan")): path.read_bytes()
        for path in (file.parent / "plan").rglob("*")
        if path.is_file()
    }

    assert made == golden
    assert (RANK_PROGRAM in programs) == (plan.target != "megatron_core")
    assert bundle.get(RANK_PROGRAM) in (None, RANK_FILE.read_text())


def _shuffled(node: Any, seed: int) -> Any:
    if not isinstance(node, dict):
        return node
    keys = list(node)
    random.Random(seed).shuffle(keys)
    return {key: _shuffled(node[key], seed) for key in keys}


@pytest.mark.parametrize("file", GOLDEN, ids=NAMES)
def test_the_order_of_keys_does_not_matter(file: Path) -> None:
    data = yaml.safe_load(file.read_text())
    for seed in range(3):
        text = yaml.safe_dump(_shuffled(data, seed), sort_keys=False, allow_unicode=True)
        assert bundle_files(plan_of(file, text=text)) == bundle_files(plan_of(file))


@pytest.mark.parametrize("name", ["core_hostile", "dfm_slurm", "core_kubernetes", "core_relative", "dfm_relative"])
def test_the_machine_does_not_matter(name: str, tmp_path: Path) -> None:
    """Working directory, hash seed, locale, time zone and the user's variables."""
    shutil.copy(ROOT / "tests" / "golden" / name / "spec.yaml", tmp_path / "spec.yaml")
    environments = [
        (ROOT, {"PYTHONHASHSEED": "0"}),
        (tmp_path, {"PYTHONHASHSEED": "4242", "LC_ALL": "C", "TZ": "Asia/Tokyo"}),
        (
            Path("/"),
            {
                "LC_ALL": "C.UTF-8",
                "COLUMNS": "20",
                "MASTER_ADDR": "elsewhere",
                "NODE_RANK": "3",
                "WANDB_RUN_ID": "x",
                "PYTHONUTF8": "0",
            },
        ),
    ]
    for number, (folder, variables) in enumerate(environments):
        done = dfmspec("plan", tmp_path / "spec.yaml", "-o", tmp_path / str(number), cwd=folder, **variables)
        assert done.returncode == 0, done.stderr
        for place in range(number + 1):
            assert (
                dfmspec(
                    "plan", tmp_path / "spec.yaml", "--check", tmp_path / str(place), cwd=folder, **variables
                ).returncode
                == 0
            )
    bundles = [
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "0", tmp_path / "1", tmp_path / "2")
    ]

    assert bundles[0] == bundles[1] == bundles[2]


def test_a_path_of_the_command_line_is_the_same_plan_wherever_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "a.yaml").write_text("cluster: {nproc_per_node: 8}\n")
    plans = [
        dfmspec("plan", file, f"dataset.path={path}", "--format", "json", cwd=folder).stdout
        for folder, file, path in ((tmp_path, "specs/a.yaml", "data/x"), (tmp_path / "specs", "a.yaml", "../data/x"))
    ]
    elsewhere = dfmspec("plan", "a.yaml", "dataset.path=data/x", "--format", "json", cwd=tmp_path / "specs").stdout
    ids = [json.loads(text)["plan_id"] for text in (*plans, elsewhere)]

    assert ids[0] == ids[1] != ids[2]
    assert "--dataset-path data/x\n" in dfmspec("plan", "specs/a.yaml", "dataset.path=data/x", cwd=tmp_path).stdout


SCRIPTS = [
    path for file in GOLDEN for path in sorted((file.parent / "plan").iterdir()) if path.suffix in (".sh", ".sbatch")
]


def test_the_scripts_pass_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--shell=bash", *SCRIPTS], capture_output=True, text=True, check=False)

    assert len(SCRIPTS) > 30
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", GOLDEN, ids=NAMES)
def test_torchrun_knows_every_option_and_the_script_gets_its_own(file: Path) -> None:
    from torch.distributed.run import get_args_parser

    made = plan_of(file)
    filled = dict.fromkeys(VARIABLES, "1")
    known = get_args_parser().parse_args([filled.get(word, word) for word in made.argv(made.nnodes - 1)[1:]])

    assert known.nnodes == (str(made.nnodes) if made.nnodes > 1 else "1:1")
    assert known.nproc_per_node == str(made.command[made.command.index("--nproc-per-node") + 1])
    assert known.training_script.startswith("examples/megatron/recipes/")
    assert known.training_script_args == list(made.command[made.command.index(known.training_script) + 1 :])


def _words(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.parametrize("file", GOLDEN, ids=NAMES)
def test_every_command_survives_the_shell(file: Path) -> None:
    made = plan_of(file)
    for node in {0, made.nnodes - 1}:
        assert _words(shell_command(made.words(node))) == list(made.argv(node))


@pytest.mark.parametrize("target", ["megatron_core", "dfm"])
@pytest.mark.parametrize(
    "path",
    [
        "/data/my config.yaml",
        "$MASTER_ADDR",
        "$NODE_RANK",
        "config.yaml",
        "examples/megatron/recipes/dit/pretrain_dit_model.py",
        "torchrun",
    ],
)
def test_a_path_that_looks_like_a_word_of_the_command_stays_a_path(path: str, target: str, tmp_path: Path) -> None:
    """What torchrun is given, on the second of two nodes."""
    (tmp_path / "spec.yaml").write_text("cluster: {nnodes: 2, nproc_per_node: 8}\n")
    resolved = resolve_spec(load_spec(tmp_path / "spec.yaml", [f"dataset.path={path}", f"target={target}"]))
    made = make_plan(resolved)
    for name, text in bundle_files(at(made, tmp_path)).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "torchrun").write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    (tmp_path / "torchrun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MASTER_ADDR": "head", "MASTER_PORT": "6000"}
    words = subprocess.run(
        ["bash", tmp_path / "node1.sh"], env=env, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    root = "/opt/DFM" if target == "dfm" else tmp_path

    assert words[:8] == ["--nproc-per-node", "8", "--nnodes", "2", "--node-rank", "1", "--master-addr", "head"]
    assert words[-3] == f"{root}/examples/megatron/recipes/dit/pretrain_dit_model.py"
    assert words[-2:] == (
        ["--config-file", f"{tmp_path}/config.yaml"]
        if target == "dfm"
        else ["--dataset-path", path if path.startswith("/") else f"{tmp_path}/./{os.path.relpath(path, tmp_path)}"]
    )
    assert f"--dataset-path {shlex.quote(path)}\n" in described(resolved, made) + "\n" or target == "dfm"


_TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=40)


@given(value=_TEXT, setup=st.sampled_from(["", "true"]))
@settings(max_examples=25, deadline=None)
def test_no_value_can_break_out_of_a_script(value: str, setup: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A variable of the user's arrives byte for byte in what a node runs, whatever is in it."""
    made = plan_of(GOLDEN[NAMES.index("core_one_node")])
    made = replace(made, env={**made.env, "NOTE": value}, launcher={**made.launcher, "setup": [setup] if setup else []})
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "torchrun").write_text('#!/bin/sh\nprintf %s "$NOTE" > "$OUT"\n')
    (folder / "torchrun").chmod(0o755)
    (folder / "node0.sh").write_text(bundle_files(made)["node0.sh"], encoding="utf-8", newline="")
    subprocess.run(
        ["bash", str(folder / "node0.sh")],
        env={"PATH": f"{folder}:/usr/bin:/bin", "OUT": str(folder / "out")},
        cwd=folder,
        check=True,
    )

    assert (folder / "out").read_bytes() == value.encode()
    assert not re.search(rb"broken", b"".join(str(path).encode() for path in folder.iterdir()))


@pytest.mark.parametrize("name", ["A$(touch broken)", "", "1A", "A B", "A=1", "A\n", "é", "-A"])
def test_a_variables_name_is_a_name_or_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"data": {"source": "mock"}, "launcher": {"env": {name: "x"}}}))
    for target in ("megatron_core", "dfm"):
        done = dfmspec("plan", "spec.yaml", f"target={target}", "-o", "plan", cwd=tmp_path)
        assert done.returncode == 1
        assert "cannot be a name there" in done.stderr
        assert not (tmp_path / "plan").exists()


def test_no_variable_of_the_users_is_taken_by_the_script(tmp_path: Path) -> None:
    made = plan_of(GOLDEN[NAMES.index("core_one_node")], "launcher.env={here: one, bundle: two, CDPATH: /}")
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s %s" "$here" "$bundle"\n')
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "node0.sh").write_text(bundle_files(made)["node0.sh"])
    done = subprocess.run(
        ["bash", "node0.sh"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )

    assert done.stdout == "one two"


def test_a_plan_for_readers_can_be_pasted_into_a_shell() -> None:
    file = GOLDEN[NAMES.index("core_one_node")]
    text = described(
        resolve_spec(load_spec(file, ["launcher.env={NOTE: '$(touch broken)'}"])),
        plan_of(file, "launcher.env={NOTE: '$(touch broken)'}"),
    )

    assert "export NOTE='$(touch broken)'  #" in text
