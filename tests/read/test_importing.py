"""Launch scripts as people have them: arguments in arrays, a shell inside srun, output that goes to a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmspec.read.importing import Imported, import_command, import_script, split_command

ARRAYS = """\
#!/bin/bash
TP=2
DISTRIBUTED_ARGS=(
    --nproc_per_node 8
    --nnodes 4
)
MODEL_ARGS=(
    model.tensor_model_parallel_size=$TP
    model.num_layers=12  # a small one
)
torchrun ${DISTRIBUTED_ARGS[@]} examples/megatron/recipes/dit/pretrain_dit_model.py \\
    --dataset-path /data/butterflies \\
    ${MODEL_ARGS[@]} \\
    train.train_iters=500
"""
TORCHRUN = "torchrun --nnodes=2 --nproc-per-node=8 dit/pretrain_dit_model.py --mock train.train_iters=500"


def imported(text: str, tmp_path: Path) -> Imported:
    file = tmp_path / "train.sh"
    file.write_text(text)
    return import_script(file)


def test_arguments_in_arrays_are_those_of_the_command(tmp_path: Path) -> None:
    found = imported(ARRAYS, tmp_path)

    assert found.dead == []
    assert found.values == {
        "cluster.nproc_per_node": 8,
        "cluster.nnodes": 4,
        "dataset.path": "/data/butterflies",
        "model.tensor_model_parallel_size": 2,
        "model.num_layers": 12,
        "train.train_iters": 500,
    }


def test_words_that_only_a_shell_could_fill_in_are_told_as_such(tmp_path: Path) -> None:
    found = imported("torchrun ${WHERE[@]} pretrain_dit_model.py ${WHAT[@]} model.num_layers=$L", tmp_path)

    assert [word for word, _ in found.dead] == ["${WHERE[@]}", "${WHAT[@]}", "model.num_layers=$L"]
    assert {why for _, why in found.dead} == {"a variable of your shell: give its value"}


@pytest.mark.parametrize("shell", ["bash -c", "/bin/bash -lc", "sh -c", "srun --label bash -c", "sudo sh -c"])
def test_a_command_that_a_shell_is_given_is_looked_into(shell: str, tmp_path: Path) -> None:
    plain = imported(TORCHRUN, tmp_path)
    given = imported(f'{shell} "{TORCHRUN}"', tmp_path)

    assert given.values == plain.values
    assert given.target == plain.target


@pytest.mark.parametrize(
    "end",
    ["&> train.log &", "&>> train.log", "> train.log 2>&1", "2>&1 | tee log", "|& tee log", "< /dev/null", ">log"],
)
def test_where_the_output_goes_is_no_part_of_the_command(end: str) -> None:
    plain = import_command(split_command(TORCHRUN))
    found = import_command(split_command(f"nohup {TORCHRUN} {end}"))

    assert found.values == plain.values
    assert [word for word, _ in found.dead] == ["nohup"]
