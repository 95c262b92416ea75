"""What is asked to be run, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmspec.plan.plan import Plan, config_text
from dfmspec.record.run_dir import RunDir
from dfmspec.record.verdict import Checkpoints, judge_of
from dfmspec.run.bundle import as_text, at
from dfmspec.run.preflight import Preflight
from dfmspec.spec.paths import PATH_KEYS, RUN_DIR, RUN_DIR_UPSTREAM, in_run_dir, local_path
from dfmspec.spec.resume import Resume
from dfmspec.targets import target_module


@dataclass(frozen=True)
class Request:
    """What is run, and from what."""

    plan: Plan
    spec_file: str | None
    spec_text: str | None
    overrides: tuple[str, ...]
    talk: Callable[[str], None]
    """Where progress goes."""
    detach: bool = False
    """Start it and leave it to its scheduler."""
    run: RunDir | None = None
    """The run that goes on; None: that of the plan, or a new one."""
    preflight: Preflight = field(default_factory=Preflight)
    """What each node looks at before anything starts."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """What this machine was found to have, where it is the one that trains."""


@dataclass(frozen=True)
class Launch:
    """A request as it is launched: what follows from the plan, worked out once."""

    request: Request
    config: dict[str, Any]
    """The configuration with absolute paths; `${RUN_DIR}` is still a symbol."""
    resume: Resume
    folder: Path
    """The runs of the plan's name."""

    @classmethod
    def of(cls, request: Request) -> Launch:
        """What follows from a request's plan."""
        plan = request.plan
        output_dir = Path(plan.located(plan.run["output_dir"]))
        run = request.run
        return cls(
            request=request,
            config=_config_at_launch(plan),
            # A run that is named goes on, however it was begun.
            resume=Resume.parse(plan.run["resume"] if run is None else "auto"),
            folder=output_dir / plan.name if run is None else run.path.parent,
        )

    @property
    def own(self) -> bool:
        """Whether dfmspec's own trainer trains."""
        return target_module(self.request.plan.target).OWN

    @property
    def judge(self) -> Checkpoints:
        """What judges its checkpoints."""
        return judge_of(own=self.own)

    @property
    def train_iters(self) -> int:
        """The last iteration."""
        train = self.config["train"]
        found: int = train.get("train_iters") or train["train_samples"] // train["global_batch_size"]
        return found

    @property
    def saves(self) -> bool:
        """Whether there are to be checkpoints, the last one among them."""
        checkpoint = self.config["checkpoint"]
        return checkpoint.get("save") is not None and checkpoint.get("save_interval") != 0

    def place_of_start(self, starts_from: Mapping[str, Any]) -> str:
        """The place of a checkpoint that a run is told to go on from, beside where it saves; "": none.

        Args:
            starts_from: the keys of section `checkpoint` by which the run starts elsewhere.
        """
        if "load" in starts_from:
            return str(starts_from["load"])
        checkpoint = self.config["checkpoint"]
        load = checkpoint.get("load")
        is_elsewhere = load is not None and load != checkpoint.get("save") and not checkpoint.get("finetune")
        return str(load) if is_elsewhere and not self.own else ""

    @property
    def plan_id(self) -> str:
        """As the manifest has it."""
        return self.request.plan.recorded_id

    def config_text(self, starts_from: Mapping[str, Any]) -> str:
        """config.yaml of a run; `starts_from`: keys of section `checkpoint` that are the run's own."""
        return config_text(self.config_of(starts_from))

    def config_of(self, starts_from: Mapping[str, Any]) -> dict[str, Any]:
        """What config.yaml of a run holds, of which its checkpoints have the digest."""
        config = dict(self.config)
        config["checkpoint"] = config["checkpoint"] | dict(starts_from)
        return config

    def goes_on(self) -> dict[str, Any]:
        """The keys of section `checkpoint` by which a script goes on from where it saves, wherever it began."""
        return {"load": self.config["checkpoint"]["save"], "ckpt_step": None}

    def plan_text(self, run: RunDir) -> str:
        """plan.json of a run."""
        return as_text(at(self.request.plan, run.path).as_json())

    def checkpoints(self, run: RunDir) -> Path:
        """Where a run of the plan saves."""
        if not self.saves:
            return run.checkpoints
        save = str(self.config["checkpoint"]["save"])
        for symbol in (RUN_DIR, RUN_DIR_UPSTREAM):
            save = save.replace(symbol, str(run.path))
        return local_path(save)

    @property
    def checkpoints_elsewhere(self) -> Path | None:
        """The folder of the checkpoints, where it is not the run's own: another run may have named it too."""
        save = str(self.config["checkpoint"].get("save"))
        return None if not self.saves or in_run_dir(save) else local_path(save)


def _config_at_launch(plan: Plan) -> dict[str, Any]:
    """The configuration with absolute paths."""
    located: dict[str, Any] = json.loads(json.dumps(plan.config))
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        value = located.get(section, {}).get(name)
        if value and not in_run_dir(value):
            located[section][name] = plan.located(value)
    return located
