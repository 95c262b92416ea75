"""Files on PYTHONPATH that Python would import in place of a package that is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_NEEDED = frozenset(
    (
        *("dfmspec", "filelock", "psutil", "pydantic", "typer", "yaml"),
        *("megatron", "numpy", "safetensors", "torch", "transformer_engine", "triton", "webdataset"),
    )
)
"""Packages of the command line, and of the training."""
_HERE = Path(__file__).parent


def namesakes(python_path: str) -> list[Path]:
    """What lies on a PYTHONPATH under the name of a needed package, or of a module of Python's own.

    A part of the path that is empty or relative is seen from the working directory, as Python sees it. A folder without
    `__init__.py` gives way to a package further on, and so is none.
    """
    if not python_path:
        return []
    found = []
    for part in python_path.split(os.pathsep):
        folder = Path(part).absolute()
        if not folder.is_dir():
            continue
        found += [path for path in sorted(folder.iterdir()) if _is_namesake(path)]
    return found


def _is_namesake(path: Path) -> bool:
    name = path.name.partition(".")[0]
    is_module = path.suffix in (".py", ".so") or (path / "__init__.py").exists()
    if not is_module or name not in _NEEDED | sys.stdlib_module_names:
        return False
    return path.resolve() != _HERE.resolve()


def told(python_path: str) -> str:
    """One line about the namesakes on a PYTHONPATH; empty where there are none."""
    found = ", ".join(map(str, namesakes(python_path)))
    if not found:
        return ""
    return f"PYTHONPATH puts {found} in place of what is installed; rename it, or take its folder off PYTHONPATH"
