"""dfmspec export: a checkpoint's weights as one file, or as a checkpoint that DFM loads; a run's record for others."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.cli.arguments import complete_run, named_folder, record_of, trainer_module
from dfmspec.errors import UsageError


class Names(StrEnum):
    """Whose names the tensors have."""

    dfmspec = "dfmspec"
    dfm = "dfm"


class Program(StrEnum):
    """Which program is to load them."""

    dfm = "dfm"


class Provenance(StrEnum):
    """In which form a run's record is written."""

    slsa = "slsa"
    ro_crate = "ro-crate"


_Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="An iter_N folder, a folder of checkpoints, a run directory, or a run by its name or id.",
        autocompletion=complete_run,
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="The file to write, or with --for the folder; it must not exist. With --provenance, by itself in the run.",
        show_default=False,
    ),
]
_Provenance = Annotated[
    Provenance | None,
    typer.Option(help="Of a run: its record as SLSA provenance or as a Process Run Crate, instead of weights."),
]
_Names = Annotated[
    Names | None,
    typer.Option(help="Names of the tensors in a file: dfmspec's, or those of NVIDIA DFM's DiT.  [default: dfmspec]"),
]
_For = Annotated[
    Program | None,
    typer.Option("--for", help="Write a folder with a checkpoint that this program loads, instead of a file."),
]
_Raw = Annotated[
    bool,
    typer.Option("--raw", help="The trained weights instead of the averaged ones."),
]


def export(
    checkpoint: _Checkpoint,
    out: _Out = None,
    names: _Names = None,
    program: _For = None,
    raw: _Raw = False,
    provenance: _Provenance = None,
) -> None:
    """Write a checkpoint's weights as one safetensors file, or a run's provenance.

    They are whole, whatever layout they were trained in.

    checkpoint.pretrained_checkpoint starts a run from such a file, of either naming. With --for dfm it is a folder
    with a checkpoint of NVIDIA DFM's DiT, from which either program starts.

    Example: dfmspec export runs/butterfly_tiny_cpu/latest -o butterfly.safetensors --names dfm
    """
    checkpoint = named_folder(checkpoint, "an iter_N folder, a folder of checkpoints, a run directory")
    if provenance is not None:
        if names is not None or program is not None or raw:
            raise UsageError("--provenance writes a record; leave out --names, --for and --raw, which are of weights")
        _write_provenance(checkpoint, provenance, out)
        return
    if out is None:
        raise UsageError("name the file to write with --out")
    if out.exists():
        raise UsageError(f"--out {out}: it exists already; name another file")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: its folder does not exist; name another file")
    if names is not None and program is not None:
        raise UsageError("--names is for a file, and --for writes a folder; leave one out")
    arguments = [str(checkpoint), str(out)]
    if names is not None:
        arguments += ["--names", names.value]
    if program is not None:
        arguments += ["--for", program.value]
    if raw:
        arguments.append("--raw")
    raise typer.Exit(trainer_module("commands.export", *arguments))


def _write_provenance(folder: Path, form: Provenance, out: Path | None) -> None:
    """Write a run's record in a form of others'.

    Raises:
        UsageError: the folder is no run, or the file is there.
        CheckpointError: its record cannot be read.
    """
    import json

    from dfmspec.files import write_aside
    from dfmspec.record.attestation import ro_crate, slsa
    from dfmspec.record.run_dir import RunDir
    from dfmspec.redaction import known_here, without_secrets

    run = RunDir(folder.resolve())
    if not run.manifest.exists():
        raise UsageError(f"{folder} is no run directory: it has no {run.manifest.name}; --provenance is of a run")
    manifest = record_of(run)
    made = ro_crate(run, manifest) if form is Provenance.ro_crate else slsa(run, manifest)
    names = {Provenance.ro_crate: "ro-crate-metadata.json", Provenance.slsa: "provenance.slsa.json"}
    file = out or run.path / names[form]
    if file.exists():
        raise UsageError(f"--out {file}: it exists already; name another file, or remove it")
    write_aside(file, json.dumps(without_secrets(made, known_here()), indent=2) + "\n")
    typer.echo(str(file))
