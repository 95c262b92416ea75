"""What `run.resume` asks for, read once."""

from __future__ import annotations

from typing import Literal, NamedTuple

WORDS = ("auto", "require", "never")


class Resume(NamedTuple):
    """Where a run is to go on."""

    kind: Literal["auto", "require", "never", "iteration", "folder"]
    """auto: with the unfinished run of the same plan. require: that, or an error. never: a new run.

    Else: from what is named.
    """
    iteration: int | None = None
    """The iteration of an earlier run of the same plan."""
    folder: str | None = None
    """A run directory, or a folder of checkpoints, as the spec has it."""

    @classmethod
    def parse(cls, value: str | int) -> Resume:
        """The value of run.resume."""
        if isinstance(value, int):
            return cls("iteration", iteration=value)
        if value in WORDS:
            return cls(value)  # type: ignore[arg-type]  # mypy does not narrow a text by a tuple
        return cls("folder", folder=value)

    @property
    def source(self) -> str | None:
        """What is named to start from, for the manifest; None: nothing."""
        if self.iteration is not None:
            return str(self.iteration)
        return self.folder
