"""The `dfmspec` program: its commands in one table, and the one place where errors become exit codes."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

# A short-lived process makes objects, hardly garbage; this alone is 5 % of a cold start.
gc.set_threshold(100_000, 50, 50)

import typer  # noqa: E402

from dfmspec import __version__  # noqa: E402
from dfmspec.errors import INTERNAL, PREFLIGHT, DfmspecError  # noqa: E402

COMMANDS = {
    "validate": "validate",
    "fix": "fix",
    "plan": "plan",
    "run": "run",
    "runs": "runs",
    "show": "runs",
    "sample": "sample",
    "data": "data",
    "export": "export",
    "init": "init",
    "import": "importing",
    "rule": "rule",
    "explain": "rule",
    "schema": "schema",
}
"""Each command and its module in this package. Only the one that is called is imported.

The function in the module has the command's name; for `import`, which Python keeps for itself, it is `import_`.
"""


def _version(wanted: bool) -> None:
    """What --version prints."""
    if wanted:
        typer.echo(f"dfmspec {__version__} (spec version 1; targets: megatron_core 0.16, dfm 7cb7634)")
        raise typer.Exit


def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print the version and leave.",
        ),
    ] = False,
) -> None:
    """Check, plan and run Megatron diffusion training from one YAML file."""


def application(only: str | None = None) -> typer.Typer:
    """The program with all of its commands, with one, or ("") with none."""
    app = typer.Typer(
        name="dfmspec",
        help="One YAML file in; mistakes found before a GPU is touched; the run supervised and written down.",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(root)
    names = list(COMMANDS)
    if only is not None:
        names = [only] if only else []
    for name in names:
        _add_command(app, name)
    return app


def _add_command(app: typer.Typer, name: str) -> None:
    """Import a command's module, and add the command to the program."""
    module = import_module(f"dfmspec.cli.{COMMANDS[name]}")
    if name == "data":
        app.add_typer(module.app, name=name)
    elif name == "import":
        # Its words are another program's, with options that are not ours.
        foreign = {"ignore_unknown_options": True}
        app.command(name, context_settings=foreign)(module.import_)
    else:
        app.command(name)(getattr(module, name))


def main() -> None:
    """Run the program; every expected error is one message and its exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A locale without the letters of a key is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        application(_called(sys.argv))()
    except DfmspecError as error:
        kind = "internal error" if error.exit_code == INTERNAL else "error"
        typer.echo(f"{kind}: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader has left, such as head; the interpreter's own last flush is to fail nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(PREFLIGHT)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        sys.exit(_report_a_fault())


def _called(arguments: Sequence[str]) -> str | None:
    """The command that a command line calls; "" for the version alone, and None where all are needed."""
    first = arguments[1] if len(arguments) > 1 else ""
    if first in COMMANDS:
        return first
    return "" if first == "--version" else None


def _report_a_fault() -> int:
    """Keep the traceback of a fault of ours for a report, and say where; returns the exit code."""
    import traceback

    from dfmspec.cli.faults import kept, told
    from dfmspec.namesakes import told as told_of_namesakes

    # It is no fault of ours where a file of the user's is imported in place of a package.
    trace = traceback.format_exc()
    namesakes = told_of_namesakes(os.environ.get("PYTHONPATH", ""))
    if namesakes:
        typer.echo(f"error: {namesakes}; details are in {kept(trace)}", err=True)
        return PREFLIGHT
    typer.echo(f"internal error: {told(trace)}", err=True)
    return INTERNAL
