"""How much a command says on stderr: -q for errors alone, -v for what it did besides."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

_Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Errors only."),
]
_Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also what is read, started and left out."),
]


class _Level:
    """What was asked for; of this process."""

    quiet = False
    verbose = False


def is_quiet() -> bool:
    """Whether only errors are to be told."""
    return _Level.quiet


def note(line: str) -> None:
    """What a reader may want to know: on stderr, unless -q."""
    if not _Level.quiet:
        typer.echo(line, err=True)


def detail(line: str) -> None:
    """What only somebody who looks into it wants to know: on stderr, with -v."""
    if _Level.verbose:
        typer.echo(line, err=True)


def with_levels(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes -q and -v too."""

    @functools.wraps(command)
    def called(*args: Any, quiet: bool, verbose: bool, **options: Any) -> None:
        _Level.quiet = quiet
        _Level.verbose = verbose and not quiet
        command(*args, **options)

    signature = inspect.signature(command, eval_str=True)
    own = [
        inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Quiet),
        inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Verbose),
    ]
    taken = [*signature.parameters.values(), *own]
    called.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]
    called.__annotations__ = {**command.__annotations__, "quiet": _Quiet, "verbose": _Verbose}
    return called
