"""What a launch script's variables stand for, by bash itself."""

from __future__ import annotations

import random
import shlex
import subprocess

import pytest

from dfmspec.read.shell import commands_of

VALUES = (
    "2",
    "8",
    "a/b.yaml",
    "model.num_layers=12",
    "'two words'",
    '"two words"',
    "--nnodes 4",
    "x=$A",
    "${B:-7}",
    "",
)


def _script(draw: random.Random) -> str:
    """A script that sets variables and arrays, and prints some words with them."""
    lines = ["#!/bin/bash", "A=1"]
    for _ in range(draw.randint(1, 6)):
        name = draw.choice("ABCD")
        value = draw.choice(VALUES)
        scalar = f'"{value}"' if " " in value and value[0] not in "'\"" else value
        kind = draw.randrange(4)
        if kind == 0:
            lines += [f"{name}L=(", f"    {value}  # it's one (of) many", f"    {draw.choice(VALUES)}", ")"]
        elif kind == 1:
            lines.append(f"{name}L+=({value} \\\n  {draw.choice(VALUES)})")
        else:
            lines.append(f"{draw.choice(('', 'export '))}{name}={scalar}")
    words = draw.sample([f"{open_}{name}" for name in "ABCD" for open_ in ("$", "k=$")], 2)
    words += draw.sample([f"${{{name}L[@]}}" for name in "ABCD"] + ['"${AL[@]}"', '"$A"', "'$A'", "${B}c"], 3)
    return "\n".join([*lines, f"print {' '.join(words)}"])


def test_variables_and_arrays_are_filled_in_as_bash_does() -> None:
    draw = random.Random(38)
    for _ in range(200):
        script = _script(draw)
        defined = 'A= B= C= D= AL=() BL=() CL=() DL=()\nprint() { printf "%s\\0" x "$@"; }\n'
        by_bash = subprocess.run(["bash", "-c", defined + script], capture_output=True, text=True, check=True).stdout
        start = "A=\nB=\nC=\nD=\nAL=()\nBL=()\nCL=()\nDL=()\n"
        command = commands_of(start + script)[-1]

        # An empty array in quotes is no word to bash.
        assert [word for word in shlex.split(command)[1:] if word] == [w for w in by_bash.split("\0")[1:] if w], script


@pytest.mark.parametrize(
    "setting",
    ["TP=$1", "TP=$(nproc)", "TP=`nproc`", "TP=$OTHER", "if true; then\n  TP=2\nfi", "for x in 1; do TP=2; done", ""],
)
def test_what_only_a_shell_knows_stays_as_it_is_written(setting: str) -> None:
    assert commands_of(f"{setting}\ntorchrun x.py $TP")[-1] == "torchrun x.py $TP"


def test_a_variable_that_is_set_anew_out_of_sight_is_known_no_more() -> None:
    assert commands_of("TP=2\nif x; then\n  TP=4\nfi\nrun $TP")[-1] == "run $TP"
    assert commands_of("TP=2\nTP=4\nrun $TP") == ["run 4"]
