"""What is asked to be run, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfmspec.plan.plan import Plan, config_text
from dfmspec.record.run_dir import RunDir
from dfmspec.run.bundle import at
from dfmspec.spec.paths import PATH_KEYS, RUN_DIR, local_path
from dfmspec.spec.resume import Resume


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
        return cls(
            request=request,
            config=_config_at_launch(plan),
            resume=Resume.parse(plan.run["resume"]),
            folder=output_dir / plan.name,
        )

    @property
    def plan_id(self) -> str:
        """As the manifest has it."""
        return self.request.plan.recorded_id

    def config_text(self, starts_from: Mapping[str, Any]) -> str:
        """config.yaml of a run; `starts_from`: keys of section `checkpoint` that are the run's own."""
        config = dict(self.config)
        config["checkpoint"] = config["checkpoint"] | dict(starts_from)
        return config_text(config)

    def plan_text(self, run: RunDir) -> str:
        """plan.json of a run."""
        stored = at(self.request.plan, run.path).as_json()
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"

    def checkpoints(self, run: RunDir) -> Path:
        """Where a run of the plan saves."""
        save = str(self.config["checkpoint"]["save"])
        return local_path(save.replace(RUN_DIR, str(run.path)))

    @property
    def checkpoints_elsewhere(self) -> Path | None:
        """The folder of the checkpoints, where it is not the run's own: another run may have named it too."""
        save = str(self.config["checkpoint"]["save"])
        return None if save.startswith(RUN_DIR) else local_path(save)


def _config_at_launch(plan: Plan) -> dict[str, Any]:
    """The configuration with absolute paths."""
    located: dict[str, Any] = json.loads(json.dumps(plan.config))
    for key in PATH_KEYS:
        section, _, name = key.partition(".")
        value = located.get(section, {}).get(name)
        if value and not value.startswith(RUN_DIR):
            located[section][name] = plan.located(value)
    return located
