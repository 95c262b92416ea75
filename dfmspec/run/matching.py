"""A run made again from its record: what of then is here, what is not, and how the losses compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dfmspec.data.fingerprint import fingerprint
from dfmspec.plan.plan import Plan, code_digest
from dfmspec.record.events import read_events
from dfmspec.record.manifest import Manifest, launch_host
from dfmspec.record.provenance import folder_of_spec, git_state, own_code
from dfmspec.record.run_dir import RunDir
from dfmspec.run.guards import guards_now
from dfmspec.run.secrets import is_here
from dfmspec.spec.iterations import folder_of
from dfmspec.spec.paths import RUN_DIR, in_run_dir

_NOTHING = "not recorded"


class Match(NamedTuple):
    """Something that a run was made from, then and now."""

    name: str
    then: str
    now: str

    @property
    def is_same(self) -> bool | None:
        """Whether it is what it was; None: the record does not say."""
        return None if self.then == _NOTHING else self.then == self.now


def matches(manifest: Manifest, again: Plan) -> list[Match]:
    """What a run was made from, beside what is here, where it is made again."""
    now = launch_host()
    then = manifest.environment
    git = manifest.git or {}
    here = git_state(folder_of_spec(manifest.spec_file)) or {}
    own = own_code()
    found = [
        Match("dfmspec", _code_of(manifest.code), _code_of(own)),
        Match("dfmspec's code", manifest.guards.get("code", _NOTHING), code_digest()),
        Match("spec's commit", str(git.get("commit", _NOTHING))[:12], str(here.get("commit", "none"))[:12]),
        Match("python", str(then.get("python", _NOTHING)), str(now["python"])),
    ]
    packages = then.get("packages", {})
    for name in sorted(packages.keys() - {"dfmspec"}):
        found.append(Match(name, packages[name], now["packages"].get(name, "not installed")))
    found.append(Match("GPUs", _gpus(then), _gpus(now)))
    found += _data(manifest, again)
    for name, reference in again.secrets.items():
        found.append(Match(f"secret {name}", reference, reference if is_here(reference) else "not here"))
    guards = again.guards
    for name in sorted(manifest.guards.keys() - {"code"}):
        found.append(Match(_GUARDS.get(name, name), manifest.guards[name], guards.get(name, "not here")))
    return found


_GUARDS = {"dataset": "data's metadata", "container": "image"}


def _code_of(code: Mapping[str, Any]) -> str:
    """`0.1.0 (1ce40b7a3d7b with changes)`."""
    if not code:
        return _NOTHING
    version = str(code["version"])
    if "commit" not in code:
        return version
    changes = " with changes" if code["dirty"] else ""
    return f"{version} ({code['commit'][:12]}{changes})"


def _gpus(environment: Mapping[str, Any]) -> str:
    names = [str(gpu["name"]) for gpu in environment.get("gpus", ())]
    return ", ".join(sorted(names)) or "none"


def _data(manifest: Manifest, again: Plan) -> Iterator[Match]:
    recorded = manifest.data
    if recorded is not None:
        found = fingerprint(Path(again.located(again.config["dataset"]["path"]))) or {}
        yield Match("data's shards", recorded["sizes"], str(found.get("sizes", "not here")))


def plan_again(plan: Plan, manifest: Manifest, output_dir: str | None, dataset: str | None) -> tuple[Plan, list[str]]:
    """The plan of a run that is to be made again beside the first, and what had to be changed for it.

    Args:
        plan: the first run's.
        manifest: its record.
        output_dir: the folder of the new run's directory; None: that of the first.
        dataset: where the data are; None: where they were.
    """
    changed = []
    config = {**plan.config, "checkpoint": dict(plan.config["checkpoint"])}
    place = dataset or _data_elsewhere(plan, manifest)
    if place is not None:
        config["dataset"] = {**plan.config["dataset"], "path": str(Path(place).absolute())}
        changed.append(f"dataset.path is {config['dataset']['path']}")
    for key in ("save", "load"):
        place = config["checkpoint"].get(key)
        is_start = key == "load" and place != plan.config["checkpoint"].get("save")
        if isinstance(place, str) and not in_run_dir(place) and not is_start:
            config["checkpoint"][key] = f"{RUN_DIR}/checkpoints"
            changed.append(f"checkpoint.{key} is in the run's own directory, and not in {place}")
    run = {**plan.run, "resume": _start(manifest), "git": "record"}
    if output_dir is not None:
        run["output_dir"] = output_dir
    again = dataclasses.replace(plan, config=config, run=run)
    return dataclasses.replace(again, guards=guards_now(again)), changed


def _data_elsewhere(plan: Plan, manifest: Manifest) -> str | None:
    """Where the data were, as the record has it, where the record was moved and its plan leads elsewhere."""
    path = plan.config.get("dataset", {}).get("path")
    if manifest.data is None or not path or Path(plan.located(path)).exists():
        return None
    recorded = str(manifest.data["path"])
    return recorded if Path(recorded).exists() else None


def _start(manifest: Manifest) -> str:
    """Where the first run began, as run.resume names it."""
    starts_from = manifest.starts_from
    if not starts_from:
        return "never"
    step = starts_from.get("ckpt_step")
    return str(starts_from["load"]) if step is None else f"{starts_from['load']}/{folder_of(step)}"


class Difference(NamedTuple):
    """How the losses of two runs compare."""

    iterations: int
    """That both have."""
    first: int | None
    """The first that differs; None: all are the same to the last bit."""
    largest: float
    """The largest relative distance of a loss."""

    @property
    def is_exact(self) -> bool:
        """Whether there are losses, and all are the same to the last bit."""
        return self.iterations > 0 and self.first is None


def difference(one: RunDir, other: RunDir) -> Difference:
    """The losses of two runs beside each other, of each iteration the last that was told."""
    then = _losses(one)
    now = _losses(other)
    both = sorted(then.keys() & now.keys())
    apart = [iteration for iteration in both if then[iteration] != now[iteration]]
    largest = max((abs(then[at] - now[at]) / max(abs(then[at]), 1e-30) for at in apart), default=0.0)
    return Difference(len(both), apart[0] if apart else None, largest)


def _losses(run: RunDir) -> dict[int, float]:
    told = read_events(run.events, kinds=["iteration"])
    return {event["iteration"]: event["loss"] for event in told if isinstance(event.get("loss"), float)}
