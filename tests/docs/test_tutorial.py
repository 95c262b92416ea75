"""docs/tutorial.md, command by command: its bash blocks run in order in one fresh folder, as a reader types them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT, environment

TUTORIAL = ROOT / "docs" / "tutorial.md"
_BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_SECONDS = 300
"""For one block, on a machine that does much else; all of them take less than a minute on two free cores."""


class Block(NamedTuple):
    """A block of commands; `mark` is the HTML comment just above it."""

    text: str
    mark: str

    @property
    def is_run(self) -> bool:
        """Whether it can be run on any machine."""
        return not self.mark.startswith("not run here: ")

    @property
    def exit_code(self) -> int:
        """The exit code that the tutorial promises."""
        return int(self.mark.removeprefix("exits with ") or 0)


def blocks() -> list[Block]:
    """The bash blocks, in order."""
    return [Block(found["text"], found["mark"] or "") for found in _BLOCK.finditer(TUTORIAL.read_text())]


def with_dfmspec(folder: Path) -> dict[str, str]:
    """An environment in which `dfmspec` is this checkout's command line."""
    folder.mkdir()
    program = folder / "dfmspec"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dfmspec "$@"\n')
    program.chmod(0o755)
    return environment(PATH=f"{folder}:{os.environ['PATH']}", COLUMNS="200")


def test_every_mark_of_the_tutorial_is_one_that_the_test_knows() -> None:
    marks = {block.mark for block in blocks() if block.is_run}

    assert marks == {"", "exits with 1", "exits with 3"}


def test_only_blocks_that_install_or_need_slurm_are_not_run() -> None:
    reason = re.compile(r"pip install|sbatch|--check scheduler")
    others = [block.text for block in blocks() if not block.is_run and not reason.search(block.text)]

    assert others == []


def test_the_tutorials_commands_run_in_order_in_an_empty_folder(tmp_path: Path) -> None:
    env, folder = with_dfmspec(tmp_path / "bin"), tmp_path / "tutorial"
    folder.mkdir()
    said = ""
    for block in blocks():
        if block.is_run:
            command = ["bash", "-euo", "pipefail", "-c", block.text]
            result = subprocess.run(
                command, cwd=folder, env=env, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
            said += result.stdout + result.stderr
            assert result.returncode == block.exit_code, f"{block.text}\n{said[-3000:]}"

    assert "succeeded: iteration 12 was reached and its checkpoint is whole" in said
    assert (folder / "runs" / "butterflies" / "latest" / "samples" / "sample_000.png").is_file()
    assert shown_and_not_said(said) == []


_EXACT = re.compile(
    r" error: | help: |mended: | derived: |  spec: |^[-+] |^#SBATCH |:.* -> |ranks = |looked at by|^export "
)
"""Lines of shown output that are the same on every machine."""


def shown_and_not_said(said: str) -> list[str]:
    """The lines of the tutorial's findings, plans and mended keys that no command printed."""
    printed = {line.strip() for line in said.splitlines()}
    shown = "".join(re.findall(r"^```text\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL))
    exact = [line for line in shown.splitlines() if _EXACT.search(line) and "..." not in line]
    return [line for line in exact if line.strip() not in printed]
