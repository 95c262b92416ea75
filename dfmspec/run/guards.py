"""What a saved plan takes for granted, looked at again before it is run."""

from __future__ import annotations

from dfmspec.errors import StalePlanError
from dfmspec.plan.plan import Plan, guards
from dfmspec.targets import target_module


def guards_now(plan: Plan) -> dict[str, str]:
    """The guards that the plan would have, made at this moment."""
    image = plan.launcher.get("container")  # which earlier plans do not have
    return guards({"dataset.path": _data_of(plan), "launcher.container": image}, plan.target)


def check_guards(plan: Plan) -> None:
    """Refuse a saved plan whose code or data is no longer what it was made with.

    Data that is still to be drawn has no guard yet.

    Raises:
        StalePlanError: it is stale.
    """
    current = guards_now(plan)
    is_drawn = plan.config.get("data", {}).get("source") == "embedded"
    if is_drawn and "dataset" not in current and "dataset" in plan.guards:
        current["dataset"] = plan.guards["dataset"]
    if target_module(plan.target).OWN and "code" not in plan.guards:
        raise StalePlanError("the plan is stale: it has no guard of dfmspec's own code; make the plan again")
    for name, digest in plan.guards.items():
        if current.get(name) == digest:
            continue
        what = {
            "code": "dfmspec's own code",
            "container": f"the image {plan.launcher.get('container')}",
        }.get(name, f"the metadata of dataset {_data_of(plan)}")
        raise StalePlanError(f"the plan is stale: {what} has changed since it was made; make the plan again")


def _data_of(plan: Plan) -> str | None:
    path = plan.config.get("dataset", {}).get("path")
    return plan.located(path) if path else None
