"""What launchers of other machines share: a run directory that every node sees, and a file that asks the ranks to stop."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

from dfmspec.plan.plan import Plan
from dfmspec.plan.scripts import script_of
from dfmspec.run.launch import Place

STOP = "stop"
"""In the attempt's folder; what is in it is the number of the signal that it stands for."""


def ask_to_stop(attempt_dir: str, number: int) -> None:
    """Leave the file that rank 0 looks for after each iteration."""
    (Path(attempt_dir) / STOP).write_text(str(number))


def variables(plan: Plan, place: Place) -> dict[str, str]:
    """What a node must know beside the plan: its own torchrun first on PATH, as a virtual environment that is not activated has it."""
    env = {"DFMSPEC_RUN_DIR": place.run_dir, "DFMSPEC_ATTEMPT_DIR": place.attempt_dir, "TQDM_DISABLE": "1"}
    if plan.nnodes > 1:
        env["DFMSPEC_RDZV_ID"] = f"{Path(place.run_dir).name}.{place.attempt}"
    return env


def port_of(place: Place) -> int:
    """A port that differs from attempt to attempt, since nobody can look for a free one on another machine."""
    return 20_000 + crc32(f"{place.run_dir}/{place.attempt}".encode()) % 10_000


def programs_path() -> str:
    """Where this dfmspec's torchrun is, as a word of the shell to go before PATH."""
    return shlex.quote(str(Path(sys.executable).parent))


def start_script(plan: Plan, place: Place, node: int, env: Mapping[str, str]) -> Path:
    """Write what a machine of its own runs for a node: `bash FILE`, whatever its login shell is. Output goes beside it."""
    folder = Path(place.attempt_dir) / f"node{node}"
    folder.mkdir(parents=True, exist_ok=True)
    script, *arguments = script_of(plan, node)
    lines = [
        "#!/usr/bin/env bash",
        f'export PATH={programs_path()}:"$PATH"',
        *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        f"exec > {shlex.quote(str(folder / 'torchrun.log'))} 2>&1",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"exec bash {shlex.join([f'{place.run_dir}/{script}', *arguments])}",
    ]
    file = folder / "start.sh"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    return file
