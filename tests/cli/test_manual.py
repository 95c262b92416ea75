"""rule, explain, init, import, and the shell's completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dfmspec.check.rules import RULES, check_spec
from dfmspec.cli.arguments import complete_code, complete_key
from dfmspec.cli.init import Wanted, spec_text
from dfmspec.diagnostics import Severity
from dfmspec.read.importing import import_command, import_file
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.targets import TARGETS, recipes_of
from dfmspec.targets.dfm.upstream import read
from tests.conftest import HOWTO, dfmspec, environment


def test_a_rule_has_a_page_and_a_wrong_code_gets_a_suggestion() -> None:
    page = dfmspec("rule", "par101").stdout

    assert page.startswith("# PAR101 world-size-not-divisible")
    assert "## Fires on" in page
    assert "## Silent on" in page
    assert dfmspec("rule", "world-size-not-divisible").stdout == page
    listed = dfmspec("rule").stdout.splitlines()
    assert sum(line.startswith("  ") for line in listed) == len(RULES)
    assert "PAR  How ranks are arranged, and what the arrangement must divide" in listed
    assert {entry["code"] for entry in json.loads(dfmspec("rule", "--format", "json").stdout)} == {
        rule.code for rule in RULES
    }
    wrong = dfmspec("rule", "PAR100")
    assert wrong.returncode == 2
    assert "did you mean PAR1" in wrong.stderr


def test_a_key_is_explained_for_each_target_that_has_it() -> None:
    both, short, wrong = (
        dfmspec("explain", "scheduler.lr_decay_iters"),
        dfmspec("explain", "lr"),
        dfmspec("explain", "model.num_layer"),
    )

    assert {"OPT101", "OPT105"} <= set(short.stdout.splitlines()[1].partition(": ")[2].split(", "))
    assert "target dfm_wan, dfm_flux" in both.stdout  # what is the same is told once
    assert "target megatron_core" in both.stdout
    assert "upstream's own value: 10000" in both.stdout
    assert "looked at by: SPC301" in both.stdout
    assert short.stdout.startswith("optimizer.lr\n")
    assert wrong.returncode == 2
    assert "did you mean model.num_layers" in wrong.stderr


@pytest.mark.parametrize(
    ("target", "recipe"), [(target, recipe) for target in TARGETS for recipe in recipes_of(target)]
)
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (16, 4), (3, 5)])
@pytest.mark.parametrize("dataset", [None, "/data/it's mine: #1"])
def test_what_init_writes_is_valid_as_it_stands(
    target: str, recipe: str, nodes: int, gpus: int, dataset: str | None
) -> None:
    launcher = "slurm" if nodes > 1 else None
    wanted = Wanted(recipe, target, nodes, gpus, None, launcher, (), dataset, cpu=False)
    text = spec_text("spec.yaml", wanted, schema="s.json")
    resolved = resolve_spec(load_spec("spec.yaml", text=text))

    assert [
        finding.code for finding in check_spec(resolved, levels=("spec",)) if finding.severity > Severity.HINT
    ] == []
    assert resolved["cluster.nnodes"] == nodes
    assert resolved["recipe"] == recipe
    assert dataset is None or resolved["dataset.path"] == dataset


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "spec.yaml"
    assert dfmspec("init", file, "--recipe", "dit_s", "--cpu").returncode == 0
    text = file.read_text()
    again = dfmspec("init", file)

    assert again.returncode == 2
    assert "exists" in again.stderr
    assert file.read_text() == text


def test_a_torchrun_line_becomes_a_spec_and_dead_words_are_listed(tmp_path: Path) -> None:
    (tmp_path / "over.yaml").write_text("train: {train_iters: 800, typo: 1}\nmodel: {attention_backend: flash}\n")
    command = (
        "NCCL_ALGO=Ring torchrun --nproc-per-node=4 --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 \\\n "
        "examples/megatron/recipes/dit/pretrain_dit_model.py "
        f"--data /data/b --config {tmp_path}/over.yaml "
        "model.tensor_model_parallel_size=4 'optimizer.lr=\"1e-4\"' +x.y=1 ~train --no-such"
    )
    out = tmp_path / "spec.yaml"
    result = dfmspec("import", command, "-o", out)
    resolved = resolve_spec(load_spec(out))

    assert result.returncode == 0, result.stderr
    assert (resolved["cluster.nproc_per_node"], resolved["cluster.nnodes"], resolved["dataset.path"]) == (
        4,
        2,
        "/data/b",
    )
    assert (resolved["train.train_iters"], resolved["model.tensor_model_parallel_size"], resolved["launcher.env"]) == (
        800,
        4,
        {"NCCL_ALGO": "Ring"},
    )
    for dead in ("train.typo", "model.attention_backend", "+x.y=1", "~train", "--no-such"):
        assert dead in result.stderr
        assert dead in out.read_text()
    assert dfmspec("import", command, "-o", out).returncode == 2  # nothing is overwritten


def test_the_how_tos_file_is_imported_and_checked_like_the_original() -> None:
    text = dfmspec("import", HOWTO).stdout
    codes = [
        {f.code for f in check_spec(resolve_spec(load_spec("x.yaml", words, text=source)), levels=("spec",))}
        for source, words in (
            (text, ["cluster.nproc_per_node=2"]),
            (HOWTO.read_text(), ["cluster.nproc_per_node=2", "target=dfm"]),
        )
    ]

    assert codes[0] == codes[1] - {"CKP101"}  # its names are the real ones


ODD = (
    "model: {num_layers: 010, sequence_parallel: n, ffn_hidden_size: 1_000}\n"
    "train: {train_iters: 1:30, manual_gc: on}\noptimizer: {lr: 1e-4}\n"
    'ddp: {bucket_size: "???"}\n'
)


def test_an_imported_value_is_the_one_that_upstream_reads(tmp_path: Path) -> None:
    """From a file, and from a command line, whose grammar is another."""
    (tmp_path / "odd.yaml").write_text(ODD)
    (tmp_path / "spec.yaml").write_text(dfmspec("import", tmp_path / "odd.yaml").stdout)
    words = [
        "model.num_layers=010",
        "model.sequence_parallel=n",
        "model.ffn_hidden_size=1_000",
        "train.train_iters=1:30",
        "train.manual_gc=True",
        "optimizer.lr=1e-4",
    ]
    imported = import_command(["torchrun", "pretrain_dit_model.py", *words]).values
    file, line = load_spec(tmp_path / "spec.yaml"), read(None, words, world_size=1)

    assert import_file(tmp_path / "odd.yaml").values == {
        "model.num_layers": 8,
        "model.sequence_parallel": "n",
        "model.ffn_hidden_size": 1000,
        "train.train_iters": 90,
        "train.manual_gc": True,
        "optimizer.lr": 1e-4,
    }
    assert all(
        read(ODD, [], world_size=1)[key] == file.values[key]
        for key in ("model.num_layers", "model.ffn_hidden_size", "train.train_iters", "train.manual_gc")
    )
    assert imported == {key: line[key] for key in imported}
    assert len(imported) == len(words)


@pytest.mark.parametrize(
    "words",
    [
        ["import", "ls -l"],
        ["import", "torchrun 'pretrain_dit_model.py"],
        ["import", "torchrun pretrain_dit_model.py --config-file /no/such.yaml"],
    ],
)
def test_what_is_no_training_command_is_a_usage_error(words: list[str]) -> None:
    result = dfmspec(*words)

    assert result.returncode == 2
    assert result.stderr.startswith("error:")
    assert "Traceback" not in result.stderr


def test_the_shell_completes_sections_keys_and_codes() -> None:
    assert complete_key("train.global_b") == ["train.global_batch_size"]
    assert ("PAR101", "world-size-not-divisible") in complete_code("par1")


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("dfmspec val", "validate", "plan"),
        ("dfmspec explain model.num_la", "model.num_layers", "model.hidden_size"),
        ("dfmspec plan s.yaml mod", "model.", "train."),
        ("dfmspec plan s.yaml optimizer.l", "optimizer.lr=", "optimizer.log_num_zeros_in_grad="),
        ("dfmspec plan s.yaml target=dfm optimizer.l", "optimizer.log_num_zeros_in_grad=", "model."),
        ("dfmspec plan s.yaml recipe=dit_", "recipe=dit_xl", "recipe=wan_1_3b"),
        ("dfmspec plan s.yaml model.sequence_parallel=", "model.sequence_parallel=true", "true"),
        ("dfmspec show ", "night", "night/latest"),
        ("dfmspec show 2026", "20261201-000000-0000-0000", "night"),
    ],
)
def test_a_shell_completes_what_fits(line: str, offered: str, not_offered: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("recipe: dit_s\n")
    run = tmp_path / "runs" / "night" / "20261201-000000-0000-0000"
    run.mkdir(parents=True)
    (run / "manifest.json").touch()
    script = Path(sys.executable).parent / "dfmspec"
    at = str(len(line.split()) - (not line.endswith(" ")))
    env = environment(_DFMSPEC_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=at)
    shown = subprocess.run([script], env=env, capture_output=True, text=True, check=False, cwd=tmp_path).stdout.split()

    assert offered in shown
    assert not_offered not in shown


def test_init_asks_at_most_five_questions_on_a_terminal_and_its_spec_runs_where_it_was_asked_to(tmp_path: Path) -> None:
    import pty

    # On GPUs, of several nodes: every question there is.
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "dfmspec", "init"]
    asked = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdin=terminal, stderr=terminal, stdout=subprocess.PIPE, text=True
    )
    os.close(terminal)
    os.write(main, b"y\n4\n2\nnode0,node1\n/data/mine\n")
    out, _ = asked.communicate(timeout=60)
    said = os.read(main, 10_000).decode()
    os.close(main)
    resolved = resolve_spec(load_spec(tmp_path / "spec.yaml"))

    assert (asked.returncode, out) == (0, "spec.yaml\n")
    assert said.count("[") <= 5
    assert [resolved[key] for key in ("cluster.nnodes", "cluster.nproc_per_node", "launcher.kind", "dataset.path")] == [
        2,
        4,
        "ssh",
        "/data/mine",
    ]
    assert resolved["launcher.hosts"] == ["node0", "node1"]
    assert not [found for found in check_spec(resolved, levels=("spec",)) if found.severity > Severity.HINT]


def test_init_refuses_what_would_not_run_and_its_cpu_trial_is_small(tmp_path: Path) -> None:
    assert dfmspec("init", "--nodes", 2, cwd=tmp_path).returncode == 2
    assert dfmspec("init", "--cpu", "--gpu", "h100", cwd=tmp_path).returncode == 2
    assert dfmspec("init", "--launcher", "kubernetes", cwd=tmp_path).returncode == 2
    assert dfmspec("init", "--launcher", "ssh", "--hosts", "a", "--nodes", 2, cwd=tmp_path).returncode == 2
    assert not any(tmp_path.iterdir())

    made = dfmspec("init", "--cpu", cwd=tmp_path)
    resolved = resolve_spec(load_spec(tmp_path / "spec.yaml"))
    first, *_ = (tmp_path / "spec.yaml").read_text().splitlines()
    assert made.returncode == 0
    assert first == "# yaml-language-server: $schema=.dfmspec/experiment.schema.json"
    assert json.loads((tmp_path / ".dfmspec" / "experiment.schema.json").read_text())["title"] == "dfmspec experiment"
    assert [resolved[key] for key in ("recipe", "cluster.nproc_per_node", "data.resolution")] == ["dit_tiny", 2, 64]
