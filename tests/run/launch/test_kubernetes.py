"""Launcher kubernetes: a manifest in which every key is one of the public schema, and whose pods find everything."""

from __future__ import annotations

import copy
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models

from dfmspec.run.launch import kubernetes
from tests.conftest import ROOT, dfmspec

GOLDEN = sorted((ROOT / "tests" / "golden").glob("*/plan/jobset.yaml"))


def documents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config_map, job_set = yaml.safe_load_all(file.read_text())
    return config_map, job_set


def pod(job_set: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.parents[1].name)
def test_the_manifest_has_the_public_schema(file: Path) -> None:
    """The models drop what they do not know and refuse other types, so equal on the way back is valid."""
    config_map, job_set = documents(file)

    assert models.IoK8sApiCoreV1ConfigMap.from_dict(config_map).to_dict() == config_map
    assert models.JobsetV1alpha2JobSet.from_dict(job_set).to_dict() == job_set
    wrong = copy.deepcopy(job_set)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 3
    assert models.JobsetV1alpha2JobSet.from_dict(wrong).to_dict() != wrong


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.parents[1].name)
def test_the_pods_find_what_they_run(file: Path) -> None:
    config_map, job_set = documents(file)
    spec = pod(job_set)
    (container,) = spec["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    items = {item["key"] for volume in spec["volumes"] for item in volume.get("configMap", {}).get("items", [])}
    env = {variable["name"]: variable.get("value") for variable in container["env"]}

    assert mounts == {volume["name"] for volume in spec["volumes"]}
    assert items == set(config_map["data"])
    assert "node.sh" in items
    assert any(
        env["DFMSPEC_RUN_DIR"].startswith(mount["mountPath"])
        for mount in container["volumeMounts"]
        if mount["name"].startswith("claim")
    )
    assert env["MASTER_ADDR"].split(".")[1] == job_set["metadata"]["name"]
    assert len(env["MASTER_ADDR"].split(".")[0]) <= 63


@pytest.mark.parametrize("name", ["UPPER_case.dots", "0-starts-with-a-digit", "x" * 80, "_"])
def test_any_name_becomes_one_of_kubernetes(name: str, tmp_path: Path) -> None:
    file = GOLDEN[0].parents[1] / "spec.yaml"
    done = dfmspec("plan", file, f"name={name}", "-o", tmp_path / "plan")
    assert done.returncode == 0, done.stderr
    _, job_set = documents(tmp_path / "plan" / "jobset.yaml")

    assert models.JobsetV1alpha2JobSet.from_dict(job_set).to_dict() == job_set
    word = job_set["metadata"]["name"]
    assert word.replace("-", "a").isalnum()
    assert word == word.lower()
    assert word[0].isalpha()
    assert len(word) <= 44


def test_a_changed_plan_never_meets_the_pods_of_the_one_before(tmp_path: Path) -> None:
    """A set that starts again finds the files that it began with."""
    maps = []
    for i, word in enumerate(("optimizer.lr=1e-4", "optimizer.lr=2e-4")):
        assert dfmspec("plan", GOLDEN[0].parents[1] / "spec.yaml", word, "-o", tmp_path / str(i)).returncode == 0
        config_map, job_set = documents(tmp_path / str(i) / "jobset.yaml")
        (run_dir,) = (
            variable["value"]
            for variable in pod(job_set)["containers"][0]["env"]
            if variable["name"] == "DFMSPEC_RUN_DIR"
        )
        assert config_map["immutable"]
        assert config_map["metadata"]["name"] == pod(job_set)["volumes"][0]["configMap"]["name"]
        assert config_map["metadata"]["name"].rpartition("-")[2] == run_dir.rpartition("/")[2]
        maps.append(config_map["metadata"]["name"])

    assert maps[0] != maps[1]


def test_each_start_of_a_set_meets_under_its_own_id_and_a_secret_comes_in(tmp_path: Path) -> None:
    words = ["launcher.rendezvous=c10d", "launcher.env_from=wandb"]
    assert dfmspec("plan", GOLDEN[0].parents[1] / "spec.yaml", *words, "-o", tmp_path / "plan").returncode == 0
    _, job_set = documents(tmp_path / "plan" / "jobset.yaml")
    (container,) = pod(job_set)["containers"]
    env = {variable["name"]: variable for variable in container["env"]}

    assert env["DFMSPEC_RDZV_ID"]["value"].endswith(".$(DFMSPEC_RESTART)")
    assert list(env).index("DFMSPEC_RESTART") < list(env).index("DFMSPEC_RDZV_ID")
    assert env["DFMSPEC_RESTART"]["valueFrom"] == {
        "fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}
    }
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert models.JobsetV1alpha2JobSet.from_dict(job_set).to_dict() == job_set


@pytest.mark.parametrize(
    "word",
    [
        "checkpoint.save=kept",
        "checkpoint.save=/elsewhere/kept",
        "checkpoint.load=kept",
        "run.output_dir=runs",
        "dataset.path=data",
    ],
)
def test_a_path_that_no_pod_keeps_is_refused(word: str, tmp_path: Path) -> None:
    done = dfmspec("plan", GOLDEN[0].parents[1] / "spec.yaml", word, cwd=tmp_path)

    assert done.returncode == 1
    assert "RUN120" in done.stderr


def test_the_manifest_is_handed_over_and_not_run(tmp_path: Path) -> None:
    file = GOLDEN[0].parents[1] / "spec.yaml"
    done = dfmspec("run", file, "data.source=mock", "dataset.path=null", "run.output_dir=/shared/x", cwd=tmp_path)

    assert done.returncode == 4
    assert "kubectl apply -f" in done.stderr
    assert "Traceback" not in done.stderr


def test_long_names_that_differ_anywhere_stay_apart_and_are_labels_that_fit() -> None:
    draw = random.Random(24)
    letters = string.ascii_letters + string.digits + "._-"
    whole = ["".join(draw.choices(letters, k=draw.randint(41, 90))) for _ in range(200)]
    names = [*whole, *(name[:-1] + other for name in whole for other in "xy")]
    made = {name: kubernetes._name(name) for name in names}

    assert len(set(made.values())) == len(set(names))
    assert all(len(label) <= 40 for label in made.values())
    assert all(re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", label) for label in made.values())


@pytest.mark.parametrize(("name", "label"), [("DiT_XL.b", "dit-xl-b"), ("7b", "run-7b"), ("a" * 40, "a" * 40)])
def test_a_name_that_fits_has_no_digest(name: str, label: str) -> None:
    assert kubernetes._name(name) == label
