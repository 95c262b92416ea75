"""A plan on disk: its files, all of them a function of the plan.

They are written whole, and read back only when nobody has edited them.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dfmspec.bounded import METADATA_BYTES, read_text
from dfmspec.errors import StalePlanError, UsageError
from dfmspec.files import write_aside
from dfmspec.plan.plan import Plan, config_text
from dfmspec.plan.scripts import RANK_PROGRAM, node_script, script_names
from dfmspec.resources import resource
from dfmspec.run.launch import launcher
from dfmspec.run.preflight import RANK_FILE
from dfmspec.spec.digest import canonical
from dfmspec.targets import CONFIG, target_module

if TYPE_CHECKING:
    from dfmspec.read.resolve import Resolved

PLAN = "plan.json"
GUARDS = "guards.json"
"""What the plan takes for granted, on the machine where the bundle was written."""
SOURCE = "source.json"
"""What the plan was made of: a comment of the spec changes it, and no plan."""
_OF_A_MACHINE = (GUARDS, SOURCE)
"""Files that say nothing of whether a bundle is fresh."""


class Source(NamedTuple):
    """What a plan was made of."""

    spec_file: str
    """The spec's name, as it was given."""
    spec_text: str
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, resolved: Resolved) -> Source:
        """Of a configuration."""
        documents = resolved.spec.documents
        cell = resolved.spec.cell
        text = documents[0].text if documents else ""
        overrides = resolved.spec.overrides
        if cell is not None:
            overrides = (*(f"{key}={canonical(value)}" for key, value, *_ in cell.settings), *overrides)
        return cls(resolved.spec.file, text, overrides)


def at(plan: Plan, folder: Path) -> Plan:
    """A plan as seen from the folder in which it lies."""
    if plan.spec_dir is None:
        return plan
    return replace(plan, spec_dir=os.path.relpath(plan.spec_dir, os.path.realpath(folder)))


def _seen_from_here(plan: Plan, folder: Path) -> Plan:
    """A plan that lies in a folder, as seen from the working directory."""
    if plan.spec_dir is None:
        return plan
    spec_dir = os.path.join(os.path.realpath(folder), plan.spec_dir)
    return replace(plan, spec_dir=os.path.relpath(spec_dir))


def bundle_files(plan: Plan) -> dict[str, str]:
    """name -> text, of a plan as seen from the bundle: plan.json, its guards, config.yaml, and what is run."""
    return {
        PLAN: as_text(plan.as_json()),
        GUARDS: as_text({"format_version": 1, "plan_id": plan.recorded_id, "guards": dict(plan.guards)}),
        CONFIG: config_text(plan.config),
        **programs(plan),
    }


def programs(plan: Plan) -> dict[str, str]:
    """name -> text of what is run: a script a node, the launcher's own files, and the entry script."""
    files = {name: node_script(plan, node) for name, node in script_names(plan).items()}
    files |= launcher(plan.launcher["kind"]).files(plan)

    # Another's script is in its checkout, and knows nothing of a supervisor.
    target = target_module(plan.target)
    if target.UPSTREAM is None:
        files[target.ENTRY] = resource(target.ENTRY).read_text(encoding="utf-8")
    else:
        files[RANK_PROGRAM] = RANK_FILE.read_text(encoding="utf-8")
    return files


def write_bundle(plan: Plan, out: Path, source: Source | None = None) -> None:
    """Write the files of a plan, and what it was made of.

    Raises:
        UsageError: the folder exists and is not empty.
    """
    require_new(out)
    files = bundle_files(at(plan, out))
    if source is not None:
        files[SOURCE] = as_text({"format_version": 1, "plan_id": plan.recorded_id, **source._asdict()})
    write_files(files, out)


def read_source(folder: Path, plan: Plan) -> Source | None:
    """What the plan of a bundle was made of; None where the bundle does not say, or says it of another plan."""
    try:
        stored = json.loads(read_text(folder / SOURCE, most=METADATA_BYTES))
        if stored["plan_id"] != plan.recorded_id:
            return None
        return Source(str(stored["spec_file"]), str(stored["spec_text"]), tuple(map(str, stored["overrides"])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def require_new(out: Path) -> None:
    """Refuse to write into a folder that has something.

    Raises:
        UsageError: the folder exists and is not empty.
    """
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder:
        raise UsageError(
            f"{out} exists and is not an empty folder; nothing was written. Choose another folder, or remove it"
        )


def write_files(files: dict[str, str], out: Path) -> None:
    """Write files into a folder; scripts may be executed."""
    for name, text in files.items():
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, text)
        if file.suffix in (".sh", ".sbatch"):
            file.chmod(0o755)


def read_bundle(folder: Path) -> Plan:
    """The plan of a bundle.

    Raises:
        UsageError: there is none.
        StalePlanError: plan.json is damaged, was edited, or is of another version.
    """
    if not (folder / PLAN).is_file():
        inside = sorted(plan.parent.name for plan in folder.glob(f"*/{PLAN}"))
        hint = f"it holds {', '.join(inside[:4])}, each of which is one" if inside else "dfmspec plan -o writes one"
        raise UsageError(f"{folder} is no bundle: it has no {PLAN}; {hint}")
    return read_plan(folder / PLAN)


def read_plan(file: Path) -> Plan:
    """A plan from its file, whatever the file's name.

    Raises:
        UsageError: there is no such file, or it may not be read.
        StalePlanError: it is damaged, was edited, or is of another version.
    """
    try:
        stored = json.loads(read_text(file, most=METADATA_BYTES, may_be_a_pipe=True))
        if not isinstance(stored, dict):
            raise ValueError("it is no object")
        guards = stored["guards"] if _has_guards(stored) else _guards_beside(file, stored["plan_id"])
        plan = Plan(
            name=stored["name"],
            target=stored["target"],
            config=stored["config"],
            nnodes=stored["nnodes"],
            command=tuple(stored["command"]),
            gpus_per_node=stored["gpus_per_node"],
            env=stored["env"],
            run=stored["run"],
            launcher=stored["launcher"],
            guards=guards,
            spec_dir=stored["spec_dir"],
        )
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StalePlanError(f"{file} cannot be read: {error}; make the plan again") from error

    # Its digests are those of its content, unless somebody has edited it.
    is_same_plan = stored.get("plan_id") == plan.recorded_id
    if not is_same_plan or stored.get("launch") != plan.launch_digest:
        raise StalePlanError(f"{file} was edited: its content is not that of its digests; make the plan again")
    return _seen_from_here(plan, file.parent)


def _has_guards(stored: dict[str, Any]) -> bool:
    """Whether a plan.json is of the first format, which had them in it."""
    return isinstance(stored, dict) and stored.get("format_version") == 1


def _guards_beside(file: Path, plan_id: str) -> dict[str, str]:
    """The guards of a plan, from the file beside it; none where that is absent, or another plan's.

    Raises:
        OSError, ValueError, KeyError, TypeError: it cannot be read.
    """
    place = file.parent / GUARDS
    if file.name != PLAN or not place.is_file():
        return {}
    try:
        stored = json.loads(read_text(place, most=METADATA_BYTES))
        return dict(stored["guards"]) if stored["plan_id"] == plan_id else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StalePlanError(f"{place} cannot be read: {error}; make the plan again") from error


def check_files(plan: Plan, folder: Path) -> None:
    """Refuse a bundle of which a file was edited after it was reviewed.

    Raises:
        StalePlanError: a file is not what the plan gives.
    """
    stale = ", ".join(stale_files(plan, folder))
    if stale:
        raise StalePlanError(
            f"{folder} is not what its plan gives: {stale}; make the plan again, from a spec that says what was edited"
        )


def stale_files(plan: Plan, folder: Path) -> list[str]:
    """The files of a folder that are not what the plan would write.

    Left out are guards, which are of a machine and a version, and files of runs that were started in the folder.
    """
    fresh = bundle_files(at(plan, folder))
    del fresh[GUARDS]
    own_folders = {Path(name).parts[0] for name in fresh if "/" in name}
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {*_OF_A_MACHINE}
    judged = fresh.keys() | {name for name in present if not _is_of_a_run(name, own_folders)}
    return sorted(name for name in judged if not _is_fresh(fresh.get(name), folder / name))


def _is_of_a_run(name: str, own_folders: set[str]) -> bool:
    """Whether a run has left a file in a bundle: in a folder that no bundle has, or as a log of Slurm's."""
    if "/" in name:
        return Path(name).parts[0] not in own_folders
    return re.fullmatch(r"slurm-\S+", name) is not None


def _is_fresh(text: str | None, file: Path) -> bool:
    """Whether a file holds the text that the plan would write; None: it would write no such file."""
    if text is None:
        return False
    try:
        found = file.read_bytes()
        if file.name == PLAN and _has_guards(stored := json.loads(found)):
            text = as_text(_in_first_format(json.loads(text), stored))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return text.encode("utf-8", "surrogateescape") == found


def _in_first_format(fresh: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The content of plan.json as the first format had it, with the guards that are stored."""
    as_it_was = {key: value for key, value in fresh.items() if key != "revision"}
    return {**as_it_was, "format_version": 1, "guards": stored["guards"]}


def as_text(content: dict[str, Any]) -> str:
    """The text of a file of JSON in a bundle."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
