"""RUN, ENV: processes, machines, logging, profiling, and the environment they need."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path as FilePath

from dfmspec.check.rules.base import (
    DFM,
    ERROR,
    HINT,
    ITERS,
    OURS,
    WARNING,
    Rule,
    View,
    excludes,
    listed,
    path,
)
from dfmspec.check.rules.checkpoint import LOAD, SAVE
from dfmspec.check.rules.distributed import uses_fsdp
from dfmspec.diagnostics import Finding
from dfmspec.spec.checkpoints import committed_iterations
from dfmspec.spec.iterations import iterations
from dfmspec.spec.paths import PATH_KEYS, local_path
from dfmspec.spec.resume import WORDS, Resume

NPROC = "cluster.nproc_per_node"
ENV = "launcher.env"
RESUME = "run.resume"
_WORKERS = "dataset.num_workers"
_TIMEOUT = "dist.distributed_timeout_minutes"
_NSYS = "profiling.use_nsys_profiler"
_PYTORCH = "profiling.use_pytorch_profiler"
_PROFILE_START = "profiling.profile_step_start"
_PROFILE_END = "profiling.profile_step_end"
_WANDB = "logger.wandb_project"
_WANDB_NAME = "logger.wandb_exp_name"
_STRAGGLER = "nvrx_straggler.enabled"
_TOKENIZER = "tokenizer.tokenizer_type"
_RERUN_MODE = "rerun_state_machine.rerun_mode"
_RESTART = "inprocess_restart.enabled"
_DETERMINISTIC = "model.deterministic_mode"
_CROSS_ENTROPY = "model.cross_entropy_loss_fusion"
_SCALING = "model.apply_query_key_layer_scaling"
_USERBUFFERS = "ddp.nccl_ub"


def _world_size(view: View) -> Iterator[Finding]:
    if view.resolved.world_size_is_given:
        return
    world_size = view.layout.world_size
    several = max(view[NPROC], 2)
    yield Finding(
        path(NPROC),
        f"the number of processes is not given; checked with {world_size}, the fewest that the layout needs",
        f"give cluster.nproc_per_node={several}, for example, to check the run that is meant",
    )


def _has_begun(view: View, runs: FilePath, saved: FilePath) -> bool:
    """Whether there is a run of this plan, or a checkpoint to go on from."""
    if committed_iterations(saved, own=view.trainer.OWN):
        return True
    if list(runs.glob("*/manifest.json")):
        return True
    own = view.trainer.OWN
    return bool(view.set_by_user(LOAD) and committed_iterations(local_path(view[LOAD]), own=own))


def _iterations_of_runs(runs: FilePath) -> list[int]:
    """The iterations of which some run of a name has a checkpoint in its own directory."""
    return [iteration for run in runs.glob("*/checkpoints") for iteration in iterations(run)]


def _resume(view: View) -> Iterator[Finding]:
    resume = Resume.parse(view[RESUME])
    name = view.resolved["name"]
    runs = local_path(view["run.output_dir"]) / name
    own = view[SAVE] if view.set_by_user(SAVE) else f"checkpoints/{name}"
    saved = iterations(local_path(own))

    # What is there against what is asked for.
    if resume.kind == "require" and not _has_begun(view, runs, local_path(own)):
        yield Finding(
            path(RESUME),
            f"run.resume is require, but {runs} has no run of this plan, and {own} no checkpoint",
            "auto starts one",
        )
    elif resume.kind == "never" and saved and view.set_by_user(SAVE):
        yield Finding(
            path(RESUME),
            f"run.resume is never, and {own} has a checkpoint of iteration {saved[-1]}, from which upstream goes on",
            "another checkpoint.save, or resume auto",
        )

    # The value itself: an iteration, a word, or a folder.
    if resume.iteration is not None and resume.iteration < 1:
        yield Finding(
            path(RESUME),
            f"run.resume {resume.iteration} is no iteration",
            "1 or more; or auto, require, never, a folder",
        )
    elif resume.iteration is not None and resume.iteration not in [*saved, *_iterations_of_runs(runs)]:
        yield Finding(
            path(RESUME),
            f"run.resume is {resume.iteration}, and neither {runs} nor {own} has a checkpoint of that iteration",
            "auto continues the unfinished run of the same plan, or starts one",
        )
    elif resume.folder is not None and not local_path(resume.folder).is_dir():
        close = get_close_matches(resume.folder, WORDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "auto continues the unfinished run of the same plan"
        yield Finding(
            path(RESUME),
            f"run.resume {resume.folder} is not auto, require or never, an iteration, or a folder that exists",
            hint,
        )


def _profiler(view: View) -> Iterator[Finding]:
    start = view[_PROFILE_START]
    end = view[_PROFILE_END]
    if view[_NSYS] and view[_PYTORCH]:
        yield Finding(
            path(_PYTORCH),
            "the nsys and the PyTorch profiler exclude each other",
            "use one of the two",
        )

    # The steps, in their order and within the run.
    if end < start:
        yield Finding(
            path(_PROFILE_END),
            f"profiling from step {start} to {end}: it must not end before it starts",
            f"{start} or more",
        )
        return
    profiles = view[_NSYS] or view[_PYTORCH]
    if not profiles:
        return
    iters = view[ITERS]
    if iters is not None and start >= iters:
        yield Finding(
            path(_PROFILE_START),
            f"profiling starts at step {start}, after the last of {iters} iterations",
            f"below {iters}",
            HINT,
        )


_RERUN_MODES = ("disabled", "validate_results", "report_determinism_stats")


def _rerun(view: View) -> Iterator[Finding]:
    mode = view[_RERUN_MODE]
    if mode in _RERUN_MODES:
        return
    hint = f"one of: {listed(_RERUN_MODES)}"
    # Megatron-Bridge documents a name that megatron-core does not have.
    if mode == "report_stats":
        hint = "report_determinism_stats, as megatron-core calls it"
    yield Finding(path(_RERUN_MODE), f"{_RERUN_MODE} {mode} is not a mode that megatron-core knows", hint)


_ALGORITHMS = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")
"""What megatron-core takes for NCCL_ALGO in deterministic mode."""
_OF_DETERMINISM = ("NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO")


def _deterministic(view: View) -> Iterator[Finding]:
    if not view[_DETERMINISTIC]:
        return
    env = view[ENV]

    # Variables that are not given, which the plan sets.
    missing = [name for name in _OF_DETERMINISM if name not in env]
    if missing:
        names = listed(missing, " and ")
        yield Finding(
            path(_DETERMINISTIC),
            "deterministic_mode needs the environment variables NCCL_ALGO and NVTE_ALLOW_NONDETERMINISTIC_ALGO; "
            f"the plan sets {names}",
            "launcher.env sets others",
            HINT,
        )

    # Variables with a value that is refused.
    algorithm = env.get("NCCL_ALGO", "Ring")
    if algorithm not in _ALGORITHMS:
        legal = listed(_ALGORITHMS)
        yield Finding(
            path(_DETERMINISTIC),
            f"deterministic_mode needs the environment variable NCCL_ALGO, one of {legal}; it is {algorithm}",
            "remove launcher.env.NCCL_ALGO: the plan sets it to Ring",
        )
    if env.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0") != "0":
        yield Finding(
            path(_DETERMINISTIC),
            "deterministic_mode needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 for Transformer Engine",
            "remove it from launcher.env: the plan sets it to 0",
        )

    # A kernel that it excludes.
    if view[_CROSS_ENTROPY]:
        yield Finding(
            path(_CROSS_ENTROPY),
            "the fused cross-entropy is not deterministic",
            "set it to false; the DiT has no cross-entropy",
        )


def _layer_scaling(view: View) -> Iterator[Finding]:
    name = "NVTE_APPLY_QK_LAYER_SCALING"
    asked = view[_SCALING]
    in_env = view[ENV].get(name, "0") == "1"
    if asked != in_env:
        yield Finding(
            path(_SCALING if asked else ENV),
            f"{_SCALING} and the environment variable {name} must agree",
            "unset both",
        )


def _one_connection(view: View) -> bool:
    return uses_fsdp(view) and view[ENV].get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


def _many_workers(view: View) -> Iterator[Finding]:
    nproc = view[NPROC]
    workers = view[_WORKERS]
    processes = nproc * workers * 2
    if processes > 128:
        yield Finding(
            path(_WORKERS),
            f"{nproc} ranks x {workers} workers x 2 (training, validation) = {processes} loader processes on a node",
            "fewer workers, or as many CPU cores",
        )


def _homes(view: View) -> Iterator[Finding]:
    for key in view.set_by_user(*PATH_KEYS):
        value = view.resolved.values[key]
        if isinstance(value, str) and str(local_path(value)).startswith("~"):
            user = value.partition("/")[0].removeprefix("~")
            yield Finding(
                path(key),
                f"{key} {value}: there is no user {user} here, so ~ means a folder of that name",
                "write the whole path",
            )


def _scores_nothing(view: View) -> bool:
    if not view[_STRAGGLER]:
        return False
    relative = view["nvrx_straggler.calc_relative_gpu_perf"]
    return relative is False and view["nvrx_straggler.calc_individual_gpu_perf"] is False


def _ends_in_evaluation(view: View) -> bool:
    """Whether one rank may draw a picture for longer than the others wait."""
    if not view["train.eval_iters"]:
        return False
    minutes: int = view[_TIMEOUT]
    return 0 < minutes < 30 and view["cluster.nnodes"] > 1


def _no_wandb_key(view: View) -> bool:
    if not view[_WANDB] or view.or_null("launcher.env_from"):
        return False
    given = {"WANDB_MODE", "WANDB_API_KEY"} & {*view[ENV]}
    return not given


def _segments_move(view: View) -> bool:
    if not view[_USERBUFFERS]:
        return False
    options = view[ENV].get("PYTORCH_CUDA_ALLOC_CONF", "").split(",")
    return "expandable_segments:True" in options


UNSEEN = Rule(
    "RUN122",
    "path-that-cannot-be-looked-at",
    ERROR,
    _homes,
    "What is there cannot be checked, and the run would not reach it either: the operating system refuses the name, "
    "or the permissions of a folder on the way.",
    "the file system",
    level="paths",
)
"""The rule whose code a finding also has where the operating system refuses what another rule looks at."""
_CONFIG = "Megatron-Bridge training/config.py"

RULES = (
    # Processes, and what a run goes on from.
    Rule(
        "RUN101",
        "world-size-not-given",
        HINT,
        _world_size,
        "Batch and layout arithmetic need the number of processes.",
        "torchrun's --nproc-per-node",
    ),
    Rule(
        "RUN103",
        "resume-impossible",
        ERROR,
        _resume,
        "The run would fail after the model is built; upstream starts afresh, or goes on, in silence.",
        "dfmspec run",
        level="paths",
    ),
    # Logging, profiling and what watches a run.
    Rule(
        "RUN104",
        "wandb-run-unnamed",
        ERROR,
        excludes(
            lambda v: v[_WANDB] and v[_WANDB_NAME] == "",
            at=_WANDB_NAME,
            message="logger.wandb_exp_name is empty, and a wandb_project is set",
            hint="name the run",
        ),
        "Accepted at start; the last rank fails when it logs first, and the others wait for it until the timeout.",
        "Megatron-Bridge training/state.py",
        targets=DFM,
    ),
    Rule(
        "RUN105",
        "profiler-impossible",
        ERROR,
        _profiler,
        "Asserted at start; a profile beyond the end is never written, in silence.",
        f"{_CONFIG}, ProfilingConfig.finalize",
        targets=DFM,
    ),
    Rule(
        "RUN106",
        "nsys-not-wrapped",
        HINT,
        excludes(
            lambda v: v[_NSYS],
            at=_NSYS,
            message="nsys records nothing unless the training command itself runs under it",
            hint="start torchrun with: "
            "nsys profile -t cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop",
        ),
        "The run is slower and no profile is written, in silence.",
        f"{_CONFIG}, ProfilingConfig",
        targets=DFM,
    ),
    Rule(
        "RUN107",
        "rerun-mode-unknown",
        ERROR,
        _rerun,
        "A ValueError when training is set up: the documented report_stats is not what megatron-core calls it.",
        "megatron-core rerun_state_machine.py",
        targets=DFM,
    ),
    Rule(
        "RUN108",
        "straggler-detection-scores-nothing",
        ERROR,
        excludes(
            _scores_nothing,
            at=_STRAGGLER,
            message="straggler detection is on, and both of its scores are off",
            hint="set nvrx_straggler.calc_relative_gpu_perf to true",
        ),
        "A ValueError at start.",
        f"{_CONFIG}, NVRxStragglerDetectionConfig.finalize",
        targets=DFM,
    ),
    # How long ranks wait for each other.
    Rule(
        "RUN109",
        "timeout-shorter-than-evaluation",
        HINT,
        excludes(
            _ends_in_evaluation,
            at=_TIMEOUT,
            message=lambda v: (
                f"{v[_TIMEOUT]} minutes must hold the tokenizer's download and the drawing of a video "
                "while other ranks wait"
            ),
            hint="30 to 60 with evaluation on",
        ),
        "NCCL ends the run when one rank takes longer.",
        "NVIDIA DFM model/dit/dit_step.py",
        targets=DFM,
    ),
    Rule(
        "RUN110",
        "timeout-impossible",
        ERROR,
        excludes(
            lambda v: v[_TIMEOUT] < 1,
            at=_TIMEOUT,
            message=lambda v: f"{_TIMEOUT} {v[_TIMEOUT]} leaves collectives no time",
            hint="10 is usual",
        ),
        "Accepted at start; the first collective that waits ends the run.",
        "torch.distributed",
        targets=DFM,
    ),
    # What a diffusion model does not use, or two layers would both do.
    Rule(
        "RUN112",
        "tokenizer-on-dit",
        ERROR,
        excludes(
            lambda v: v.or_null(_TOKENIZER) != "NullTokenizer",
            at=_TOKENIZER,
            message="the DiT has no tokens of text: any tokenizer but the NullTokenizer wants files that nobody uses",
            hint="remove the tokenizer section",
        ),
        "The tokenizer cannot be built.",
        "Megatron-Bridge training/tokenizers",
        targets=DFM,
    ),
    Rule(
        "RUN113",
        "restart-inside-the-process",
        ERROR,
        excludes(
            lambda v: v[_RESTART],
            at=_RESTART,
            message="in-process restart wants to form the process group itself, "
            "and torchrun restarts are another layer",
            hint="remove it; dfmspec run resumes",
        ),
        "Refused when the group exists already; two layers of restarts work against each other.",
        "Megatron-Bridge training/pretrain.py",
        targets=DFM,
    ),
    # What the machines must have.
    Rule(
        "RUN114",
        "wandb-key-needed",
        HINT,
        excludes(
            _no_wandb_key,
            at=_WANDB,
            message="Weights & Biases logs from the last rank: its node needs WANDB_API_KEY, or WANDB_MODE=offline",
            hint="export it there (in pods, launcher.env_from names a Secret that has it), "
            "or set launcher.env.WANDB_MODE to offline",
        ),
        "The last rank fails when it logs first, and the others wait for it until the timeout.",
        "Megatron-Bridge training/state.py",
        targets=DFM,
    ),
    Rule(
        "RUN115",
        "many-loader-processes",
        HINT,
        _many_workers,
        "Workers beyond the cores make each other wait, and each holds its own shuffle buffer in memory.",
        "Energon's savable loader",
        targets=DFM,
    ),
    # Given out elsewhere: by the deep check, and where a file cannot be looked at.
    Rule(
        "RUN201",
        "megatron-refuses",
        ERROR,
        lambda view: (),
        "Megatron's own classes were built as the plan would build them, and one of them raised an error: "
        "the run would end there, after its processes had started.",
        "megatron-core, at the place the finding names",
        targets=OURS,
        level="deep",
    ),
    UNSEEN,
    # The environment.
    Rule(
        "ENV101",
        "determinism-incomplete",
        ERROR,
        _deterministic,
        "Asserted at start, or Transformer Engine refuses it when the model is built.",
        f"{_CONFIG}, _validate_and_apply_deterministic_mode",
        targets=DFM,
    ),
    Rule(
        "ENV102",
        "expandable-segments-with-userbuffers",
        ERROR,
        excludes(
            _segments_move,
            at=_USERBUFFERS,
            message="ddp.nccl_ub registers memory that PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True moves",
            hint="remove expandable_segments, or nccl_ub",
        ),
        "A ValueError at start.",
        "megatron-core DistributedDataParallelConfig.__post_init__",
        targets=DFM,
    ),
    Rule(
        "ENV103",
        "layer-scaling-disagrees",
        ERROR,
        _layer_scaling,
        "The model cannot be built.",
        "megatron-core extensions/transformer_engine.py",
        targets=DFM,
    ),
    Rule(
        "ENV104",
        "connections-with-fsdp",
        WARNING,
        excludes(
            _one_connection,
            at=ENV,
            message="launcher.env sets CUDA_DEVICE_MAX_CONNECTIONS to 1, and Megatron FSDP needs more to overlap",
            hint="remove it: the plan unsets it with FSDP; or set it to '8'",
        ),
        "Gathers wait behind the kernels they should hide under, in silence: the run is slow.",
        "megatron-core tensor_parallel/layers.py",
        targets=DFM,
    ),
)
