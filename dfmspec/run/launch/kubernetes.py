"""Launcher kubernetes: a manifest of a ConfigMap with the plan's files and a JobSet (jobset.x-k8s.io/v1alpha2) with a pod a node.

A failed pod restarts the whole set, which goes on from its last checkpoint: the run directory is on a volume, by the plan's id.
"""

from __future__ import annotations

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
_PORT = 29500  # a pod has its own address, so the port is always free
_RESTARTS = 3
_GRACE_SECONDS = 180
_RESTART = "jobset.sigs.k8s.io/restart-attempt"
"""The label in which JobSet counts how often it has started a set again."""


def files(plan: Plan) -> dict[str, str]:
    """jobset.yaml."""
    return {MANIFEST: yaml.dump_all(documents(plan), Dumper=_Dumper, sort_keys=False, width=1000)}


def launch(plan: Plan, place: Place) -> Any:
    """Never: what a cluster admits and when is its own affair.

    Raises:
        PreflightError: always, with the command that hands the manifest over.
    """
    raise PreflightError(f"dfmspec writes the manifest and does not watch clusters: dfmspec plan SPEC -o DIR, then kubectl apply -f DIR/{MANIFEST}")


def attach(plan: Plan, place: Place) -> None:
    """Never."""
    return


def documents(plan: Plan) -> list[dict[str, Any]]:
    """The two objects."""
    name = _name(plan.name)
    target = target_module(plan.target)
    node = "node.sh"
    data = {CONFIG: config_text(plan.config), node: node_script(plan, None if plan.nnodes > 1 else 0)}
    items = [{"key": key, "path": key} for key in data]
    if target.CHECKOUT is None:
        data["entry.py"] = resource(target.ENTRY).read_text(encoding="utf-8")
        items.append({"key": "entry.py", "path": target.ENTRY})
    metadata = {"name": name, **({"namespace": plan.launcher["namespace"]} if plan.launcher["namespace"] else {})}
    labels = {"labels": {"kueue.x-k8s.io/queue-name": plan.launcher["queue"]}} if plan.launcher["queue"] else {}
    annotations = {"annotations": {"dfmspec.dev/plan": f"sha256:{plan.plan_id}"}}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {**metadata, "name": _config_map(plan), **annotations}, "immutable": True, "data": data}
    job = {
        "parallelism": plan.nnodes, "completions": plan.nnodes, "completionMode": "Indexed", "backoffLimit": 0,
        "template": {"spec": _pod(plan, name, items)},
    }  # fmt: skip
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {**metadata, **labels, **annotations},
        "spec": {
            "failurePolicy": {"maxRestarts": _RESTARTS},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }  # fmt: skip
    return [config_map, job_set]


def _pod(plan: Plan, name: str, items: list[dict[str, str]]) -> dict[str, Any]:
    run_dir = f"{plan.run['output_dir']}/{plan.name}/{plan.plan_id[:12]}"
    env = {"DFMSPEC_RUN_DIR": run_dir, "DFMSPEC_BASE": "/", "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    if plan.nnodes > 1:
        env |= {"MASTER_ADDR": f"{name}-node-0-0.{name}", "MASTER_PORT": str(_PORT)}
    attempt: list[dict[str, Any]] = []
    if plan.nnodes > 1 and plan.launcher["rendezvous"] == "c10d":  # pods of one start of the set meet under an id of its own
        attempt.append({"name": "DFMSPEC_RESTART", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{_RESTART}']"}}})
        env["DFMSPEC_RDZV_ID"] = f"{plan.plan_id[:12]}.$(DFMSPEC_RESTART)"
    claims = sorted(plan.launcher["volumes"].items())
    container: dict[str, Any] = {
        "name": "torchrun", "image": plan.launcher["image"],
        "command": ["bash", "-c", 'mkdir -p "$DFMSPEC_RUN_DIR" && exec bash /plan/node.sh "$JOB_COMPLETION_INDEX"'],
        "env": [*attempt, *({"name": key, "value": value} for key, value in env.items())],
        "volumeMounts": [
            {"name": "plan", "mountPath": "/plan", "readOnly": True}, {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": f"claim-{i}", "mountPath": path} for i, (_, path) in enumerate(claims)),
        ],
    }  # fmt: skip
    if plan.launcher["env_from"]:
        container["envFrom"] = [{"secretRef": {"name": plan.launcher["env_from"]}}]
    if plan.nnodes > 1:
        container["ports"] = [{"containerPort": _PORT, "protocol": "TCP"}]
    if plan.gpus_per_node:
        container["resources"] = {"limits": {"nvidia.com/gpu": plan.gpus_per_node}}
    return {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": _GRACE_SECONDS, "containers": [container],
        "volumes": [
            {"name": "plan", "configMap": {"name": _config_map(plan), "items": items}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # the loaders' workers hand batches over in shared memory
            *({"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}} for i, (claim, _) in enumerate(claims)),
        ],
    }  # fmt: skip


def _config_map(plan: Plan) -> str:
    """Each plan has its own: a pod that starts again never finds another one's files."""
    return f"{_name(plan.name)}-{plan.plan_id[:12]}"


def _name(name: str) -> str:
    """The experiment's name as Kubernetes has names: with room for what JobSet adds."""
    word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "run"
    return word if word[0].isalpha() else f"run-{word}"


class _Dumper(yaml.SafeDumper):
    """Files as blocks that a person can read."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]
