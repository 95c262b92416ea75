"""The `dfmspec` program: its commands in one table, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dfmspec import __version__
from dfmspec.cli import data, plan, run, runs, sample, schema, validate
from dfmspec.errors import INTERNAL, PREFLIGHT, DfmspecError

app = typer.Typer(
    name="dfmspec",
    help="One YAML file in; mistakes found before a GPU is touched; the run supervised and written down.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dfmspec {__version__} (spec version 1; targets: megatron_core 0.16, dfm 7cb7634)")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """Check, plan and run Megatron diffusion training from one YAML file."""


app.command("validate")(validate.validate)
app.command("plan")(plan.plan)
app.command("run")(run.run)
app.command("runs")(runs.runs)
app.command("show")(runs.show)
app.command("sample")(sample.sample)
app.command("schema")(schema.schema)
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the program; every expected error is one message and its exit code, never a traceback."""
    try:
        app()
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
