"""What torchrun starts on every rank: the how-to's flags, the same checks as `dfmspec validate`, then the trainer.

Identical on every rank; rank 0 talks. Started by a plan, DFMSPEC_RUN_DIR and DFMSPEC_ATTEMPT_DIR say where things go;
started alone, checkpoints go to checkpoints/<name>, as in NVIDIA DFM's how-to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfmspec import __version__
from dfmspec.check.report.text import render
from dfmspec.check.rules import check_spec
from dfmspec.diagnostics import Severity
from dfmspec.errors import (
    OK,
    PREFLIGHT,
    DfmspecError,
    InternalError,
    InvalidSpec,
    PreflightError,
    TrainingError,
    UsageError,
)
from dfmspec.processes import die_with_torchrun, short_temporary_folder
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec
from dfmspec.record.progress import Identity, Progress, plan_id_of
from dfmspec.record.run_dir import AttemptDir, RankDir, RunDir
from dfmspec.record.start import Asked, start_of
from dfmspec.spec.digest import canonical
from dfmspec.spec.paths import PATH_KEYS, PLAN_ID, RUN_DIR, absolute
from dfmspec.spec.resume import Resume
from dfmspec.targets import DEFAULT_TARGET, target_module
from dfmspec.targets.layout import layout_of

if TYPE_CHECKING:
    from dfmspec.spec.experiment import Experiment

EXTRA = "pip install 'dfmspec[train]'"


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    die_with_torchrun()
    args = _parser().parse_intermixed_args(argv)
    rank_dir = _redirect()
    try:
        resolved = _resolve(args)
        if _attempt() is None:  # as the how-to shows it
            _say("[INFO] Megatron-Bridge DiT Pretraining Script with YAML & CLI Overrides")
        _say("[INFO] Loaded base configuration")
        return _train(resolved)
    except (DfmspecError, OSError) as error:
        _record_error(rank_dir, error)
        if isinstance(error, TrainingError):  # perhaps of this rank alone
            rank = _rank()
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        else:
            _say(f"error: {error}")
        if isinstance(error, DfmspecError):
            return error.exit_code
        return PREFLIGHT
    except Exception as error:
        _record_error(rank_dir, error)
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a DiT on a WebDataset with Megatron.",
        epilog="Three layers, lowest first: recipe defaults, the YAML file, key=value.",
        allow_abbrev=False,
    )
    parser.add_argument("--dataset-path", help="folder of the WebDataset's shards, or a metadataset's .yaml")
    parser.add_argument("--config-file", help="YAML file of overrides")
    parser.add_argument("--mock", action="store_true", help="train on random latents")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.tensor_model_parallel_size=2")
    return parser


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(line: str) -> None:
    if _rank() == 0:
        print(line, flush=True)


def _attempt() -> AttemptDir | None:
    """The folder of the attempt; None: torchrun was started by hand."""
    folder = os.environ.get("DFMSPEC_ATTEMPT_DIR")
    return AttemptDir(Path(folder)) if folder else None


def _run() -> RunDir | None:
    """The run directory; None: torchrun was started by hand."""
    folder = os.environ.get("DFMSPEC_RUN_DIR")
    return RunDir(Path(folder)) if folder else None


def _redirect() -> RankDir | None:
    """Under a plan, each rank has its own files for what it prints, and leaves its process id there."""
    attempt = _attempt()
    if attempt is None:
        return None
    node = int(os.environ.get("GROUP_RANK", "0"))
    rank_dir = attempt.node(node).rank(_rank())
    rank_dir.path.mkdir(parents=True, exist_ok=True)

    # The descriptors themselves, for what C libraries print.
    for file, stream in ((rank_dir.stdout, sys.stdout), (rank_dir.stderr, sys.stderr)):
        stream.flush()
        target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        os.dup2(target, stream.fileno())
        os.close(target)
    rank_dir.pid.write_text(str(os.getpid()))
    return rank_dir


def _record_error(rank_dir: RankDir | None, error: BaseException) -> None:
    if rank_dir is None:
        return
    record = {
        "time": time.time(),
        "rank": _rank(),
        "error_type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    rank_dir.error.write_text(json.dumps(record, indent=2) + "\n")


def _resolve(args: argparse.Namespace) -> Resolved:
    """The configuration.

    Raises:
        InternalError: a rule failed.
        InvalidSpec: it has errors; rank 0 has printed every finding.
        UsageError: no dataset is named, or the target is another trainer's.
    """
    # The launcher's environment fixes the world size.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world = int(os.environ.get("WORLD_SIZE", str(local)))
    overrides = list(args.overrides)
    if args.mock:
        overrides.append("data.source=mock")
    spec = load_spec(
        args.config_file,
        overrides,
        dataset_path=args.dataset_path,
        environment={"cluster.nproc_per_node": local, "cluster.nnodes": world // local},
        base=os.environ.get("DFMSPEC_BASE"),
        spec_dir=os.environ.get("DFMSPEC_SPEC_DIR"),
    )
    resolved = resolve_spec(spec)
    if not target_module(spec.target).OWN:
        raise UsageError(
            f"this script trains target {DEFAULT_TARGET}, not {spec.target}; dfmspec plan compiles for {spec.target}"
        )

    # Every finding is told before any ends the run.
    # Warnings are for whoever started it: `dfmspec run` has told them.
    least = Severity.WARNING if _attempt() is None else Severity.ERROR
    findings = [finding for finding in check_spec(resolved) if finding.severity >= least]
    if resolved["data.source"] == "webdataset" and resolved["dataset.path"] is None:
        raise UsageError("no dataset is named: give --dataset-path, or --mock for random latents")
    for finding in findings:
        _say(render(finding))
    faults = [finding for finding in findings if finding.traceback]
    if faults:
        raise InternalError(f"{faults[0].message} [{faults[0].code}]\n{faults[0].traceback}")
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if errors:
        first = errors[0]
        raise InvalidSpec(f"{first.message} [{first.code}]")
    return resolved


def run_paths(value: Any, name: str) -> Any:
    """A path with ${RUN_DIR} filled in, absolute; started by hand, it stands for checkpoints/<name>. An address stays.

    Anything but a text is returned as it is.
    """
    if not isinstance(value, str):
        return value
    run = _run()
    if run is None:
        value = value.replace(f"{RUN_DIR}/checkpoints", RUN_DIR)
        place = f"checkpoints/{name}"
    else:
        place = str(run.path)
    return absolute(value.replace(RUN_DIR, place))


def _train(resolved: Resolved) -> int:
    """Hand the configuration to the trainer."""
    target = target_module(resolved.spec.target)
    config = target.config(resolved.values)
    if _attempt() is not None:
        layout = layout_of(resolved.values)
        _say(
            f"[INFO] dfmspec {__version__}: {resolved['recipe']}, {target.parameters(resolved.values) / 1e6:,.1f} M "
            f"parameters, TP {layout.tensor_model_parallel_size} PP {layout.pipeline_model_parallel_size} "
            f"CP {layout.context_parallel_size} DP {layout.data_parallel_size}, "
            f"{resolved['train.train_iters']:,} iterations"
        )
    located = json.loads(canonical(config))
    located["run"] = {"resume": resolved["run.resume"]}
    for key in PATH_KEYS:
        section, _, field = key.partition(".")
        fields = located[section]
        if field in fields:
            fields[field] = run_paths(fields[field], resolved["name"])

    from dfmspec.spec.experiment import Experiment

    experiment = Experiment.model_validate(located)
    _require_what_it_needs(experiment)
    return run(experiment, config=config)


def _require_what_it_needs(experiment: Experiment) -> None:
    """Packages and GPUs.

    Raises:
        OSError: a package is missing.
        PreflightError: there are fewer GPUs than processes.
    """
    try:
        import megatron.core
        import megatron.energon
        import torch
    except ImportError as error:
        raise OSError(f"the trainer needs {error.name}; run: {EXTRA}") from error
    del megatron
    if experiment.cluster.device != "cuda":
        return

    # A GPU for each process.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if processes > gpus:
        need = f"{processes} processes need a GPU each" if processes > 1 else "1 process needs a GPU"
        there = gpus or "none"
        fewer = "start as many, or " if gpus else ""
        raise PreflightError(
            f"{need}, and this machine has {there}; {fewer}give cluster.device=cpu to try it on the CPU"
        )

    # The kernels that the spec asks for.
    if experiment.model.attention_backend == "flash":
        from dfmspec.trainer.ops.libraries import FLASH_ATTENTION, installed

        if not installed(FLASH_ATTENTION):
            wanted = f"{FLASH_ATTENTION.name}=={FLASH_ATTENTION.version}"
            raise OSError(
                f"model.attention_backend flash needs {wanted}; run: pip install 'dfmspec[flash]', or set it to auto"
            )


def run(experiment: Experiment, *, config: dict[str, Any]) -> int:
    """One rank of training, on an Experiment whose paths are absolute; returns its exit code."""
    import torch.distributed as dist

    from dfmspec.trainer import loop, setup
    from dfmspec.trainer.clock import Stages
    from dfmspec.trainer.data.loader import end_loaders
    from dfmspec.trainer.prepare.writer import ensure_dataset

    # Rank 0 draws the data set, where it has to be; the others meet it at the barrier.
    stages = Stages()
    stages.end("imports")
    short_temporary_folder()
    if _rank() == 0:
        ensure_dataset(experiment)
    stages.end("data set")
    setup.initialize_distributed(experiment)
    try:
        dist.barrier()
        stages.end("process groups")
        run_dir = _run()
        attempt = _attempt()
        run_id = run_dir.path.name if run_dir else None
        identity = Identity(_with_its_data(config, experiment), _plan_id(run_dir), run_id)
        loop.train(
            experiment,
            identity=identity,
            resume=partial(_start, experiment, identity),
            events=run_dir.events if run_dir else None,
            attempt_dir=attempt.path if attempt else None,
            stages=stages,
        )
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
        end_loaders()
    return OK


def _with_its_data(config: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """The configuration, with the dataset where it is for everybody."""
    return {**config, "dataset": {**config["dataset"], "path": experiment.dataset.path}}


def _plan_id(run_dir: RunDir | None) -> str | None:
    """The id of the plan that is run, by its script or its run directory; None: torchrun was started by hand.

    Raises:
        UsageError: they are not of one plan.
    """
    of_the_script = os.environ.get(PLAN_ID)
    of_the_run = None if run_dir is None else plan_id_of(run_dir)
    if of_the_script and of_the_run and of_the_script != of_the_run:
        raise UsageError(
            f"{run_dir} is the run of another plan than this script's; give DFMSPEC_RUN_DIR another folder"
        )
    return of_the_script or of_the_run


def _start(experiment: Experiment, identity: Identity, report: Any) -> Path | None:
    """The checkpoint that the training starts from; None: afresh."""
    checkpoint = experiment.checkpoint
    asked = Asked(Resume.parse(experiment.run.resume), Path(checkpoint.load), checkpoint.ckpt_step)
    return start_of(asked, Progress.of(_run(), Path(checkpoint.save)), identity, report)


if __name__ == "__main__":
    sys.exit(main())
