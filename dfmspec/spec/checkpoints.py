"""What a folder `iter_N` is, by the files in it: whether its save was finished, and which program's it is."""

from __future__ import annotations

from pathlib import Path

from dfmspec.spec.iterations import iteration_folders, iteration_in

MANIFEST = "manifest.json"
"""The file that commits a checkpoint of dfmspec's: the last one of it."""
RUN_CONFIG = "run_config.yaml"
"""The file in which Megatron-Bridge says, in each checkpoint, what it trains with."""
_LAST_UPSTREAM = ("metadata.json", ".metadata")
"""What upstream writes last: megatron-core's file, or torch's where the format is not torch_dist."""
_MARKS = {
    RUN_CONFIG: "Megatron-Bridge",
    "train_state.pt": "Megatron-Bridge",
    "mp_rank_00": "Megatron-LM",
    "mp_rank_00_000": "Megatron-LM",
}
"""What only another program writes into a checkpoint, and which one that is."""


def without_tags(run_config: str) -> str:
    """The text of RUN_CONFIG without `!!python/...`, which no safe reader of YAML takes."""
    return "\n".join(line.split(" !!")[0] for line in run_config.splitlines())


def is_committed(checkpoint: Path, *, own: bool) -> bool:
    """Whether a save was finished.

    Args:
        checkpoint: a folder `iter_N`.
        own: as dfmspec's trainer sees it; otherwise as upstream's.
    """
    last = (MANIFEST,) if own else _LAST_UPSTREAM
    return any((checkpoint / name).exists() for name in last)


def committed_iterations(folder: Path, *, own: bool) -> list[int]:
    """The iterations of a folder's checkpoints whose save was finished, in order."""
    found = [iteration_in(path.name) for path in iteration_folders(folder) if is_committed(path, own=own)]
    return sorted(iteration for iteration in found if iteration is not None)


def named_checkpoint(path: Path) -> Path | None:
    """The checkpoint of upstream's that a path names: itself, or the newest finished one in it; None: there is none."""
    if iteration_in(path.name) is not None:
        return path
    return next((found for found in iteration_folders(path) if is_committed(found, own=False)), None)


def of_another(checkpoint: Path, *, own: bool) -> str | None:
    """`Megatron-Bridge's (it has run_config.yaml)`: whose a checkpoint is that a trainer cannot read; None: nobody's.

    Args:
        checkpoint: a folder `iter_N`.
        own: whether the trainer is dfmspec's; otherwise it is upstream's, which reads Megatron-LM's too.
    """
    is_ours = (checkpoint / MANIFEST).exists()
    if not own:
        return f"dfmspec's (it has {MANIFEST})" if is_ours else None
    for name, program in _MARKS.items():
        if not is_ours and (checkpoint / name).exists():
            return f"{program}'s (it has {name})"
    return None
