"""dfmspec profiles: which profiles there are here, and where they are looked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.cli.arguments import TEXT_OR_JSON, TextOrJson, check_format

_Folder = Annotated[
    Path,
    typer.Argument(help="The folder of the specs, by which a project's profiles are found."),
]


def profiles(folder: _Folder = Path(), format_: TextOrJson = "text") -> None:
    """List the profiles of project, user and site.

    A profile is a layer that lies under specs which name it: `profile: NAME`, or --profile NAME. One that several
    folders have is laid from all of them, the project's over the user's over the site's.

    Example: dfmspec profiles
    """
    from dfmspec.read.sites import files_of, known_profiles, places

    form = check_format(format_, TEXT_OR_JSON)
    among = places(str(folder.absolute()))
    files: dict[str, list[str]] = {}
    for name, _ in known_profiles(among):
        files[name] = [str(file) for file in files_of(name, among)]
    folders = {place.whose: str(place.folder) for place in among}
    if form == "json":
        typer.echo(json.dumps({"folders": folders, "profiles": files}, indent=2))
        return
    for name in sorted(files):
        typer.echo(name)
        for file in files[name]:
            typer.echo(f"  {file}")
    looked = "; ".join(f"the {whose}'s in {place}" for whose, place in folders.items())
    missing = "" if "project" in folders else "; no folder .dfmspec here or above, up to the repository's"
    typer.echo(f"looked for: {looked}{missing}", err=True)
