"""Secrets on the machine of the launch: filled in for processes that it starts itself.

They are remembered, to be kept out of what is written.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from dfmspec.errors import PreflightError
from dfmspec.redaction import remember

_SECONDS = 60
"""How long a command may take to print a secret."""


def filled_in(secrets: Mapping[str, str]) -> dict[str, str]:
    """The values of references, on this machine.

    Raises:
        PreflightError: one is not here.
    """
    values = {}
    for name, reference in secrets.items():
        values[name] = _value(name, reference)
        remember(values[name])
    return values


def _value(name: str, reference: str) -> str:
    """The value of one reference; a line's end at its end is no part of it, as in a shell."""
    kind, _, rest = reference.partition(":")
    missing = f"the secret of {name}, {reference}, is not on this machine"
    if kind == "env":
        value = os.environ.get(rest, "")
        if not value:
            raise PreflightError(f"{missing}: export {rest} and try again")
        return value
    if kind == "file":
        try:
            with open(os.path.expanduser(rest), encoding="utf-8") as file:  # noqa: PTH123  the user's own text
                return file.read().rstrip("\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise PreflightError(f"{missing}: {reason}") from error
    try:
        done = subprocess.run(["bash", "-c", rest], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise PreflightError(f"{missing}: its command did not end in {_SECONDS} s, or prints no text") from error
    if done.returncode:
        raise PreflightError(f"{missing}: its command ended with {done.returncode}")
    return done.stdout.rstrip("\n")


def is_here(reference: str) -> bool:
    """Whether a secret is on this machine; of a command nobody knows before it is run."""
    kind, _, rest = reference.partition(":")
    if kind == "env":
        return bool(os.environ.get(rest))
    return kind == "cmd" or os.path.isfile(os.path.expanduser(rest))  # noqa: PTH113  the user's own text
