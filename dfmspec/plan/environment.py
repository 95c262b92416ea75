"""The environment variables that a run needs, by rule: one entry a variable."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dfmspec.plan.secrets import references
from dfmspec.spec.presets import PRESETS, preset_of
from dfmspec.targets import target_module

Values = Mapping[str, Any]
_BLACKWELL = ("b200", "b300", "gb200", "gb300")
_HEARTBEAT_MINUTES = 8
"""How long NCCL's monitor waits by itself."""

UNSET = ""
"""The value of a variable that a run must not have."""


# What surrounds a launch and would change the command that was reviewed.
_FAMILIES = ("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_")
"""torchrun's flags as variables, and what it tells its ranks: of another launcher, such as a pod's."""
_STRAYS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "NODE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("OMP_NUM_THREADS", "PYTHON_EXEC", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONOPTIMIZE"),
)
"""What torchrun gives its ranks; and what changes how many threads, which Python or which asserts a rank has."""
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Where nodes meet, which whoever starts several of them by hand says."""


class Variable(NamedTuple):
    """One variable, and when it is set."""

    name: str
    value: Callable[[Values], str | int | None]
    """None: as the shell has it; UNSET: not, whatever the shell has."""
    why: str


def _with_several_nodes(key: str) -> Callable[[Values], str | int | None]:
    """The value of a key, for a run of several nodes."""

    def value(values: Values) -> str | int | None:
        if values["cluster.nnodes"] <= 1:  # torchrun finds its own
            return None
        found: str | int | None = values[key]
        return found

    return value


def _threads(values: Values) -> int | None:
    """OMP_NUM_THREADS: on the CPU, where every process would take all cores."""
    return None if _cuda(values) else 1


def _connections(values: Values) -> int | str | None:
    """CUDA_DEVICE_MAX_CONNECTIONS: the hardware queues of a GPU."""
    # Megatron FSDP needs more than 1, which the shell may have.
    if values.get("ddp.use_megatron_fsdp"):
        return UNSET

    # With one queue, kernels start in the order in which they are launched.
    is_older = _cuda(values) and values["cluster.gpu"] not in _BLACKWELL
    if is_older and values["model.tensor_model_parallel_size"] > 1:
        return 1
    return None


def _heartbeat(values: Values) -> int | None:
    """TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC: as long as a collective may take, where that is longer than NCCL's own."""
    minutes: int = values["dist.distributed_timeout_minutes"]
    if not _cuda(values) or minutes <= _HEARTBEAT_MINUTES:
        return None
    if values["cluster.nnodes"] * values["cluster.nproc_per_node"] <= 1:
        return None
    return minutes * 60


def _deterministic(name: str) -> Callable[[Values], str | int | None]:
    """A variable without which a target's script may refuse the mode."""

    def value(values: Values) -> str | None:
        if not values["model.deterministic_mode"]:
            return None
        return target_module(values["target"]).DETERMINISTIC_ENV.get(name)

    return value


def _wandb_resume(values: Values) -> str | None:
    """WANDB_RESUME, where the run is logged to Weights & Biases."""
    return "allow" if values.get("logger.wandb_project") else None


def _cuda(values: Values) -> bool:
    return bool(values["cluster.device"] == "cuda")


VARIABLES = (
    Variable(
        "MASTER_ADDR",
        _with_several_nodes("cluster.master_addr"),
        "cluster.master_addr",
    ),
    Variable(
        "MASTER_PORT",
        _with_several_nodes("cluster.master_port"),
        "cluster.master_port",
    ),
    Variable(
        "OMP_NUM_THREADS",
        _threads,
        "processes share the cores",
    ),
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        _connections,
        "1 keeps tensor-parallel collectives ahead of the kernels that hide them, before Blackwell; "
        "Megatron FSDP needs more",
    ),
    Variable(
        "NCCL_ALGO",
        _deterministic("NCCL_ALGO"),
        "model.deterministic_mode: sums in one order",
    ),
    Variable(
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        _deterministic("NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
        "model.deterministic_mode: Transformer Engine's kernels too",
    ),
    Variable(
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
        _heartbeat,
        "NCCL's monitor waits as long as dist.distributed_timeout_minutes, not its own 8 minutes",
    ),
    Variable(
        "WANDB_RESUME",
        _wandb_resume,
        "a resumed run goes on in the same Weights & Biases run",
    ),
)
"""What the plan sets; the presets of `launcher.env_presets` go over it, and `launcher.env` over those."""


def environment(values: Values) -> dict[str, str | None]:
    """Name and value of each variable of a run; None: the run must not have it."""
    found: dict[str, str | None] = {}
    for variable in VARIABLES:
        value = variable.value(values)
        if value is not None:
            found[variable.name] = None if value == UNSET else str(value)
    of_presets = {
        setting.name: setting.value for preset in values["launcher.env_presets"] for setting in PRESETS[preset]
    }
    # In the order in which a bundle's plan.json has them, of which scripts are made again.
    of_the_user = {name: value for name, value in values["launcher.env"].items() if isinstance(value, str)}
    plain = found | of_presets | of_the_user
    secret = references(values["launcher.env"])
    return {name: value for name, value in sorted(plain.items()) if name not in secret}


PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "170"}
"""How many seconds torchrun waits, once it is told to end, for ranks that save; its own 30 would lose their work.

A pod is given 180, and a job is asked that long before its time is over. launcher.env may say otherwise.
"""


def patience(env: Mapping[str, str | None]) -> dict[str, str]:
    """PATIENCE, unless a plan's environment has it."""
    return {name: value for name, value in PATIENCE.items() if name not in env}


def inherited(around: Mapping[str, str], *, nnodes: int) -> dict[str, str]:
    """The variables around a launch that a run may have: not those by which another launcher would have its say.

    Those of a scheduler (SLURM_*, CUDA_VISIBLE_DEVICES) stay: they say what the run was given.
    """
    strays = _strays(nnodes)
    return {name: value for name, value in around.items() if name not in strays and not name.startswith(_FAMILIES)}


def unset_lines(nnodes: int) -> list[str]:
    """What `inherited` leaves out, as the shell removes it."""
    families = " ".join(f'"${{!{family}@}}"' for family in _FAMILIES)
    names = " ".join(_strays(nnodes))
    return [
        f'for name in {families}; do unset "$name"; done  # flags and words of another launcher',
        f"unset {names}  # torchrun gives them to its ranks, or launcher.env does",
    ]


def _strays(nnodes: int) -> tuple[str, ...]:
    return _STRAYS if nnodes > 1 else (*_STRAYS, *_MEETING)


def shell_line(name: str, value: str | None) -> str:
    """A variable as the shell sets or removes it."""
    if value is None:
        return f"unset {name}"
    quoted = shlex.quote(value)
    return f"export {name}={quoted}"


def reason(name: str, values: Values) -> str:
    """Why a variable of the plan's environment is set."""
    if name in values["launcher.env"]:
        return "launcher.env"
    found = preset_of(name, values["launcher.env_presets"])
    if found is not None:
        preset, setting = found
        return f"launcher.env_presets {preset}: {setting.why}"
    return next(variable.why for variable in VARIABLES if variable.name == name)
