"""Secrets by reference: `launcher.env` may name where a node has a secret, and a plan holds that name alone.

`env:NAME` is a variable of the node's, `file:PATH` a file's content, `cmd:COMMAND` what a command prints.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from dfmspec.redaction import REFERENCE


def references(env: Mapping[str, Any]) -> dict[str, str]:
    """Variable -> reference, of the entries of `launcher.env` that are secret."""
    return {name: value[REFERENCE] for name, value in env.items() if isinstance(value, dict)}


def shell_lines(secrets: Mapping[str, str]) -> list[str]:
    """Lines by which a node's script fills its secrets in; one that is not there ends it with exit code 4."""
    if not secrets:
        return []
    lines = ["{ set +x; } 2> /dev/null  # secrets are not traced"]
    for name, reference in sorted(secrets.items()):
        kind, _, rest = reference.partition(":")
        missing = shlex.quote(f"error: the secret of {name}, {reference}, is not on this node")
        giving_up = f"{{ printf '%s\\n' {missing} >&2; exit 4; }}"
        if kind == "env":
            lines.append(f'[ -n "${{{rest}:-}}" ] || {giving_up}')
            lines.append(f'export {name}="${rest}"')
            continue
        if kind == "file":
            lines.append(f"{name}=$(cat -- {_path(rest)} 2> /dev/null) || {giving_up}")
        else:
            lines.append(f"{name}=$({rest}) || {giving_up}")
        lines.append(f"export {name}")
    return lines


def _path(path: str) -> str:
    """A path as the shell takes it, with the home of who runs it."""
    if path.startswith("~/"):
        return '"$HOME"/' + shlex.quote(path.removeprefix("~/"))
    return shlex.quote(path)
