"""dfmspec verify: whether a run is still what its record says, from its spec to its checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.cli.arguments import TEXT_OR_JSON, RunArgument, RunsFolder, TextOrJson, check_format, record_of
from dfmspec.colours import GREEN, RED, YELLOW, painted
from dfmspec.errors import FINDINGS

_Deep = Annotated[
    bool,
    typer.Option("--deep", help="Read the shards too, where the record has the digest of their content."),
]


def verify(
    run: RunArgument, output_dir: RunsFolder = Path("runs"), deep: _Deep = False, format_: TextOrJson = "text"
) -> None:
    """Follow the digests of a run, from its spec to its checkpoints.

    A link holds, differs, is gone, or is unknown, where the record does not say. dfmspec's own code and the data are of
    this machine: where they differ, the run stands, and cannot be made again here.

    Exit code 0: the chain holds. 1: it is broken.

    Example: dfmspec verify butterfly_tiny_cpu
    """
    from dfmspec.record.runs import find_run
    from dfmspec.run.chain import DIFFERS, GONE, HOLDS, chain

    form = check_format(format_, TEXT_OR_JSON)
    found = find_run(run, output_dir)
    manifest = record_of(found)
    links = chain(found, manifest, deep=deep)
    broken = [link for link in links if link.is_broken]
    if form == "json":
        entries = [{**link._asdict(), "broken": link.is_broken} for link in links]
        typer.echo(json.dumps({"run": str(found), "run_id": manifest.run_id, "links": entries}, indent=2))
    else:
        colours = {HOLDS: GREEN, DIFFERS: RED, GONE: RED}
        width = max(len(link.name) for link in links)
        for link in links:
            state = painted(f"{link.state:<7}", colours.get(link.state, YELLOW), sys.stdout)
            typer.echo(f"{state}  {link.name:<{width}}  {link.said}".rstrip())
    if broken:
        raise typer.Exit(FINDINGS)
