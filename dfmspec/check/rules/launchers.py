"""RUN: what each launcher needs of a spec."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from dfmspec.check.rules.base import DFM, ERROR, HINT, WARNING, Rule, View, excludes, listed, path
from dfmspec.diagnostics import Finding
from dfmspec.spec.launchers import LAUNCHERS
from dfmspec.spec.paths import PATH_KEYS, is_relative, scheme
from dfmspec.spec.torchrun import FREE, OF_THE_PLAN, name_of
from dfmspec.targets import minutes_of

KIND = "launcher.kind"
_LIMIT = "launcher.time_limit"
_EXIT = "train.exit_duration_in_mins"
_ROOT = "launcher.root"
_HANDLER = "train.exit_signal_handler"
_HEAD = "cluster.master_addr"
_NNODES = "cluster.nnodes"
_OUTPUT = "run.output_dir"

_PLANS_OWN = (
    # What the plan gives.
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--gpus",
    "--gpus-per-node",
    "--gres",
    "--time",
    "--signal",
    "--requeue",
    "--no-requeue",
    "--open-mode",
    "--partition",
    "--account",
    "--qos",
    "--job-name",
    # What would make another job of it.
    "--array",
    "--output",
    "--export",
    "--wrap",
    "--test-only",
    "--gpus-per-task",
    "--ntasks-per-gpu",
    "--ntasks-per-core",
    "--ntasks-per-socket",
    "--chdir",
)
"""Options of sbatch that the plan gives, or that would change what it is."""
_INSTEAD = {
    "--nodes": "cluster.nnodes",
    "--time": "launcher.time_limit",
    "--signal": "launcher.stop_before",
    "--job-name": "name",
    "--export": "launcher.env",
    "--output": "run.output_dir",
}
"""The keys that give those options, where they are not named as the option is."""
_OF_ONE_MACHINE = ("/tmp", "/var/tmp", "/dev/shm", "/run")
"""Folders that each machine has on a disk, or in memory, of its own."""


def _of_another(view: View) -> Iterator[Finding]:
    kind = view[KIND]
    for other, entry in LAUNCHERS.items():
        if other == kind:
            continue
        for name in entry.keys:
            key = f"launcher.{name}"
            if view.is_set_by_user(key) and view[key] not in (None, [], {}):
                yield Finding(
                    path(key),
                    f"{key} is for launcher {other}, and the launcher is {kind}",
                    f"set launcher.kind to {other}, or remove it",
                )
    if view.trainer.OWN and view.is_set_by_user(_ROOT) and view.or_null(_ROOT) is not None:
        yield Finding(path(_ROOT), f"{_ROOT} is for NVIDIA DFM's scripts, and the target is {view.target}", "remove it")


def _hosts(view: View) -> Iterator[Finding]:
    hosts = view["launcher.hosts"]
    nnodes = view[_NNODES]
    if view[KIND] == "ssh" and len(hosts) != nnodes:
        fewest = max(1, len(hosts))
        yield Finding(
            path("launcher.hosts" if hosts else KIND),
            f"launcher.hosts names {len(hosts)} hosts, and cluster.nnodes is {nnodes}",
            f"name {nnodes}, node 0 first; or set cluster.nnodes to {fewest}",
        )


def _time(view: View) -> Iterator[Finding]:
    limit = view[_LIMIT]
    before = view["launcher.stop_before"]
    minutes = minutes_of(limit)
    if view[KIND] != "slurm" or minutes is None:
        return
    seconds = minutes * 60
    if seconds <= before:
        yield Finding(
            path(_LIMIT),
            f"{_LIMIT} {limit} is {seconds:.0f} seconds, and the run is asked to save {before} seconds before its end",
            "a longer limit, or a smaller launcher.stop_before",
        )


def _two_parts(view: View) -> Iterator[Finding]:
    limit = view[_LIMIT]
    length = minutes_of(limit)
    if view[KIND] != "slurm" or length is None or "-" in limit or limit.count(":") != 1:
        return
    # A limit too short to save in is told as such.
    if length * 60 <= view["launcher.stop_before"]:
        return
    minutes, _, seconds = limit.partition(":")
    is_long = f"{int(minutes)} minutes"
    if int(seconds):
        is_long += f" and {int(seconds)} seconds"
    yield Finding(
        path(_LIMIT),
        f"{_LIMIT} {limit} is {is_long} to Slurm, which reads two numbers as minutes and seconds",
        f'"{limit}:00" for hours and minutes; "{int(minutes)}" for minutes',
    )


def _planned(name: str) -> str | None:
    """The option of the plan that sbatch takes a name for: its first letters are enough."""
    if name in _PLANS_OWN:
        return name
    for option in _PLANS_OWN:
        if option.startswith(name):
            return option
    return None


def _key_of(option: str) -> str | None:
    """The key that gives an option of sbatch; None where the plan fixes it."""
    if option in _INSTEAD:
        return _INSTEAD[option]
    name = option.removeprefix("--")
    return f"launcher.{name}" if name in LAUNCHERS["slurm"].keys else None


def _options(view: View) -> Iterator[Finding]:
    for index, option in enumerate(view["launcher.sbatch_options"]):
        name = option.partition("=")[0]
        own = _planned(name)
        if view[KIND] != "slurm" or own is None:
            continue
        key = _key_of(own)
        yield Finding(
            ("launcher", "sbatch_options", index),
            f"{name} is the plan's to give: the job would not be what was checked",
            f"set {key} instead" if key else "remove it",
        )


def _torchrun_options(view: View) -> Iterator[Finding]:
    for index, option in enumerate(view["launcher.torchrun_options"] or ()):
        name = name_of(option)
        if name in OF_THE_PLAN:
            message = f"--{name} is the plan's to give: the run would not be what was checked"
            hint = f"set {_TORCHRUN_KEYS[name]} instead" if name in _TORCHRUN_KEYS else "remove it"
        elif name not in FREE:
            close = get_close_matches(name, FREE, n=1)
            message = f"torchrun has no option --{name}"
            hint = f"did you mean --{close[0]}?" if close else f"it has {listed(f'--{each}' for each in FREE)}"
        else:
            continue
        yield Finding(("launcher", "torchrun_options", index), message, hint)


_TORCHRUN_KEYS = {
    "nproc-per-node": "cluster.nproc_per_node",
    "nnodes": "cluster.nnodes",
    "master-addr": "cluster.master_addr",
    "master-port": "cluster.master_port",
    "rdzv-backend": "launcher.rendezvous",
}
"""The keys that give options of torchrun."""


def _is_within(place: str, folder: str) -> bool:
    return place == folder or place.startswith(f"{folder}/")


def _places_of_pods(view: View) -> dict[str, str]:
    """The paths that pods must have on a volume: what is kept or read, and what depends on a folder of the image."""
    needed = {_OUTPUT, "checkpoint.save"}
    if not view.is_mock:
        needed.add("dataset.path")
    places = {}
    for key in sorted(PATH_KEYS):
        place = view.resolved.values.get(key)
        if not place or place.startswith("${") or scheme(place):
            continue
        if key in needed or is_relative(place):
            places[key] = place
    return places


def _kubernetes(view: View) -> Iterator[Finding]:
    if view[KIND] != "kubernetes":
        return

    # The image.
    if view["launcher.image"] is None:
        yield Finding(
            path(KIND),
            "launcher kubernetes needs launcher.image: what the pods run",
            "an image with dfmspec[train], or NVIDIA DFM's for target dfm",
        )

    # The volumes.
    mounts = [mount.rstrip("/") for mount in view["launcher.volumes"].values()]
    where = f"mounted: {listed(mounts)}" if mounts else "launcher.volumes mounts none"
    for key, place in _places_of_pods(view).items():
        if not any(_is_within(place, mount) for mount in mounts):
            yield Finding(
                path(key),
                f"{key} {place} is on no volume of the pods ({where}): it would be lost with them, or is not there",
                "mount a claim with launcher.volumes, and name a folder in it",
            )


def _local_head(view: View) -> Iterator[Finding]:
    address = view.or_null(_HEAD) or ""
    nnodes = view[_NNODES]
    if nnodes <= 1:
        return
    if address in ("localhost", "::1") or address.startswith("127."):
        # Started by hand, all nodes may be this machine.
        severity = WARNING if view[KIND] == "local" else None
        yield Finding(
            path(_HEAD),
            f"{_HEAD} {address} is another machine on each of {nnodes} nodes",
            "the address of node 0; null: the launcher's choice",
            severity,
        )


def _on_one_machine(view: View) -> Iterator[Finding]:
    nodes = view[_NNODES]
    if view[KIND] != "local" or nodes == 1 or view["cluster.device"] != "cuda":
        return
    at = view.key_set_by_user(KIND, otherwise=_NNODES)
    message = f"launcher local starts all {nodes} nodes on this machine, and their processes share its GPUs"
    hint = (
        "launcher.kind slurm or ssh starts them on their own; or start each node's script by hand, as plan shows them"
    )
    yield Finding(path(at), message, hint, None if view.starts else HINT)


def _own_disk(view: View) -> bool:
    place = view[_OUTPUT]
    over_machines = view[KIND] in ("ssh", "slurm") and view[_NNODES] > 1
    return over_machines and any(_is_within(place, folder) for folder in _OF_ONE_MACHINE)


def _written_apart(view: View) -> str:
    place = view[_OUTPUT]
    nnodes = view[_NNODES]
    return f"{_OUTPUT} {place} is usually a disk of each machine's own, and {nnodes} nodes write one run directory"


def _never_saves(view: View) -> bool:
    return view[KIND] == "slurm" and view.or_null(_EXIT) is None and not view.or_null(_HANDLER)


def _without_a_time(view: View) -> str:
    """The key by which there is no time to save at."""
    return _LIMIT if minutes_of(view.or_null(_LIMIT)) is None else _EXIT


RULES = (
    # How nodes find each other.
    Rule(
        "RUN111",
        "head-address-local",
        ERROR,
        _local_head,
        "Every node waits at its own door until the timeout, without a word.",
        "torch.distributed.run",
    ),
    Rule(
        "RUN130",
        "nodes-on-one-machine",
        ERROR,
        _on_one_machine,
        "Twice as many processes as GPUs: each GPU holds two models, or the second finds none.",
        "dfmspec's launchers",
    ),
    # What is meant for a launcher, or missing for it.
    Rule(
        "RUN116",
        "key-of-another-launcher",
        WARNING,
        _of_another,
        "It is not read.",
        "dfmspec's launchers",
    ),
    Rule(
        "RUN117",
        "hosts-and-nodes-differ",
        ERROR,
        _hosts,
        "There would be a node too few or too many.",
        "dfmspec's launcher ssh",
    ),
    Rule(
        "RUN118",
        "no-time-to-save",
        ERROR,
        _time,
        "Slurm would ask the run to save as soon as it starts, and queue it again and again.",
        "sbatch --signal",
    ),
    Rule(
        "RUN124",
        "minutes-taken-for-hours",
        HINT,
        _two_parts,
        "A run meant to last for hours is stopped, saved and queued again every few minutes.",
        "sbatch --time",
    ),
    Rule(
        "RUN119",
        "option-of-the-plan",
        ERROR,
        _options,
        "The job script would ask for another job than the plan that was checked.",
        "sbatch",
    ),
    Rule(
        "RUN129",
        "torchrun-option-impossible",
        ERROR,
        _torchrun_options,
        "torchrun refuses an option that it does not know, on every node; one of the plan's would start another run.",
        "torch.distributed.run",
    ),
    Rule(
        "RUN120",
        "pods-lack-something",
        ERROR,
        _kubernetes,
        "A pod's own disk ends with the pod; a path that is not mounted is not there.",
        "Kubernetes volumes",
    ),
    # What is lost when a run ends, or lies on several machines.
    Rule(
        "RUN123",
        "no-time-to-save-at",
        WARNING,
        excludes(
            _never_saves,
            at=KIND,
            message=lambda v: (
                "NVIDIA DFM's scripts save before the end only at a time that they are given, and "
                f"{_without_a_time(v)} gives none: each time the partition's limit comes, "
                "the iterations since the last checkpoint are lost"
            ),
            hint=f"leave {_HANDLER} out; or set {_LIMIT}, to the partition's limit at most, and leave {_EXIT} out",
        ),
        "Slurm's notice reaches the job, which can only queue itself again: what was done since the last checkpoint "
        "is lost, in silence.",
        "Megatron-Bridge training/train.py, checkpoint_and_decide_exit",
        targets=DFM,
    ),
    Rule(
        "RUN121",
        "output-not-shared",
        WARNING,
        excludes(
            _own_disk,
            at=_OUTPUT,
            message=_written_apart,
            hint="a folder on a file system that every node shares",
        ),
        "Nodes other than this one find no configuration, and checkpoints are in pieces.",
        "dfmspec's launchers",
    ),
)
