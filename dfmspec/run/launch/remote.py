"""What launchers of other machines share: a run directory that every node sees, and a file that asks ranks to stop."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

from dfmspec.files import write_aside
from dfmspec.plan.environment import shell_line
from dfmspec.plan.plan import Plan
from dfmspec.plan.scripts import script_of
from dfmspec.record.run_dir import AttemptDir
from dfmspec.run.launch import Place, of_the_run


def ask_to_stop(attempt_dir: AttemptDir, number: int) -> None:
    """Leave the file that rank 0 looks for after each iteration, with the number of a signal in it."""
    write_aside(attempt_dir.stop, str(number))


def variables(plan: Plan, place: Place) -> dict[str, str]:
    """What a node must know beside the plan: where the run and its attempt are, and by what id its nodes meet."""
    env = {
        "DFMSPEC_RUN_DIR": str(place.run.path),
        "DFMSPEC_ATTEMPT_DIR": str(place.attempt_dir.path),
        "TQDM_DISABLE": "1",
        **of_the_run(plan, place),
    }
    if plan.nnodes > 1:
        env["DFMSPEC_RDZV_ID"] = f"{place.run.path.name}.{place.attempt}"
    return env


def port_of(place: Place) -> int:
    """A port that differs from attempt to attempt, since nobody can look for a free one on another machine."""
    return 20_000 + crc32(os.fsencode(place.run.path / str(place.attempt))) % 10_000


def programs_path() -> str:
    """Where this dfmspec's torchrun is, as a word of the shell to go before PATH."""
    return shlex.quote(str(Path(sys.executable).parent))


def start_script(plan: Plan, place: Place, node: int, env: Mapping[str, str]) -> Path:
    """Write what another machine runs for a node: `bash FILE`, whatever its login shell is. Output goes beside it.

    This dfmspec's torchrun is first on PATH, as in a virtual environment that is activated.

    Returns: the file.
    """
    folder = place.attempt_dir.node(node)
    folder.path.mkdir(parents=True, exist_ok=True)
    script, *arguments = script_of(plan, node)
    path = programs_path()
    log = shlex.quote(str(folder.torchrun_log))
    working_directory = shlex.quote(str(Path.cwd()))
    command = shlex.join(["bash", f"{place.run.path}/{script}", *arguments])
    lines = [
        "#!/usr/bin/env bash",
        f'export PATH={path}:"$PATH"',
        *(shell_line(name, value) for name, value in env.items()),
        f"exec > {log} 2>&1",
        f"cd {working_directory}",
        f"exec {command}",
    ]
    file = folder.start_script
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    return file
