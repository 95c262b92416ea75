"""The `dfmspec` program: its commands in one table, and the one place where errors become exit codes."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

# A short-lived process makes objects, hardly garbage; this alone is 5 % of a cold start.
gc.set_threshold(100_000, 50, 50)

import typer  # noqa: E402
from typer.core import TyperGroup  # noqa: E402

from dfmspec import __version__  # noqa: E402
from dfmspec.cli.voice import with_levels  # noqa: E402
from dfmspec.colours import RED, painted  # noqa: E402
from dfmspec.errors import INTERNAL, OK, PREFLIGHT, USAGE, DfmspecError  # noqa: E402

COMMANDS = {
    "validate": "validate",
    "fix": "fix",
    "plan": "plan",
    "run": "run",
    "runs": "runs",
    "show": "runs",
    "verify": "verify",
    "reproduce": "reproduce",
    "sample": "sample",
    "export": "export",
    "data": "data",
    "init": "init",
    "import": "importing",
    "profiles": "profiles",
    "policy": "policy",
    "rule": "rule",
    "explain": "rule",
    "schema": "schema",
}
"""Each command and its module in this package. Only the one that is called is imported.

The function in the module has the command's name; for `import`, which Python keeps for itself, it is `import_`.
"""
GROUPS = {
    "Start": ("init", "import", "data"),
    "Check": ("validate", "fix", "plan"),
    "Run": ("run", "runs", "show", "verify", "reproduce", "sample", "export"),
    "Look up": ("explain", "rule", "profiles", "policy", "schema"),
}
"""The commands as the top help shows them."""


def _version(wanted: bool) -> None:
    """What --version prints."""
    if wanted:
        from dfmspec.targets import TARGETS

        known = ", ".join(f"{name} {entry.revision}" for name, entry in TARGETS.items())
        typer.echo(f"dfmspec {__version__} (spec version 1; targets: {known})")
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


class _Grouped(TyperGroup):
    """The program, whose help shows its commands in groups, each with the first line of its own help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """A paragraph a group."""
        for name, commands in GROUPS.items():
            rows = []
            for command in commands:
                known = self.get_command(ctx, command)
                if known is not None:
                    first, *_ = (known.help or "").splitlines()
                    rows.append((command, first.partition(": ")[0].rstrip(".")))
            with formatter.section(name):
                formatter.write_dl(rows)


def application(only: str | None = None) -> typer.Typer:
    """The program with all of its commands, with one, ("") with none, or ("names") with their names alone."""
    app = typer.Typer(
        name="dfmspec",
        cls=_Grouped,
        help="One YAML file in; mistakes found before a GPU is touched; the run supervised and written down.",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(root)
    names = list(COMMANDS)
    if only == _NAMES_ALONE:
        for name in names:
            app.command(name)(_nothing)
        return app
    if only is not None:
        names = [only] if only else []
    for name in names:
        _add_command(app, name)
    return app


_NAMES_ALONE = "names"
"""Asked for where a shell completes the name of a command, for which none is imported."""


def _nothing() -> None:
    """In place of a command."""


def _add_command(app: typer.Typer, name: str) -> None:
    """Import a command's module, and add the command to the program."""
    module = import_module(f"dfmspec.cli.{COMMANDS[name]}")
    if name in ("data", "policy"):
        app.add_typer(module.app, name=name)
    elif name == "import":
        # Its words are another program's, with options that are not ours.
        foreign = {"ignore_unknown_options": True}
        app.command(name, context_settings=foreign)(with_levels(module.import_))
    else:
        app.command(name)(with_levels(getattr(module, name)))


def _with_torchrun_words(arguments: list[str]) -> list[str]:
    """The command line with the words behind `--` as the key of the spec that has torchrun's options."""
    if "--" not in arguments or arguments[1:2] not in (["run"], ["plan"], ["validate"]):
        return arguments
    at = arguments.index("--")
    words = arguments[at + 1 :]
    from dfmspec.spec.torchrun import options_of

    options = json.dumps(options_of(words))
    return [*arguments[:at], f"launcher.torchrun_options={options}"] if words else arguments[:at]


_HAS_CHILDREN = ("run", "reproduce", "sample", "export", "data")
"""Commands that start processes or threads, and end as Python ends."""


def program() -> None:
    """What `dfmspec` is: main, and then no taking apart of what the process has in memory, a sixth of a short command.

    Its output is flushed; what else there is, the operating system frees.
    """
    try:
        main()
    except SystemExit as ending:
        is_plain = ending.code is None or isinstance(ending.code, int)
        if not is_plain or set(sys.argv[1:2]) & set(_HAS_CHILDREN):
            raise
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # nobody reads it any more
            raise ending from None
        os._exit(int(ending.code or OK))


def main() -> None:
    """Run the program; every expected error is one message and its exit code, never a traceback."""
    sys.argv = _with_torchrun_words(sys.argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A locale without the letters of a key is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = application(_called(sys.argv))(prog_name="dfmspec", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else OK)
    except typer.Abort:
        sys.exit(130)
    except _Misuse as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help itself
            typer.echo(error.message, err=True)
            sys.exit(USAGE)
        _tell("error", _said(error))
        sys.exit(USAGE)
    except DfmspecError as error:
        kind = "internal error" if error.exit_code == INTERNAL else "error"
        _tell(kind, str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader has left, such as head; the interpreter's own last flush is to fail nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _tell("error", str(error))
        sys.exit(PREFLIGHT)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        sys.exit(_report_a_fault())


def _tell(kind: str, message: str) -> None:
    """An error on stderr."""
    from dfmspec.redaction import redacted

    typer.echo(f"{painted(kind, RED, sys.stderr)}: {redacted(message)}", err=True)


_Misuse: Any = typer.BadParameter.__mro__[2]
"""What the parser of the command line raises: any of its errors."""


def _said(error: Any) -> str:
    """What the parser says, in the voice of all other errors: what is, and one way out."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "dfmspec"
    kind = type(error).__name__
    help_is = f"{command} --help lists what there is"
    if kind == "NoSuchOption":
        meant = error.possibilities or []
        if meant:
            return f"there is no option {error.option_name}; did you mean {' or '.join(sorted(meant)[:3])}?"
        return f"there is no option {error.option_name}; values of keys are given as KEY=VALUE, and {help_is}"
    if kind == "MissingParameter" and None not in (error.param, context):
        return f"{command} needs {error.param.make_metavar(context)}; {help_is}"
    message = str(error.format_message()).rstrip(".")
    return f"{message[:1].lower()}{message[1:]}; {help_is}"


def _called(arguments: Sequence[str]) -> str | None:
    """The command that a command line calls; "" for the version alone, and None where all are needed."""
    # The shell that completes a line gives it in a variable.
    completed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS")
    if completed and "_DFMSPEC_COMPLETE" in os.environ:
        words = completed.split()
        return words[1] if len(words) > 1 and words[1] in COMMANDS else _NAMES_ALONE
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
