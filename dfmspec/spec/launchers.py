"""The launchers: how a plan's processes are started.

A new one is a module of dfmspec/run/launch and an entry in LAUNCHERS.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """An entry of LAUNCHERS: what is known of a launcher before its module is imported."""

    module: str
    how_to_start: str | None
    """What a plan for dfmspec's trainer tells of its start; None: `dfmspec run` needs no words."""
    how_to_start_script: str
    """What a plan for another's script tells of its start."""
    keys: tuple[str, ...] = ()
    """The keys of section `launcher` that are for it alone."""


LAUNCHERS = {
    "local": Entry(
        module="dfmspec.run.launch.local",
        how_to_start=None,
        how_to_start_script="dfmspec run starts and watches it; or write it with -o DIR, and bash DIR/node0.sh",
    ),
    "ssh": Entry(
        module="dfmspec.run.launch.ssh",
        how_to_start="dfmspec run starts each node's command by ssh",
        how_to_start_script=(
            "dfmspec run starts each node's command by ssh; or write it with -o DIR, and start each node's script there"
        ),
        keys=("hosts", "ssh_options"),
    ),
    "slurm": Entry(
        module="dfmspec.run.launch.slurm",
        how_to_start="dfmspec run submits and watches it; or write it with -o DIR, and sbatch DIR/job.sbatch",
        how_to_start_script="dfmspec run submits and watches it; or write it with -o DIR, and sbatch DIR/job.sbatch",
        keys=("partition", "account", "qos", "time_limit", "stop_before", "sbatch_options"),
    ),
    "kubernetes": Entry(
        module="dfmspec.run.launch.kubernetes",
        how_to_start="write it with -o DIR, and kubectl apply -f DIR/jobset.yaml",
        how_to_start_script="write it with -o DIR, and kubectl apply -f DIR/jobset.yaml",
        keys=("image", "namespace", "queue", "env_from", "volumes"),
    ),
}
"""What a spec may name as launcher.kind."""
