"""The last table of ARCHITECTURE.md is true: a file and a line add a recipe, a launcher, a target, in a copy of all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, once

RECIPE = "model: {num_layers: 1, hidden_size: 64, num_attention_heads: 4, adaln_lora_rank: 8}\n"

LAUNCHER = '''"""Launcher echo: as local, and says so."""

from dfmspec.run.launch import local

OUTLIVES = local.OUTLIVES
RUNS_SCRIPTS = local.RUNS_SCRIPTS
check = None
files = local.files
attach = local.attach


def launch(plan, place):
    """Start one torchrun a node."""
    place.talk("echo: started")
    return local.launch(plan, place)
'''

TARGET = '''"""Target standin: a script that prints what it was given."""

from dfmspec.targets.dfm.dit import *  # noqa: F403
from dfmspec.targets.dfm import dit

SUBJECT = "a stand-in"
ENTRY = "standin/train.py"
UPSTREAM = dit.UPSTREAM._replace(variable="STANDIN_ROOT", root="/opt/standin")


def arguments(values, origins):
    """Its own words."""
    return ["--config-file", "config.yaml", "--layers", str(values["model.num_layers"])]


config = dit.config
parameters = dit.parameters
work = dit.work


def read_back(values, text):
    """It reads what it is given."""
    return
'''

RULE = """    Rule(
        "SPC399",
        "odd-layers",
        ERROR,
        excludes(
            lambda v: v[LAYERS] % 2 == 1,
            at=LAYERS,
            message="the stand-in takes an even number of layers",
            hint="one more",
        ),
        "It prints a complaint.",
        "standin/train.py",
        targets=targets_of(code="standin"),
    ),
"""

ENTRY_OF_THE_TARGET = """    "standin": Entry(
        module="dfmspec.targets.standin",
        schema="schemas/targets/standin.schema.json",
        revision="1",
        code="standin",
        network="dit",
        recipes=("dit",),
        default_recipe="dit_mini",
    ),
"""

ENTRY_OF_THE_LAUNCHER = """    "echo": Entry(
        module="dfmspec.run.launch.echo",
        how_to_start=None,
        how_to_start_script="write it with -o DIR, and bash DIR/node0.sh",
    ),
"""


def insert(file: Path, after: str, line: str) -> None:
    """One line of a table."""
    text = file.read_text()
    assert text.count(after) == 1, (file, after)
    file.write_text(text.replace(after, after + line))


def extend(copy: Path) -> None:
    """A copy of what the table is about, with a recipe, a launcher, a target and a rule added as it says."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("dfmspec", "tools", "schemas", "docs", "examples", "tests/corpus", "tests/golden"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    package = copy / "dfmspec"

    # A recipe: a file, and a word in RECIPES.
    (package / "spec" / "recipes" / "dit_mini.yaml").write_text(RECIPE)
    insert(package / "spec" / "recipes" / "__init__.py", '    "dit": (', '"dit_mini", ')

    # A launcher: a file, and a line in LAUNCHERS.
    (package / "run" / "launch" / "echo.py").write_text(LAUNCHER)
    insert(package / "spec" / "launchers.py", "LAUNCHERS = {\n", ENTRY_OF_THE_LAUNCHER)

    # A target: a file with its schema, and a line in TARGETS.
    (package / "targets" / "standin.py").write_text(TARGET)
    schema = json.loads((ROOT / "schemas" / "targets" / "dfm-7cb7634.schema.json").read_text())
    schema["title"] = "standin"
    (copy / "schemas" / "targets" / "standin.schema.json").write_text(json.dumps(schema))
    insert(package / "targets" / "__init__.py", "TARGETS = {\n", ENTRY_OF_THE_TARGET)

    # A rule: an entry in its family's file, and its examples.
    insert(package / "check" / "rules" / "spec.py", "\nRULES = (\n", RULE)
    insert(
        package / "check" / "rules" / "spec.py",
        "from __future__ import annotations\n",
        "from dfmspec.targets import targets_of\n",
    )
    corpus = copy / "tests" / "corpus" / "rules" / "SPC399"
    corpus.mkdir()
    (corpus / "bad.yaml").write_text("target: standin\ncluster: {nproc_per_node: 1}\nmodel: {num_layers: 3}\n")
    (corpus / "good.yaml").write_text("target: standin\ncluster: {nproc_per_node: 1}\nmodel: {num_layers: 4}\n")

    generated = python(copy, "tools/generate.py", cwd=copy)
    assert generated.returncode == 0, generated.stderr


def python(copy: Path, *words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the copy."""
    command = [sys.executable, *map(str, words)]
    own = environment(**env) | {"PYTHONPATH": str(copy)}
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def extended(shared: Path) -> Path:
    """The extended copy, made once."""
    return once(shared / "extended", extend)


def test_an_added_launcher_trains_two_ranks_with_an_added_recipe(extended: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "recipe: dit_mini\n"
        "cluster: {device: cpu, nproc_per_node: 2}\n"
        "launcher: {kind: echo}\n"
        "data: {source: mock}\n"
        "dataset: {task_encoder_seq_length: 64}\n"
        "train: {train_iters: 2, eval_iters: 0}\n"
        "logger: {log_interval: 1}\n"
    )
    done = python(extended, "-m", "dfmspec", "run", "mine.yaml", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "echo: started" in done.stderr
    assert "Iteration 2/2" in done.stderr


def test_an_added_target_is_checked_by_a_rule_of_its_own(extended: Path, tmp_path: Path) -> None:
    corpus = extended / "tests" / "corpus" / "rules" / "SPC399"
    bad = python(extended, "-m", "dfmspec", "validate", corpus / "bad.yaml", "--check", "spec", cwd=tmp_path)
    good = python(extended, "-m", "dfmspec", "validate", corpus / "good.yaml", "--check", "spec", cwd=tmp_path)
    page = (extended / "docs" / "rules" / "SPC399.md").read_text()

    assert "SPC399 odd-layers" in bad.stdout
    assert "odd-layers" not in good.stdout
    assert "the stand-in takes an even number of layers" in page


def test_an_added_target_is_planned_and_its_script_is_run(extended: Path, tmp_path: Path) -> None:
    (tmp_path / "checkout" / "standin").mkdir(parents=True)
    (tmp_path / "checkout" / "standin" / "train.py").write_text("import sys\nprint('standin', sys.argv[3:])\n")
    (tmp_path / "mine.yaml").write_text(
        "target: standin\ncluster: {nproc_per_node: 1}\ndata: {source: mock}\nmodel: {num_layers: 2}\n"
    )
    planned = python(extended, "-m", "dfmspec", "plan", "mine.yaml", "-o", "plan", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr + planned.stdout
    env = environment(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", STANDIN_ROOT=str(tmp_path / "checkout")
    )
    started = subprocess.run(
        ["bash", "plan/node0.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )

    assert started.returncode == 0, started.stderr
    assert "standin ['--layers', '2']" in started.stdout
