"""Which code a run came from: the state of its repository, its changes as a patch, and dfmspec's own code."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from dfmspec import __version__

_SECONDS = 5
_LISTED = 50
"""How many files that git does not know are named."""


def folder_of_spec(spec_file: str | None) -> Path:
    """The folder of a spec's file; the working directory, where there is none."""
    return Path(spec_file).parent if spec_file and Path(spec_file).is_file() else Path.cwd()


def git_state(folder: Path, but: Path | None = None) -> dict[str, Any] | None:
    """The repository around a folder; None outside one.

    Args:
        folder: anywhere in it.
        but: a folder whose files are nobody's source, such as that of the runs.

    Returns:
        commit; branch (null: none is checked out); remote, the address of the branch's, or of origin; dirty, whether
        files that git knows differ, and changed, which; untracked, files that it does not know; submodules, each
        path's commit. What git took too long to tell is null.
    """
    commit = _said(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _said(folder, "status", "--porcelain", "--untracked-files=normal")
    changed: list[str] | None = None
    untracked: list[str] | None = None
    is_dirty = None
    if changes is not None:
        lines = changes.splitlines()
        top = Path((_said(folder, "rev-parse", "--show-toplevel") or "").strip())
        unknown = [line[3:] for line in lines if line.startswith("??")]
        untracked = [name for name in unknown if but is None or not _lies_in(top / name, but)]
        changed = [line[3:] for line in lines if not line.startswith("??")]
        is_dirty = bool(changed or untracked)
        untracked = untracked[:_LISTED]
    branch = (_said(folder, "symbolic-ref", "--short", "--quiet", "HEAD") or "").strip() or None
    return {
        "commit": commit.strip(),
        "branch": branch,
        "remote": _remote(folder, branch),
        "dirty": is_dirty,
        "changed": changed,
        "untracked": untracked,
        "submodules": _submodules(folder),
    }


def _lies_in(place: Path, folder: Path) -> bool:
    return place.resolve().is_relative_to(folder.resolve())


def _remote(folder: Path, branch: str | None) -> str | None:
    """The address that a branch is pushed to; without one, that of origin."""
    name = branch and (_said(folder, "config", f"branch.{branch}.remote") or "").strip()
    address = _said(folder, "remote", "get-url", name or "origin")
    return (address or "").strip() or None


def _submodules(folder: Path) -> dict[str, str] | None:
    """Path -> commit of each submodule, and of theirs; null: git took too long."""
    said = _said(folder, "submodule", "status", "--recursive")
    if said is None:
        return None
    found = {}
    for line in said.splitlines():
        # A sign, the commit, the path, and what describes the commit.
        words = line[1:].split(" ")
        if len(words) > 1:
            found[words[1]] = words[0]
    return found


def patch_of(folder: Path) -> str | None:
    """What differs from the commit, in files that git knows, as `git apply` takes it; None: git cannot say."""
    top = _said(folder, "rev-parse", "--show-toplevel")
    return top and _said(Path(top.strip()), "diff", "HEAD", "--binary", "--submodule=short")


def own_code() -> dict[str, Any]:
    """dfmspec's own version; where it is a checkout, its commit, and whether it differs."""
    package = Path(__file__).parents[1]
    found: dict[str, Any] = {"version": __version__}
    # It may be installed inside another's repository.
    is_a_checkout = _said(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    state = git_state(package) if is_a_checkout else None
    if state is not None:
        found |= {"commit": state["commit"], "dirty": state["dirty"]}
    return found


def _said(folder: Path, *words: str) -> str | None:
    """What git prints; None when it is not there, fails, or takes over five seconds."""
    argv = ["git", "-C", str(folder), "--no-optional-locks", *words]
    try:
        result = subprocess.run(
            argv, capture_output=True, text=True, errors="surrogateescape", timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout
