"""A plan on disk: its files, all of them a function of the plan; written whole, and read back only when nobody has edited them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dfmspec.errors import StalePlanError, UsageError
from dfmspec.plan.plan import Plan, config_text
from dfmspec.plan.scripts import node_script, script_names
from dfmspec.resources import resource
from dfmspec.run.launch import launcher
from dfmspec.targets import CONFIG, target_module

PLAN = "plan.json"


def at(plan: Plan, folder: Path) -> Plan:
    """A plan as seen from the folder in which it lies."""
    return plan if plan.spec_dir is None else replace(plan, spec_dir=os.path.relpath(plan.spec_dir, os.path.realpath(folder)))


def bundle_files(plan: Plan) -> dict[str, str]:
    """name -> text, of a plan at its folder: plan.json, config.yaml, a script a node, the launcher's own, and the entry script."""
    return {PLAN: _json(plan.as_json()), CONFIG: config_text(plan.config), **programs(plan)}


def programs(plan: Plan) -> dict[str, str]:
    """What is run: the scripts, and the entry."""
    files = {name: node_script(plan, node) for name, node in script_names(plan).items()}
    files |= launcher(plan.launcher["kind"]).files(plan)
    target = target_module(plan.target)
    if target.CHECKOUT is None:
        entry = target.ENTRY
        files[entry] = resource(entry).read_text(encoding="utf-8")
    return files


def write_bundle(plan: Plan, out: Path) -> None:
    """Write the files of a plan.

    Raises:
        UsageError: the folder exists and is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; nothing was written. Choose another folder, or remove it")
    write_files(bundle_files(at(plan, out)), out)


def write_files(files: dict[str, str], out: Path) -> None:
    """Write files into a folder; scripts may be executed."""
    for name, text in files.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        if file.suffix in (".sh", ".sbatch"):
            file.chmod(0o755)


def read_bundle(folder: Path) -> Plan:
    """The plan of a bundle.

    Raises:
        UsageError: there is none.
        StalePlanError: plan.json is damaged, was edited, or is of another version.
    """
    if not (folder / PLAN).is_file():
        raise UsageError(f"{folder} is no bundle: it has no {PLAN}; dfmspec plan -o writes one")
    return read_plan(folder / PLAN)


def read_plan(file: Path) -> Plan:
    """A plan from its file, whatever the file's name; raises as `read_bundle` does."""
    try:
        stored = json.loads(file.read_text())
        plan = Plan(
            stored["name"], stored["target"], stored["config"], stored["nnodes"], tuple(stored["command"]),
            stored["gpus_per_node"], stored["env"], stored["run"], stored["launcher"], stored["guards"], stored["spec_dir"],
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StalePlanError(f"{file} cannot be read: {error}; make the plan again") from error
    if stored.get("plan_id") != f"sha256:{plan.plan_id}" or stored.get("launch") != plan.launch_digest:
        raise StalePlanError(f"{file} was edited: its content is not that of its digests; make the plan again")
    return plan if plan.spec_dir is None else replace(plan, spec_dir=os.path.relpath(os.path.join(os.path.realpath(file.parent), plan.spec_dir)))


def check_files(plan: Plan, folder: Path) -> None:
    """Refuse a bundle of which a file was edited after it was reviewed.

    Raises:
        StalePlanError: a file is not what the plan gives.
    """
    if stale := stale_files(plan, folder):
        raise StalePlanError(f"{folder} is not what its plan gives: {', '.join(stale)}; make the plan again, from a spec that says what was edited")


def stale_files(plan: Plan, folder: Path) -> list[str]:
    """The files of a folder that are not what the plan would write; guards aside, which are of a machine and a version.

    Left alone is what runs leave that are started in the folder: folders that no bundle has, and Slurm's own logs.
    """
    fresh = bundle_files(at(plan, folder))
    written = {Path(name).parts[0] for name in fresh if "/" in name}
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    present = {name for name in present if (Path(name).parts[0] in written if "/" in name else not re.fullmatch(r"slurm-\S+", name))}
    return sorted(name for name in fresh.keys() | present if not _same(fresh.get(name), folder / name))


def _same(text: str | None, file: Path) -> bool:
    try:
        found = file.read_bytes()
        if text is not None and file.name == PLAN:
            text = _json({**json.loads(text), "guards": json.loads(found)["guards"]})
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return text is not None and text.encode("utf-8", "surrogateescape") == found


def _json(plan: dict[str, Any]) -> str:
    return json.dumps(plan, indent=2, sort_keys=True) + "\n"
