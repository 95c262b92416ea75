"""dfmspec import: a spec from a torchrun command or an override file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.check.rules import check_spec
from dfmspec.errors import UsageError
from dfmspec.read.importing import Imported, import_command, import_file, import_script, spec_of, split_command
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.spec.paths import PATH_KEYS, is_relative
from dfmspec.targets import TARGETS

_DEAD = ("SPC201", "SPC202", "SPC203", "SPC204", "SPC205", "SPC206", "SPC303", "SPC304")


def import_(
    words: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND | FILE", help="A torchrun command in quotes, a script (.sh) with one, or an override file.", show_default=False),
    ],
    target: Annotated[
        str | None, typer.Option(help=f"What is to train: {', '.join(TARGETS)}; by itself what the script's name says, or dfm.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the spec here; the file must not exist.")] = None,
) -> None:
    """Take over a command or a file that was made for DFM's script; keys that never did anything become comments.

    Example: dfmspec import 'torchrun --nproc-per-node 2 examples/megatron/recipes/dit/pretrain_dit_model.py train.train_iters=500'
    """
    if target is not None and target not in TARGETS:
        raise UsageError(f"--target {target}: one of {', '.join(TARGETS)}")
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")) and " " not in words[0]:
        found = import_file(Path(words[0]), target)
    elif len(words) == 1 and words[0].endswith(".sh") and " " not in words[0]:
        found = import_script(Path(words[0]), target)
    else:
        found = import_command(split_command(words[0]) if len(words) == 1 else words, target)
    target = found.target
    if out is not None:
        for key in PATH_KEYS & found.values.keys():
            found.values[key] = _relative_to(out.parent, found.values[key])
    dead = _dead_keys(found, target)
    text = spec_of(found, target, dead)
    for alias in [key for key in found.values if key in ("checkpoint.checkpoint_dir", "checkpoint.load_checkpoint")]:
        typer.echo(f"taken as meant: {alias}, which upstream does not know", err=True)
    for word, why in [*dead.items(), *found.dead]:
        typer.echo(f"left out: {word} ({why})", err=True)
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise UsageError(f"{out} exists, and nothing of yours is overwritten; name another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    typer.echo(out)


def _relative_to(folder: Path, value: object) -> object:
    """A relative path of the command line, as seen from a file in another folder."""
    return os.path.relpath(value, folder) if is_relative(value) else value


def _dead_keys(found: Imported, target: str) -> dict[str, str]:
    """Keys that the target does not have, or that change nothing, each with the finding that says so."""
    whole = spec_of(Imported(found.values), target, {})
    resolved = resolve_spec(load_spec("imported.yaml", text=whole))
    dead: dict[str, str] = {}
    for finding in check_spec(resolved, levels=("spec",)):
        for key in _keys(finding.path, found.values) if finding.code in _DEAD else ():
            dead.setdefault(key, f"{finding.message}; {finding.hint}")
    return dead


def _keys(path: Sequence[str | int], keys: Sequence[str] | dict[str, object]) -> list[str]:
    """The imported keys that a finding's path is about: one, or all of a section."""
    name = ".".join(map(str, path))
    return [key for key in keys if key == name or (len(path) == 1 and key.startswith(f"{name}."))]
