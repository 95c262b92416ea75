"""dfmspec import: a spec from a torchrun command or an override file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.check.rules import check_spec
from dfmspec.cli.arguments import stop_at_faults
from dfmspec.cli.init import SCHEMA_URL, schema_beside, sizes_of
from dfmspec.cli.voice import note
from dfmspec.diagnostics import dotted
from dfmspec.errors import UsageError
from dfmspec.files import write_named
from dfmspec.read.importing import (
    Imported,
    import_command,
    import_file,
    import_script,
    renamed_checkpoints,
    spec_of,
    split_command,
)
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.spec.paths import PATH_KEYS, is_relative
from dfmspec.targets import TARGETS

_DEAD = (
    "SPC201",
    "SPC202",
    "SPC203",
    "SPC204",
    "SPC205",
    "SPC206",
    "SPC303",
    "SPC304",
)
"""Rules whose finding says that a key is not the target's, or changes nothing."""
_TARGETS = ", ".join(TARGETS)

_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="COMMAND | FILE",
        help="A torchrun command in quotes, a script (.sh) with one, or an override file.",
        show_default=False,
    ),
]
_Target = Annotated[
    str | None,
    typer.Option(
        help=f"What is to train: {_TARGETS}; by itself what the script's name says, or dfm.",
        show_default=False,
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write the spec here; the file must not exist."),
]


def import_(
    words: _Words,
    target: _Target = None,
    out: _Out = None,
) -> None:
    """Make a spec of a command or a file for DFM's script.

    Keys that never did anything become comments.

    Example: dfmspec import 'torchrun --nproc-per-node 2
    examples/megatron/recipes/dit/pretrain_dit_model.py train.train_iters=500'
    """
    # What the words say.
    if target is not None and target not in TARGETS:
        raise UsageError(f"--target {target}: one of {_TARGETS}")
    found = _imported(words, target)
    if out is not None:
        for key in PATH_KEYS & found.values.keys():
            found.values[key] = _relative_to(out.parent, found.values[key])

    if out is not None and out.exists():
        raise UsageError(f"{out} exists, and nothing of yours is overwritten; name another file")
    for alias, key in renamed_checkpoints(found):
        note(f"taken as meant: {alias}, which upstream does not know, as {key}")

    # What of it is alive, as a spec; the rest is told.
    dead = _dead_keys(found, found.target)
    text = spec_of(found, found.target, dead)
    for word, why in [*dead.items(), *found.dead]:
        note(f"left out: {word} ({why})")

    # The spec as init writes one, printed or written.
    if out is None:
        typer.echo(_head("-", SCHEMA_URL, found) + text, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_named(out, _head(str(out), schema_beside(out), found) + text)
    typer.echo(out)


def _head(file: str, schema: str, found: Imported) -> str:
    """The first lines of a spec, as init has them; a recipe that nothing named is the target's own."""
    lines = [f"# yaml-language-server: $schema={schema}"]
    if file != "-":
        lines.append(f"# Check it with: dfmspec validate {file}      What a key means: dfmspec explain KEY")
    if "spec_version" not in found.values:
        lines.append("spec_version: 1")
    if "recipe" not in found.values:
        recipe = TARGETS[found.target].default_recipe
        lines.append(f"recipe: {recipe}  # {sizes_of(recipe)}")
    return "\n".join(lines) + "\n"


def _imported(words: Sequence[str], target: str | None) -> Imported:
    """What an override file, a script or a command says."""
    if len(words) != 1:
        return import_command(words, target)
    word = words[0]
    if " " not in word and word.endswith((".yaml", ".yml")):
        return import_file(Path(word), target)
    if " " not in word and word.endswith(".sh"):
        return import_script(Path(word), target)
    return import_command(split_command(word), target)


def _relative_to(folder: Path, value: object) -> object:
    """A relative path of the command line, as seen from a file in another folder."""
    if is_relative(value):
        return os.path.relpath(value, folder)
    return value


def _dead_keys(found: Imported, target: str) -> dict[str, str]:
    """Keys that the target does not have, or that change nothing, each with the finding that says so."""
    whole = spec_of(Imported(found.values), target, {})
    resolved = resolve_spec(load_spec("imported.yaml", text=whole))
    keys = _keys_by_place(found.values)
    dead: dict[str, str] = {}
    findings = check_spec(resolved, levels=("spec",))
    stop_at_faults(findings)
    for finding in findings:
        if finding.code not in _DEAD:
            continue
        for key in keys.get(dotted(finding.path), ()):
            dead.setdefault(key, f"{finding.message}; {finding.hint}")
    return dead


def _keys_by_place(keys: Iterable[str]) -> dict[str, list[str]]:
    """The imported keys that a finding at a place is about: one, or all of a section."""
    places: dict[str, list[str]] = {}
    for key in keys:
        section, dot, _ = key.partition(".")
        places.setdefault(key, []).append(key)
        if dot:
            places.setdefault(section, []).append(key)
    return places
