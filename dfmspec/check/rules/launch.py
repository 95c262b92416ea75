"""RUN, ENV: processes, machines, logging, profiling, and the environment they need."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from dfmspec.check.rules.base import ALL, DFM, ERROR, HINT, ITERS, OURS, WARNING, Rule, View, excludes, path, together
from dfmspec.check.rules.checkpoint import iterations
from dfmspec.check.rules.distributed import uses_fsdp
from dfmspec.diagnostics import Finding
from dfmspec.spec.paths import PATH_KEYS, local_path


def _world_size(view: View) -> Iterator[Finding]:
    if not view.resolved.world_size_is_given:
        nproc = view["cluster.nproc_per_node"]
        yield Finding(
            path("cluster.nproc_per_node"), f"the number of processes is not given; checked with {view.layout.world_size}, the fewest that the layout needs",
            f"give cluster.nproc_per_node={max(nproc, 2)}, for example, to check the run that is meant",
        )  # fmt: skip


def _resume(view: View) -> Iterator[Finding]:
    resume, name = view["run.resume"], view.resolved.spec.name
    runs, own = local_path(view["run.output_dir"]) / name, view["checkpoint.save"] if view.users("checkpoint.save") else f"checkpoints/{name}"
    saved = iterations(local_path(own))
    if resume == "require" and not saved and not list(runs.glob("*/manifest.json")) and not (view.users("checkpoint.load") and iterations(local_path(view["checkpoint.load"]))):
        yield Finding(path("run.resume"), f"run.resume is require, but {runs} has no run of this plan, and {own} no checkpoint", "auto starts one")
    elif resume == "never" and saved and view.users("checkpoint.save"):
        yield Finding(path("run.resume"), f"run.resume is never, and {own} has a checkpoint of iteration {saved[-1]}, from which upstream goes on", "another checkpoint.save, or resume auto")
    if isinstance(resume, int):
        if resume < 1:
            yield Finding(path("run.resume"), f"run.resume {resume} is no iteration", "1 or more; or auto, require, never, a folder")
    elif resume not in ("auto", "require", "never") and not local_path(resume).is_dir():
        close = get_close_matches(resume, ("auto", "require", "never"), n=1)
        yield Finding(path("run.resume"), f"run.resume {resume} is not auto, require or never, an iteration, or a folder that exists", f"did you mean {close[0]}?" if close else "auto continues the unfinished run of the same plan")


def _profiler(view: View) -> Iterator[Finding]:
    start, end = view["profiling.profile_step_start"], view["profiling.profile_step_end"]
    if view["profiling.use_nsys_profiler"] and view["profiling.use_pytorch_profiler"]:
        yield Finding(path("profiling.use_pytorch_profiler"), "the nsys and the PyTorch profiler exclude each other", "use one of the two")
    if end < start:
        yield Finding(path("profiling.profile_step_end"), f"profiling from step {start} to {end}: it must not end before it starts", f"{start} or more")
    elif (view["profiling.use_nsys_profiler"] or view["profiling.use_pytorch_profiler"]) and view[ITERS] is not None and start >= view[ITERS]:
        yield Finding(path("profiling.profile_step_start"), f"profiling starts at step {start}, after the last of {view[ITERS]} iterations", f"below {view[ITERS]}", HINT)


def _rerun(view: View) -> Iterator[Finding]:
    key, legal = "rerun_state_machine.rerun_mode", ("disabled", "validate_results", "report_determinism_stats")
    if view[key] not in legal:
        hint = "report_determinism_stats, as megatron-core calls it" if view[key] == "report_stats" else f"one of: {', '.join(legal)}"
        yield Finding(path(key), f"{key} {view[key]} is not a mode that megatron-core knows", hint)


def _deterministic(view: View) -> Iterator[Finding]:
    key = "model.deterministic_mode"
    if not view[key]:
        return
    env, legal = view["launcher.env"], ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")
    if missing := [name for name in ("NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO") if name not in env]:
        yield Finding(path(key), f"deterministic_mode needs the environment variables NCCL_ALGO and NVTE_ALLOW_NONDETERMINISTIC_ALGO; the plan sets {' and '.join(missing)}", "launcher.env sets others", HINT)
    if env.get("NCCL_ALGO", "Ring") not in legal:
        yield Finding(path(key), f"deterministic_mode needs the environment variable NCCL_ALGO, one of {', '.join(legal)}; it is {env['NCCL_ALGO']}", "remove launcher.env.NCCL_ALGO: the plan sets it to Ring")
    if env.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0") != "0":
        yield Finding(path(key), "deterministic_mode needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 for Transformer Engine", "remove it from launcher.env: the plan sets it to 0")
    if view["model.cross_entropy_loss_fusion"]:
        yield Finding(path("model.cross_entropy_loss_fusion"), "the fused cross-entropy is not deterministic", "set it to false; the DiT has no cross-entropy")


def _scaling(view: View) -> Iterator[Finding]:
    key, name = "model.apply_query_key_layer_scaling", "NVTE_APPLY_QK_LAYER_SCALING"
    if view[key] != (view["launcher.env"].get(name, "0") == "1"):
        yield Finding(path(key if view[key] else "launcher.env"), f"{key} and the environment variable {name} must agree", "unset both")


def _connections(view: View) -> bool:
    return uses_fsdp(view) and view["launcher.env"].get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


def _workers(view: View) -> Iterator[Finding]:
    nproc, workers = view["cluster.nproc_per_node"], view["dataset.num_workers"]
    processes = nproc * workers * 2
    if processes > 128:
        yield Finding(path("dataset.num_workers"), f"{nproc} ranks x {workers} workers x 2 (training, validation) = {processes} loader processes on a node", "fewer workers, or as many CPU cores")


def _homes(view: View) -> Iterator[Finding]:
    for key in view.users(*PATH_KEYS):
        value = view.resolved.values[key]
        if isinstance(value, str) and str(local_path(value)).startswith("~"):
            yield Finding(path(key), f"{key} {value}: there is no user {value.partition('/')[0][1:]} here, so ~ means a folder of that name", "write the whole path")


UNSEEN = Rule(
    "RUN122", "path-that-cannot-be-looked-at", ERROR, _homes,
    "What is there cannot be checked, and the run would not reach it either: the operating system refuses the name, or the permissions of a folder on the way.",
    "the file system", ALL, "paths",
)  # fmt: skip
"""Also what is said when a rule that looks at files is refused by the operating system."""
_CONFIG = "Megatron-Bridge training/config.py"

RULES = (
    Rule("RUN101", "world-size-not-given", HINT, _world_size, "Batch and layout arithmetic need the number of processes.", "torchrun's --nproc-per-node"),
    Rule("RUN103", "resume-impossible", ERROR, _resume, "The run would fail after the model is built; upstream starts afresh, or goes on, in silence.", "dfmspec run", ALL, "paths"),
    Rule(
        "RUN104", "wandb-run-unnamed", ERROR,
        excludes(lambda v: v["logger.wandb_project"] and v["logger.wandb_exp_name"] == "", at="logger.wandb_exp_name",
                 message="logger.wandb_exp_name is empty, and a wandb_project is set", hint="name the run"),
        "Accepted at start; the last rank fails when it logs first, and the others wait for it until the timeout.", "Megatron-Bridge training/state.py", DFM,
    ),
    Rule("RUN105", "profiler-impossible", ERROR, _profiler, "Asserted at start; a profile beyond the end is never written, in silence.", f"{_CONFIG}, ProfilingConfig.finalize", DFM),
    Rule(
        "RUN106", "nsys-not-wrapped", HINT,
        excludes(lambda v: v["profiling.use_nsys_profiler"], at="profiling.use_nsys_profiler",
                 message="nsys records nothing unless the training command itself runs under it",
                 hint="start torchrun with: nsys profile -t cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop"),
        "The run is slower and no profile is written, in silence.", f"{_CONFIG}, ProfilingConfig", DFM,
    ),
    Rule("RUN107", "rerun-mode-unknown", ERROR, _rerun, "A ValueError when training is set up: the documented report_stats is not what megatron-core calls it.", "megatron-core rerun_state_machine.py", DFM),
    Rule(
        "RUN108", "straggler-detection-scores-nothing", ERROR,
        excludes(lambda v: v["nvrx_straggler.enabled"] and v["nvrx_straggler.calc_relative_gpu_perf"] is False and v["nvrx_straggler.calc_individual_gpu_perf"] is False,
                 at="nvrx_straggler.enabled", message="straggler detection is on, and both of its scores are off", hint="set nvrx_straggler.calc_relative_gpu_perf to true"),
        "A ValueError at start.", f"{_CONFIG}, NVRxStragglerDetectionConfig.finalize", DFM,
    ),
    Rule(
        "RUN109", "timeout-shorter-than-evaluation", HINT,
        excludes(lambda v: v["train.eval_iters"] and 0 < v["dist.distributed_timeout_minutes"] < 30 and v["cluster.nnodes"] > 1, at="dist.distributed_timeout_minutes",
                 message=lambda v: f"{v['dist.distributed_timeout_minutes']} minutes must hold the tokenizer's download and the drawing of a video while other ranks wait",
                 hint="30 to 60 with evaluation on"),
        "NCCL ends the run when one rank takes longer.", "NVIDIA DFM model/dit/dit_step.py", DFM,
    ),
    Rule(
        "RUN110", "timeout-impossible", ERROR,
        excludes(lambda v: v["dist.distributed_timeout_minutes"] < 1, at="dist.distributed_timeout_minutes",
                 message=lambda v: f"dist.distributed_timeout_minutes {v['dist.distributed_timeout_minutes']} leaves collectives no time", hint="10 is usual"),
        "Accepted at start; the first collective that waits ends the run.", "torch.distributed", DFM,
    ),
    Rule(
        "RUN112", "tokenizer-on-dit", ERROR,
        together(
            excludes(lambda v: v["tokenizer.tokenizer_type"] != "NullTokenizer", at="tokenizer.tokenizer_type",
                     message="the DiT has no tokens of text: any tokenizer but the NullTokenizer wants files that nobody uses", hint="remove the tokenizer section"),
            excludes(lambda v: v["tokenizer.vocab_size"] is None, at="tokenizer.vocab_size", message="the NullTokenizer needs a vocab_size", hint="remove it to have 32000"),
        ),
        "The tokenizer cannot be built.", "Megatron-Bridge training/tokenizers", DFM,
    ),
    Rule(
        "RUN113", "restart-inside-the-process", ERROR,
        excludes(lambda v: v["inprocess_restart.enabled"], at="inprocess_restart.enabled",
                 message="in-process restart wants to form the process group itself, and torchrun restarts are another layer", hint="remove it; dfmspec run resumes"),
        "Refused when the group exists already; two layers of restarts work against each other.", "Megatron-Bridge training/pretrain.py", DFM,
    ),
    Rule(
        "RUN114", "wandb-key-needed", HINT,
        excludes(lambda v: v["logger.wandb_project"] and not v["launcher.env_from"] and not {"WANDB_MODE", "WANDB_API_KEY"} & {*v["launcher.env"]}, at="logger.wandb_project",
                 message="Weights & Biases logs from the last rank: its node needs WANDB_API_KEY, or WANDB_MODE=offline", hint="export it there (in pods, launcher.env_from names a Secret that has it), or set launcher.env.WANDB_MODE to offline"),
        "The last rank fails when it logs first, and the others wait for it until the timeout.", "Megatron-Bridge training/state.py", DFM,
    ),
    Rule(
        "RUN115", "many-loader-processes", HINT, _workers,
        "Workers beyond the cores make each other wait, and each holds its own shuffle buffer in memory.", "Energon's savable loader", DFM,
    ),
    Rule(
        "RUN201", "megatron-refuses", ERROR, lambda view: (),
        "Megatron's own classes were built as the plan would build them, and one of them raised an error: the run would end there, after its processes had started.",
        "megatron-core, at the place the finding names", OURS, "deep",
    ),
    UNSEEN,
    Rule("ENV101", "determinism-incomplete", ERROR, _deterministic, "Asserted at start, or Transformer Engine refuses it when the model is built.", f"{_CONFIG}, _validate_and_apply_deterministic_mode", DFM),
    Rule(
        "ENV102", "expandable-segments-with-userbuffers", ERROR,
        excludes(lambda v: v["ddp.nccl_ub"] and "expandable_segments:True" in v["launcher.env"].get("PYTORCH_CUDA_ALLOC_CONF", "").split(","), at="ddp.nccl_ub",
                 message="ddp.nccl_ub registers memory that PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True moves", hint="remove expandable_segments, or nccl_ub"),
        "A ValueError at start.", "megatron-core DistributedDataParallelConfig.__post_init__", DFM,
    ),
    Rule("ENV103", "layer-scaling-disagrees", ERROR, _scaling, "The model cannot be built.", "megatron-core extensions/transformer_engine.py", DFM),
    Rule(
        "ENV104", "connections-with-fsdp", WARNING,
        excludes(_connections, at="launcher.env", message="launcher.env sets CUDA_DEVICE_MAX_CONNECTIONS to 1, and Megatron FSDP needs more to overlap",
                 hint="remove it: the plan unsets it with FSDP; or set it to '8'"),
        "Gathers wait behind the kernels they should hide under, in silence: the run is slow.", "megatron-core tensor_parallel/layers.py", DFM,
    ),
)  # fmt: skip
