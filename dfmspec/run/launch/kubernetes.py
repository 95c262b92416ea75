"""Launcher kubernetes: a manifest of a ConfigMap with the plan's files and a JobSet with a pod a node.

The JobSet is of jobset.x-k8s.io/v1alpha2. A failed pod restarts the whole set, which goes on from its last checkpoint:
the run directory is on a volume, by the plan's id.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import yaml

from dfmspec.errors import PreflightError
from dfmspec.plan.plan import Plan, config_text
from dfmspec.plan.scripts import node_script
from dfmspec.resources import resource
from dfmspec.run.launch import Place
from dfmspec.targets import CONFIG, target_module

OUTLIVES = False
RUNS_SCRIPTS = False
check = None
MANIFEST = "jobset.yaml"
_SCRIPT = "node.sh"
_ENTRY = "entry.py"
"""The key of the entry script."""
_PORT = 29500  # a pod has its own address, so the port is always free
_RESTARTS = 3
_LONGEST_NAME = 40
"""A pod's name has 63 characters at most, of which JobSet takes some for the node and the attempt."""
_GRACE_SECONDS = 180
_RESTART = "jobset.sigs.k8s.io/restart-attempt"
"""The label in which JobSet counts how often it has started a set again."""


def files(plan: Plan) -> dict[str, str]:
    """jobset.yaml."""
    return {MANIFEST: yaml.dump_all(documents(plan), Dumper=_Dumper, sort_keys=False, width=1000)}


def launch(plan: Plan, place: Place) -> Any:
    """Refuse: what a cluster admits and when is its own affair.

    Raises:
        PreflightError: always, with the command that hands the manifest over.
    """
    raise PreflightError(
        "dfmspec writes the manifest and does not watch clusters: "
        f"dfmspec plan SPEC -o DIR, then kubectl apply -f DIR/{MANIFEST}"
    )


def attach(plan: Plan, place: Place) -> None:
    """None: nothing is launched from here, so there is nothing to go on watching."""
    return


def documents(plan: Plan) -> list[dict[str, Any]]:
    """The two objects of the manifest: the ConfigMap with the plan's files, then the JobSet."""
    # The files, which never change: another plan has another ConfigMap.
    data = _data(plan)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**_metadata(plan), "name": _config_map(plan), **_annotations(plan)},
        "immutable": True,
        "data": data,
    }

    # A pod a node, started anew all together.
    job = {
        "parallelism": plan.nnodes,
        "completions": plan.nnodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": _pod(plan, _items(plan, data))},
    }
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {**_metadata(plan), **_labels(plan), **_annotations(plan)},
        "spec": {
            "failurePolicy": {"maxRestarts": _RESTARTS},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return [config_map, job_set]


def _metadata(plan: Plan) -> dict[str, Any]:
    metadata = {"name": _name(plan.name)}
    if plan.launcher["namespace"]:
        metadata["namespace"] = plan.launcher["namespace"]
    return metadata


def _labels(plan: Plan) -> dict[str, Any]:
    """The queue of Kueue, where one is named."""
    if not plan.launcher["queue"]:
        return {}
    return {"labels": {"kueue.x-k8s.io/queue-name": plan.launcher["queue"]}}


def _annotations(plan: Plan) -> dict[str, Any]:
    return {"annotations": {"dfmspec.dev/plan": plan.recorded_id}}


def _data(plan: Plan) -> dict[str, str]:
    """Key of the ConfigMap -> text of a file of the bundle."""
    node = None if plan.nnodes > 1 else 0
    data = {CONFIG: config_text(plan.config), _SCRIPT: node_script(plan, node)}
    target = target_module(plan.target)
    if target.UPSTREAM is None:
        data[_ENTRY] = resource(target.ENTRY).read_text(encoding="utf-8")
    return data


def _items(plan: Plan, data: dict[str, str]) -> list[dict[str, str]]:
    """Where the pod sees each file of the ConfigMap: at its key, but for the entry script, whose path has slashes."""
    paths = {_ENTRY: target_module(plan.target).ENTRY}
    return [{"key": key, "path": paths.get(key, key)} for key in data]


def _pod(plan: Plan, items: list[dict[str, str]]) -> dict[str, Any]:
    """What a pod is: one container, and what is mounted in it."""
    claims = sorted(plan.launcher["volumes"].items())
    volumes: list[dict[str, Any]] = [
        {"name": "plan", "configMap": {"name": _config_map(plan), "items": items}},
        # The loaders' workers hand batches over in shared memory.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "plan", "mountPath": "/plan", "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    for i, (claim, path) in enumerate(claims):
        volumes.append({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{i}", "mountPath": path})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [_container(plan, mounts)],
        "volumes": volumes,
    }


def _container(plan: Plan, mounts: list[dict[str, Any]]) -> dict[str, Any]:
    """The container that runs a node's script; the index of its pod is the node's rank."""
    container: dict[str, Any] = {
        "name": "torchrun",
        "image": plan.launcher["image"],
        "command": [
            "bash",
            "-c",
            f'mkdir -p "$DFMSPEC_RUN_DIR" && exec bash /plan/{_SCRIPT} "$JOB_COMPLETION_INDEX"',
        ],
        "env": _environment(plan),
        "volumeMounts": mounts,
    }
    if plan.launcher["env_from"]:
        container["envFrom"] = [{"secretRef": {"name": plan.launcher["env_from"]}}]
    if plan.nnodes > 1:
        container["ports"] = [{"containerPort": _PORT, "protocol": "TCP"}]
    if plan.gpus_per_node:
        container["resources"] = {"limits": {"nvidia.com/gpu": plan.gpus_per_node}}
    return container


def _environment(plan: Plan) -> list[dict[str, Any]]:
    """The variables of a container: where the run is, and where its nodes meet."""
    output_dir = plan.run["output_dir"]
    env = {
        "DFMSPEC_RUN_DIR": f"{output_dir}/{plan.name}/{plan.short_id}",
        "DFMSPEC_BASE": "/",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
    }
    if plan.nnodes > 1:
        name = _name(plan.name)
        env["MASTER_ADDR"] = f"{name}-node-0-0.{name}"
        env["MASTER_PORT"] = str(_PORT)

    # Pods of one start of the set meet under an id of its own.
    restart: list[dict[str, Any]] = []
    if plan.nnodes > 1 and plan.launcher["rendezvous"] == "c10d":
        label = {"fieldPath": f"metadata.labels['{_RESTART}']"}
        restart.append({"name": "DFMSPEC_RESTART", "valueFrom": {"fieldRef": label}})
        env["DFMSPEC_RDZV_ID"] = f"{plan.short_id}.$(DFMSPEC_RESTART)"
    return [*restart, *({"name": name, "value": value} for name, value in env.items())]


def _config_map(plan: Plan) -> str:
    """The name of the ConfigMap. Each plan has its own: a pod that starts again finds no other one's files."""
    name = _name(plan.name)
    return f"{name}-{plan.short_id}"


def _name(name: str) -> str:
    """The experiment's name as Kubernetes has names: with room for what JobSet adds.

    One that is cut ends in a digest of the whole, so that two of one beginning stay two.
    """
    word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    if not word[0].isalpha():
        word = f"run-{word}"
    if len(word) <= _LONGEST_NAME:
        return word
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    beginning = word[: _LONGEST_NAME - len(digest) - 1].rstrip("-")
    return f"{beginning}-{digest}"


class _Dumper(yaml.SafeDumper):
    """Files as blocks that a person can read."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
