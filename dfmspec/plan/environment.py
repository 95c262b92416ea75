"""The environment variables that a run needs, by rule: one entry a variable."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dfmspec.targets import target_module

Values = Mapping[str, Any]
_BLACKWELL = ("b200", "b300", "gb200", "gb300")
_HEARTBEAT_MINUTES = 8


UNSET = ""


class Variable(NamedTuple):
    """One variable, and when it is set."""

    name: str
    value: Callable[[Values], str | int | None]
    """None: as the shell has it; UNSET: not, whatever the shell has."""
    why: str


def _of_several_nodes(key: str) -> Callable[[Values], str | int | None]:
    return lambda values: values[key] if values["cluster.nnodes"] > 1 else None


def _connections(values: Values) -> int | str | None:
    if values.get("ddp.use_megatron_fsdp"):
        return UNSET
    return 1 if _cuda(values) and values["model.tensor_model_parallel_size"] > 1 and values["cluster.gpu"] not in _BLACKWELL else None


def _heartbeat(values: Values) -> int | None:
    minutes = values["dist.distributed_timeout_minutes"]
    return minutes * 60 if _cuda(values) and minutes > _HEARTBEAT_MINUTES and values["cluster.nnodes"] * values["cluster.nproc_per_node"] > 1 else None


def _deterministic(name: str) -> Callable[[Values], str | int | None]:
    """A variable without which a target's script may refuse the mode."""

    def value(values: Values) -> str | None:
        if not values["model.deterministic_mode"]:
            return None
        return target_module(values["target"]).DETERMINISTIC_ENV.get(name)

    return value


def _cuda(values: Values) -> bool:
    return bool(values["cluster.device"] == "cuda")


VARIABLES = (
    Variable("MASTER_ADDR", _of_several_nodes("cluster.master_addr"), "cluster.master_addr"),
    Variable("MASTER_PORT", _of_several_nodes("cluster.master_port"), "cluster.master_port"),
    Variable("OMP_NUM_THREADS", lambda values: None if _cuda(values) else 1, "processes share the cores"),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", _connections,
             "1 keeps tensor-parallel collectives ahead of the kernels that hide them, before Blackwell; Megatron FSDP needs more"),
    Variable("NCCL_ALGO", _deterministic("NCCL_ALGO"), "model.deterministic_mode: sums in one order"),
    Variable(
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO", _deterministic("NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
        "model.deterministic_mode: Transformer Engine's kernels too",
    ),
    Variable("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", _heartbeat, "NCCL's monitor waits as long as dist.distributed_timeout_minutes, not its own 8 minutes"),
    Variable("WANDB_RESUME", lambda values: "allow" if values.get("logger.wandb_project") else None, "a resumed run goes on in the same Weights & Biases run"),
)
"""What the plan sets; `launcher.env` goes over it."""


def environment(values: Values) -> dict[str, str | None]:
    """Name and value of each variable of a run; None: the run must not have it."""
    found = ((variable.name, variable.value(values)) for variable in VARIABLES)
    return {name: str(value) if value != UNSET else None for name, value in found if value is not None} | dict(sorted(values["launcher.env"].items()))


def shell_line(name: str, value: str | None) -> str:
    """A variable as the shell sets or removes it."""
    return f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}"


def reason(name: str, of_the_user: Mapping[str, str]) -> str:
    """Why a variable is set."""
    rules = (variable.why for variable in VARIABLES if variable.name == name)
    return "launcher.env" if name in of_the_user else next(rules)
