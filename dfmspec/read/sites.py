"""What a site, a user and a project say of every spec: their folders, the profiles in them, and the site's policies.

A profile NAME is a spec's layer in `profiles/NAME.yaml` of such a folder. The folders that have it are laid on one
another: a site's, which its administrators write, under the user's, under the project's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfmspec.errors import UsageError
from dfmspec.read.scalars import plain

SITE_VARIABLE = "DFMSPEC_SITE"
"""Names the site's folder, in place of /etc/xdg/dfmspec."""
PROJECT = ".dfmspec"
"""The project's folder: beside the spec, or in a folder above it, up to the repository's own."""
_PROFILES = "profiles"
_SUFFIXES = (".yaml", ".yml")
_NAME = r"[A-Za-z0-9_][\w.-]*"


class Place(NamedTuple):
    """A folder with profiles."""

    whose: str
    """"site", "user" or "project"."""
    folder: Path


_SITE = Path("/etc/xdg/dfmspec")
"""Where a site's policy is in any case: whatever variable a user sets."""
_POLICY = "policy.yaml"


def site_folder() -> Path:
    """The folder that a site's administrators write.

    Raises:
        UsageError: the one that is named is not there: its policy would be left out in silence.
    """
    named = os.environ.get(SITE_VARIABLE)
    if named:
        if not Path(named).is_dir():
            raise UsageError(f"{SITE_VARIABLE}: {named} is no folder; name the site's, or unset it")
        return Path(named)
    import platformdirs

    return platformdirs.site_config_path("dfmspec", appauthor=False)


def site_policies() -> list[Path]:
    """The policies of the site that there are."""
    folders = [_SITE, site_folder()] if os.environ.get(SITE_VARIABLE) else [_SITE]
    return [folder / _POLICY for folder in folders if os.path.lexists(folder / _POLICY)]


def is_the_sites(file: str) -> bool:
    """Whether a file is one that the site's administrators wrote."""
    return os.path.realpath(file).startswith((f"{os.path.realpath(_SITE)}/", f"{os.path.realpath(site_folder())}/"))


def places(spec_folder: str) -> list[Place]:
    """The folders of site, user and project, lowest first; the last one where there is such a folder."""
    import platformdirs

    user = platformdirs.user_config_path("dfmspec", appauthor=False)
    found = [Place("site", site_folder()), Place("user", user)]
    project = _project(Path(spec_folder))
    if project is not None:
        found.append(Place("project", project))
    return found


def _project(folder: Path) -> Path | None:
    """The project's folder; one above the repository belongs to something else."""
    for above in (folder, *folder.parents):
        if (above / PROJECT).is_dir():
            seen = os.path.relpath(above / PROJECT)
            return above / PROJECT if seen.startswith("..") else Path(seen)
        if (above / ".git").exists():
            return None
    return None


def names_of(value: Any) -> list[str]:
    """The profiles that `profile:` or `profile=` names; of another type, which is reported elsewhere, none."""
    value = plain(value)
    if isinstance(value, str):
        words = [word.strip() for word in value.split(",")]
        return [word for word in words if word and word != "null"]
    if isinstance(value, list):
        return [name for name in map(plain, value) if isinstance(name, str)]
    return []


def files_of(name: str, among: Sequence[Place]) -> list[Path]:
    """The files of a profile, lowest first; none where there is no such profile."""
    if re.fullmatch(_NAME, name) is None:
        return []
    files = []
    for place in among:
        candidates = [place.folder / _PROFILES / f"{name}{suffix}" for suffix in _SUFFIXES]
        files += [file for file in candidates if os.path.lexists(file)][:1]
    return files


def known_profiles(among: Sequence[Place]) -> Iterator[tuple[str, str]]:
    """Name, and whose it is, of every profile; of one that several have, each."""
    for place in among:
        try:
            files = sorted((place.folder / _PROFILES).iterdir())
        except OSError:  # there is no such folder, or it is not ours to read
            continue
        for file in files:
            if file.suffix in _SUFFIXES and re.fullmatch(_NAME, file.stem):
                yield file.stem, place.whose


def site_profiles() -> list[Path]:
    """The files of the site's profiles."""
    site = [Place("site", site_folder())]
    return [file for name, _ in known_profiles(site) for file in files_of(name, site)]
