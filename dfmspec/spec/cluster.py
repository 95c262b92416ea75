"""`cluster`, `launcher` and `run`: where the experiment runs and what becomes of its files."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from dfmspec.spec.base import NonNegativeInt, Section, derived


class Cluster(Section):
    """The machines."""

    nnodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Nodes."""
    nproc_per_node: Annotated[int, Field(ge=1, le=1024)] = derived()
    """Processes, one a device, on each node; derived: the fewest that hold TP x PP x CP."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda, or cpu over gloo for small trials and tests."""
    gpu: Literal["a100", "h100", "h200", "b200", "b300", "gb200", "gb300"] | None = None
    """The GPU model, for rules on number formats and memory; null: not known."""
    master_addr: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")] | None = None
    """Address of node 0; null: the launcher's choice, or the environment's MASTER_ADDR."""
    master_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of node 0; null: the launcher's choice, or the environment's MASTER_PORT."""


def _form(pattern: str, words: str) -> Any:
    """A pattern, with the words that a finding says it in."""
    return Field(pattern=pattern, json_schema_extra={"x-form": words})


# What a launcher puts into a command line or a manifest, so that no value can be a second option or a second line.
_Word = Annotated[
    str,
    _form(r"^[\w.,@-]+$", "letters, digits, dot, comma, hyphen and underscore"),
]
_Label = Annotated[
    str,
    _form(
        r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        "a name of Kubernetes: at most 63 lower-case letters, digits and hyphens",
    ),
]
_Host = Annotated[
    str,
    _form(r"^[A-Za-z0-9_][A-Za-z0-9_.@:-]*$", "a host, such as node1 or user@10.0.0.1"),
]
_Minutes = Annotated[
    str,
    _form(
        r"^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$",
        "a time such as 4h, 1h30m or 2d; or as Slurm writes it, in quotes: minutes, hours:minutes:seconds, days-hours",
    ),
]
_Option = Annotated[
    str,
    _form(
        r"^--[a-z][a-z-]*(=[^\n]*)?$",
        "one option a line of the list, such as --exclusive or --constraint=h200",
    ),
]
_TorchrunOption = Annotated[
    str,
    _form(r"^--[a-z][a-z_-]*(=[^\n]*)?$", "one option of torchrun's, such as --max-restarts=2"),
]
_Place = Annotated[
    str,
    _form(r"^/[^\n]*$", "an absolute path"),
]
_Mount = Annotated[
    str,
    _form(r"^/[^:,\n]*(:/[^:,\n]*)?$", "an absolute path, or two with a colon between"),
]


class _Reference(Section):
    """Where a node has a secret: the variable, file or command of the node's that has the value."""

    secret: Annotated[
        str,
        _form(
            r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:[~/][^\n]*|cmd:[^\n]+)$",
            "env:NAME, file:/PATH or cmd:COMMAND",
        ),
    ]


_Environment = Annotated[
    dict[str, str | _Reference],
    Field(json_schema_extra={"propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}}),
]


class Launcher(Section):
    """How the processes are started. Keys that name a launcher in brackets are for that one alone."""

    kind: str = "local"
    (
        "local: torchrun on this machine; every node of the plan on this machine, for trials. "
        "ssh, slurm: one torchrun on each node. kubernetes: a JobSet."
    )
    rendezvous: Literal["static", "c10d"] = "static"
    (
        "How several nodes meet: static, by node rank, address and port, as in the how-to; "
        "or c10d, by address and an id of the attempt."
    )
    env: _Environment = Field(default={})
    (
        "Environment variables of every process, such as NCCL_ALGO; a secret by reference alone: WANDB_API_KEY: "
        "{secret: env:WANDB_API_KEY}, file:PATH or cmd:COMMAND, as each node has it. OMP_NUM_THREADS and torchrun's "
        "PET_* are those of here alone, whatever the shell has."
    )
    env_presets: list[str] = Field(default=[])
    (
        "Variables that go together, by name: infiniband and roce (NCCL over verbs or not at all), ethernet, no_nvls, "
        "nccl_debug; launcher.env goes over them."
    )
    torchrun_options: list[_TorchrunOption] = Field(default=[])
    """Further options of torchrun, such as --max-restarts=2; `dfmspec run SPEC -- WORDS` adds some."""
    setup: list[str] = Field(default=[])
    """Shell lines that each node runs first, such as `source /shared/venv/bin/activate` or `module load cuda`."""
    root: _Place | None = None
    (
        "Where the code of target dfm, dfm_wan or dfm_flux is; null: /opt/DFM. The variable DFM_ROOT goes over it, and "
        "may differ from machine to machine."
    )
    python: Annotated[str, Field(min_length=1)] | None = None
    """Interpreter that runs torchrun, such as /opt/venv/bin/python; null: that of the torchrun that is found."""
    container: Annotated[str, Field(min_length=1)] | None = None
    (
        "Image in which every node runs: by digest (nvcr.io/nvidia/dfm@sha256:...), or an image's file (.sqsh, .sif); "
        "null: none. The run directory and the paths of the spec are mounted where they are."
    )
    container_engine: Literal["docker", "podman", "apptainer", "pyxis"] | None = None
    """What runs it; null: pyxis under launcher slurm, apptainer for a file, docker otherwise."""
    container_mounts: list[_Mount] = Field(default=[])
    """Further folders of the machine in it: /place, or /place:/place/inside."""
    container_options: list[str] = Field(default=[])
    """Further words for the engine (docker run, apptainer exec, srun), such as --device=/dev/infiniband."""
    hosts: list[_Host] = Field(default=[])
    """[ssh] The nodes, node 0 first, as ssh names them."""
    ssh_options: list[str] = Field(default=[])
    """[ssh] Further words for ssh, such as -p and a port."""
    partition: _Word | None = None
    """[slurm] Partition of the job; null: the cluster's default."""
    account: _Word | None = None
    """[slurm] Account that pays."""
    qos: _Word | None = None
    """[slurm] Quality of service."""
    time_limit: _Minutes | None = None
    (
        '[slurm] Most time of an attempt, such as 4h or 2d, or as Slurm writes it: "4:00:00", "2-00" (days-hours); '
        "a run that is not done by then saves, and is queued again."
    )
    stop_before: Annotated[int, Field(ge=0, le=65535)] = 180
    """[slurm] Seconds before the time limit, or after a preemption's notice, in which the run saves and stops."""
    sbatch_options: list[_Option] = Field(default=[])
    """[slurm] Further options of sbatch, such as --exclusive or --constraint=h200."""
    image: Annotated[str, Field(min_length=1)] | None = None
    """[kubernetes] The container's image, with dfmspec[train] in it, or NVIDIA DFM for target dfm; best by digest."""
    namespace: _Label | None = None
    """[kubernetes] Namespace; null: kubectl's own."""
    queue: _Label | None = None
    """[kubernetes] Local queue of Kueue that admits the job."""
    env_from: _Label | None = None
    """[kubernetes] Secret whose entries every pod has as variables, such as WANDB_API_KEY."""
    volumes: dict[str, _Place] = Field(default={})
    """[kubernetes] Persistent volume claims, and where each is mounted, such as {training-data: /data}."""


class Run(Section):
    """The run directory and what happens around training."""

    output_dir: str = "runs"
    (
        "Folder of the run directories: <output_dir>/<name>/<run-id>; "
        "unless named, in the directory where the run is started."
    )
    group: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    """Runs that `dfmspec runs` shows together; a matrix gives its cells the name of the spec."""
    resume: str | int = "auto"
    (
        "auto: continue the unfinished run of the same plan. require: that, or an error. never: a new run. "
        "Or an iteration, or a folder: from there."
    )
    git: Literal["record", "require-clean", "patch"] = "record"
    (
        "The repository that the spec lies in. record: its state is written down. require-clean: a run starts only "
        "where everything is committed. patch: what is not committed is kept with the run, as git apply takes it."
    )
    num_samples: NonNegativeInt = 0
    """Pictures to sample from the final checkpoint of a run that succeeded."""
