"""RUN: what each launcher needs of a spec."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import ALL, DFM, ERROR, WARNING, Rule, View, excludes, path
from dfmspec.diagnostics import Finding
from dfmspec.spec.launchers import LAUNCHERS
from dfmspec.spec.paths import PATH_KEYS, is_relative
from dfmspec.targets import minutes_of

_PLANS_OWN = ("--nodes", "--ntasks", "--ntasks-per-node", "--gpus", "--gpus-per-node", "--gres", "--time", "--signal", "--requeue", "--no-requeue", "--open-mode",
              "--partition", "--account", "--qos", "--job-name", "--array", "--output", "--export", "--wrap", "--test-only", "--gpus-per-task", "--ntasks-per-gpu",
              "--ntasks-per-core", "--ntasks-per-socket", "--chdir")  # fmt: skip
"""Options of sbatch that the plan gives, or that would change what it is; sbatch takes the first letters of one for it."""
_INSTEAD = {"--nodes": "cluster.nnodes", "--time": "launcher.time_limit", "--signal": "launcher.stop_before", "--job-name": "name", "--export": "launcher.env",
            "--output": "run.output_dir"}  # fmt: skip
_OF_ONE_MACHINE = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def _of_another(view: View) -> Iterator[Finding]:
    kind = view["launcher.kind"]
    for other, entry in LAUNCHERS.items():
        for key in (f"launcher.{name}" for name in entry.keys):
            if other != kind and view.is_users(key) and view[key] not in (None, [], {}):
                yield Finding(path(key), f"{key} is for launcher {other}, and the launcher is {kind}", f"set launcher.kind to {other}, or remove it")


def _hosts(view: View) -> Iterator[Finding]:
    hosts, nnodes = view["launcher.hosts"], view["cluster.nnodes"]
    if view["launcher.kind"] == "ssh" and len(hosts) != nnodes:
        key = "launcher.hosts" if hosts else "launcher.kind"
        yield Finding(path(key), f"launcher.hosts names {len(hosts)} hosts, and cluster.nnodes is {nnodes}", f"name {nnodes}, node 0 first; or set cluster.nnodes to {max(1, len(hosts))}")


def _time(view: View) -> Iterator[Finding]:
    limit, before = view["launcher.time_limit"], view["launcher.stop_before"]
    if view["launcher.kind"] == "slurm" and limit is not None and 0 < minutes_of(limit) * 60 <= before:
        yield Finding(
            path("launcher.time_limit"), f"launcher.time_limit {limit} is {minutes_of(limit) * 60:.0f} seconds, and the run is asked to save {before} seconds before its end",
            "a longer limit, or a smaller launcher.stop_before",
        )  # fmt: skip


def _options(view: View) -> Iterator[Finding]:
    for index, option in enumerate(view["launcher.sbatch_options"]):
        name = option.partition("=")[0]
        own = name if name in _PLANS_OWN else next((own for own in _PLANS_OWN if own.startswith(name)), None)
        if view["launcher.kind"] == "slurm" and own is not None:
            there = _INSTEAD.get(own, f"launcher.{own[2:]}" if own[2:] in LAUNCHERS["slurm"].keys else None)
            yield Finding(("launcher", "sbatch_options", index), f"{name} is the plan's to give: the job would not be what was checked", f"set {there} instead" if there else "remove it")


def _kubernetes(view: View) -> Iterator[Finding]:
    if view["launcher.kind"] != "kubernetes":
        return
    if view["launcher.image"] is None:
        yield Finding(path("launcher.kind"), "launcher kubernetes needs launcher.image: what the pods run", "an image with dfmspec[train], or NVIDIA DFM's for target dfm")
    mounts = [mount.rstrip("/") for mount in view["launcher.volumes"].values()]
    kept = {"run.output_dir", "checkpoint.save", *(() if view.is_mock else ("dataset.path",))}
    places = {key: value for key in sorted(PATH_KEYS) if (value := view.resolved.values.get(key)) and not value.startswith("${") and (key in kept or is_relative(value))}
    for key, place in places.items():
        if not any(place == mount or place.startswith(f"{mount}/") for mount in mounts):
            where = f"mounted: {', '.join(mounts)}" if mounts else "launcher.volumes mounts none"
            yield Finding(path(key), f"{key} {place} is on no volume of the pods ({where}): it would be lost with them, or is not there", "mount a claim with launcher.volumes, and name a folder in it")


def _local_head(view: View) -> Iterator[Finding]:
    address, nnodes = view["cluster.master_addr"] or "", view["cluster.nnodes"]
    if nnodes > 1 and (address in ("localhost", "::1") or address.startswith("127.")):
        yield Finding(
            path("cluster.master_addr"), f"cluster.master_addr {address} is another machine on each of {nnodes} nodes", "the address of node 0; null: the launcher's choice",
            WARNING if view["launcher.kind"] == "local" else None,  # where all nodes may be this machine
        )  # fmt: skip


def _own_disk(view: View) -> bool:
    place = view["run.output_dir"]
    return view["launcher.kind"] in ("ssh", "slurm") and view["cluster.nnodes"] > 1 and any(place == root or place.startswith(f"{root}/") for root in _OF_ONE_MACHINE)


def _never_saves(view: View) -> bool:
    return view["launcher.kind"] == "slurm" and view["launcher.time_limit"] is None and view["train.exit_duration_in_mins"] is None


RULES = (
    Rule(
        "RUN111", "head-address-local", ERROR, _local_head,
        "Every node waits at its own door until the timeout, without a word.", "torch.distributed.run", ALL,
    ),
    Rule("RUN116", "key-of-another-launcher", WARNING, _of_another, "It is not read.", "dfmspec's launchers", ALL),
    Rule("RUN117", "hosts-and-nodes-differ", ERROR, _hosts, "There would be a node too few or too many.", "dfmspec's launcher ssh", ALL),
    Rule("RUN118", "no-time-to-save", ERROR, _time, "Slurm would ask the run to save as soon as it starts, and queue it again and again.", "sbatch --signal", ALL),
    Rule("RUN119", "option-of-the-plan", ERROR, _options, "The job script would ask for another job than the plan that was checked.", "sbatch", ALL),
    Rule("RUN120", "pods-lack-something", ERROR, _kubernetes, "A pod's own disk ends with the pod; a path that is not mounted is not there.", "Kubernetes volumes", ALL),
    Rule(
        "RUN123", "no-time-to-save-at", WARNING,
        excludes(_never_saves, at="launcher.kind",
                 message="NVIDIA DFM's scripts save before the end only at a time that they are given, and launcher.time_limit gives none: "
                 "each time the partition's limit comes, the iterations since the last checkpoint are lost",
                 hint="set launcher.time_limit, to the partition's limit at most"),
        "Slurm's notice reaches the job, which can only queue itself again: what was done since the last checkpoint is lost, in silence.",
        "Megatron-Bridge training/train.py, checkpoint_and_decide_exit", DFM,
    ),
    Rule(
        "RUN121", "output-not-shared", WARNING,
        excludes(_own_disk, at="run.output_dir",
                 message=lambda v: f"run.output_dir {v['run.output_dir']} is usually a disk of each machine's own, and {v['cluster.nnodes']} nodes write one run directory",
                 hint="a folder on a file system that every node shares"),
        "Nodes other than this one find no configuration, and checkpoints are in pieces.", "dfmspec's launchers", ALL,
    ),
)  # fmt: skip
