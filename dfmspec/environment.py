"""The environment variables that a run needs, by rule: one entry a variable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Values = Mapping[str, Any]
_BLACKWELL = ("b200", "b300", "gb200", "gb300")
_HEARTBEAT_MINUTES = 8


class Variable(NamedTuple):
    """One variable, and when it is set."""

    name: str
    value: Callable[[Values], str | int | None]
    """None: not set."""
    why: str


def _of_several_nodes(key: str) -> Callable[[Values], str | int | None]:
    return lambda values: values[key] if values["cluster.nnodes"] > 1 else None


def _connections(values: Values) -> int | None:
    fsdp = values.get("ddp.use_megatron_fsdp") or values.get("dist.use_megatron_fsdp")
    return 1 if _cuda(values) and values["model.tensor_model_parallel_size"] > 1 and not fsdp and values["cluster.gpu"] not in _BLACKWELL else None


def _heartbeat(values: Values) -> int | None:
    minutes = values["dist.distributed_timeout_minutes"]
    return minutes * 60 if _cuda(values) and minutes > _HEARTBEAT_MINUTES and values["cluster.nnodes"] * values["cluster.nproc_per_node"] > 1 else None


def _cuda(values: Values) -> bool:
    return bool(values["cluster.device"] == "cuda")


VARIABLES = (
    Variable("MASTER_ADDR", _of_several_nodes("cluster.master_addr"), "cluster.master_addr"),
    Variable("MASTER_PORT", _of_several_nodes("cluster.master_port"), "cluster.master_port"),
    Variable("OMP_NUM_THREADS", lambda values: None if _cuda(values) else 1, "processes share the cores"),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", _connections, "keeps tensor-parallel collectives ahead of the kernels that hide them, before Blackwell"),
    Variable("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", _heartbeat, "NCCL's monitor waits as long as dist.distributed_timeout_minutes, not its own 8 minutes"),
    Variable("WANDB_RESUME", lambda values: "allow" if values.get("logger.wandb_project") else None, "a resumed run goes on in the same Weights & Biases run"),
)
"""What the plan sets; `launcher.env` goes over it."""


def environment(values: Values) -> dict[str, str]:
    """Name and value of each variable of a run."""
    found = ((variable.name, variable.value(values)) for variable in VARIABLES)
    return {name: str(value) for name, value in found if value is not None} | dict(sorted(values["launcher.env"].items()))


def reason(name: str, of_the_user: Mapping[str, str]) -> str:
    """Why a variable is set."""
    rules = (variable.why for variable in VARIABLES if variable.name == name)
    return "launcher.env" if name in of_the_user else next(rules)
