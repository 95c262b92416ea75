"""What a run is made from, looked at as it is opened: the repository of its spec, and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from dfmspec.data.fingerprint import fingerprint
from dfmspec.errors import PreflightError
from dfmspec.files import write_aside
from dfmspec.record.provenance import folder_of_spec, git_state, patch_of
from dfmspec.record.run_dir import PATCH, RunDir
from dfmspec.redaction import secrets_in
from dfmspec.run.request import Launch, Request
from dfmspec.spec.digest import text_digest

_SHOWN = 3


class Sources(NamedTuple):
    """The repository that a spec lies in."""

    git: dict[str, Any] | None
    """Its state; None outside one."""
    patch: str | None
    """What is not committed, where that is to be kept."""

    @classmethod
    def of(cls, request: Request) -> Sources:
        """Of a request, as `run.git` asks for.

        Raises:
            PreflightError: everything is to be committed, and is not; or what is not committed cannot be kept.
        """
        folder = folder_of_spec(request.spec_file)
        wanted = request.plan.run.get("git", "record")  # which earlier plans do not have
        state = git_state(folder, but=Path(request.plan.located(request.plan.run["output_dir"])))
        if wanted == "require-clean":
            _require_clean(state, folder)
        if wanted != "patch" or state is None or not state["dirty"]:
            return cls(state, None)
        patch = patch_of(folder)
        if patch is None:
            raise PreflightError(f"run.git is patch, and git cannot say what differs in {folder}; set it to record")
        if secrets_in(patch):
            raise PreflightError(
                "run.git is patch, and what is not committed has what looks like a secret; take it out, or set it to "
                "record"
            )
        return cls({**state, "patch": PATCH, "patch_digest": text_digest(patch)}, patch)

    def keep_patch(self, run: RunDir) -> None:
        """Write what is not committed beside the record of a run."""
        if self.patch is not None:
            write_aside(run.patch, self.patch)


def _require_clean(state: dict[str, Any] | None, folder: Path) -> None:
    """See that everything is committed.

    Raises:
        PreflightError: it is not, or git cannot say.
    """
    fault = ""
    if state is None:
        fault = f"{folder.absolute()} is in no repository of git"
    elif state["dirty"] is None:
        fault = f"git took too long to tell whether {folder.absolute()} is clean"
    elif state["dirty"]:
        files = [*(state["changed"] or ()), *(state["untracked"] or ())]
        more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
        fault = f"{', '.join(files[:_SHOWN])}{more} differ from the commit"
    if fault:
        raise PreflightError(f"run.git is require-clean, and {fault}; commit, or set run.git to record or patch")


def fingerprint_of(launch: Launch) -> dict[str, Any] | None:
    """The fingerprint of a run's data, where they are seen from here."""
    path = launch.config.get("dataset", {}).get("path")
    return fingerprint(Path(path)) if isinstance(path, str) and path else None
