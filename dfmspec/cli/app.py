"""The `dfmspec` program: its commands in one table, and the one place where errors become exit codes."""

from __future__ import annotations

import gc
import io
import os
import sys
from importlib import import_module
from typing import Annotated

gc.set_threshold(100_000, 50, 50)  # a short-lived process makes objects, hardly garbage; this alone is 5 % of a cold start

import typer  # noqa: E402

from dfmspec import __version__  # noqa: E402
from dfmspec.errors import INTERNAL, PREFLIGHT, DfmspecError  # noqa: E402

COMMANDS = {
    "validate": "validate", "fix": "fix", "plan": "plan", "run": "run", "runs": "runs", "show": "runs", "sample": "sample", "data": "data",
    "export": "export", "init": "init", "import": "importing", "rule": "rule", "explain": "rule", "schema": "schema",
}  # fmt: skip
"""Each command and its module in this package; the function has the command's name. Only the one that is called is imported."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dfmspec {__version__} (spec version 1; targets: megatron_core 0.16, dfm 7cb7634)")
        raise typer.Exit


def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """Check, plan and run Megatron diffusion training from one YAML file."""


def application(only: str | None = None) -> typer.Typer:
    """The program with all of its commands, with one, or ("") with none."""
    app = typer.Typer(
        name="dfmspec", help="One YAML file in; mistakes found before a GPU is touched; the run supervised and written down.", no_args_is_help=True,
        add_completion=True, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(root)
    for name in COMMANDS if only is None else [only] if only else []:
        module = import_module(f"dfmspec.cli.{COMMANDS[name]}")
        if name == "data":
            app.add_typer(module.app, name=name)
        else:
            foreign = {"ignore_unknown_options": True} if name == "import" else None  # its words are another program's
            app.command(name, context_settings=foreign)(getattr(module, f"{name}_" if name == "import" else name))
    return app


def main() -> None:
    """Run the program; every expected error is one message and its exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without the letters of a key is no reason to fail
    try:
        first = sys.argv[1] if len(sys.argv) > 1 else ""
        application(first if first in COMMANDS else "" if first == "--version" else None)()
    except DfmspecError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        typer.echo(f"error: {error}", err=True)
        sys.exit(PREFLIGHT)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # ours: keep the traceback for a report, and say where
        import tempfile
        import traceback

        with tempfile.NamedTemporaryFile("w", prefix="dfmspec-", suffix=".log", delete=False) as log:
            log.write(f"dfmspec {__version__}: {sys.argv}\n{traceback.format_exc()}")
        typer.echo(f"internal error: this is a fault of dfmspec, not of your spec; details are in {log.name}", err=True)
        sys.exit(INTERNAL)
