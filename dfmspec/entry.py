"""What torchrun starts on every rank: the how-to's flags, the same checks as `dfmspec validate`, then the trainer.

Identical on every rank; rank 0 talks. Started by a plan, DFMSPEC_RUN_DIR and DFMSPEC_ATTEMPT_DIR say where things go;
started alone, checkpoints go to checkpoints/<name>, as in the how-to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfmspec.check.report.text import render
from dfmspec.check.rules import check_spec
from dfmspec.diagnostics import Severity
from dfmspec.errors import OK, PREFLIGHT, CheckpointError, DfmspecError, InvalidSpec, PreflightError, TrainingError, UsageError
from dfmspec.plan.plan import canonical, config_digest
from dfmspec.processes import die_with_parent
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec
from dfmspec.spec.paths import PATH_KEYS, local_path
from dfmspec.targets import DEFAULT_TARGET, target_module

if TYPE_CHECKING:
    from collections.abc import Callable

EXTRA = "pip install 'dfmspec[train]'"


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    args = _parser().parse_intermixed_args(argv)
    rank_dir = _redirect()
    try:
        resolved = _resolve(args)
        _say("[INFO] Megatron-Bridge DiT Pretraining Script with YAML & CLI Overrides")
        _say("[INFO] Loaded base configuration")
        return _train(resolved)
    except (DfmspecError, OSError) as error:
        _record_error(rank_dir, error)
        if isinstance(error, TrainingError):  # perhaps of this rank alone
            print(f"error: rank {_rank()}: {error}", file=sys.stderr, flush=True)
        else:
            _say(f"error: {error}")
        return error.exit_code if isinstance(error, DfmspecError) else PREFLIGHT
    except Exception as error:
        _record_error(rank_dir, error)
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a DiT on a WebDataset with Megatron.", allow_abbrev=False,
        epilog="Three layers, lowest first: recipe defaults, the YAML file, key=value.",
    )  # fmt: skip
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


def _redirect() -> Path | None:
    """Under a plan, each rank has its own files for what it prints, and leaves its process id there."""
    attempt = os.environ.get("DFMSPEC_ATTEMPT_DIR")
    if not attempt:
        return None
    rank_dir = Path(attempt) / f"node{os.environ.get('GROUP_RANK', '0')}" / f"rank{_rank()}"
    rank_dir.mkdir(parents=True, exist_ok=True)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        stream.flush()
        target = os.open(rank_dir / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, stream.fileno())
        os.close(target)
    (rank_dir / "pid").write_text(str(os.getpid()))
    return rank_dir


def _record_error(rank_dir: Path | None, error: BaseException) -> None:
    if rank_dir is not None:
        record = {
            "time": time.time(), "rank": _rank(), "error_type": type(error).__name__, "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }  # fmt: skip
        (rank_dir / "error.json").write_text(json.dumps(record, indent=2) + "\n")


def _resolve(args: argparse.Namespace) -> Resolved:
    """The configuration.

    Raises:
        InvalidSpec: it has errors; rank 0 has printed every finding.
        UsageError: no dataset is named.
    """
    overrides = [*args.overrides, *(["data.source=mock"] if args.mock else [])]
    environment: dict[str, Any] = {}
    if "WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        environment = {"cluster.nproc_per_node": local, "cluster.nnodes": int(os.environ["WORLD_SIZE"]) // local}
    else:
        environment = {"cluster.nproc_per_node": 1, "cluster.nnodes": 1}
    spec = load_spec(args.config_file, overrides, dataset_path=args.dataset_path, environment=environment, base=os.environ.get("DFMSPEC_BASE"),
                     spec_dir=os.environ.get("DFMSPEC_SPEC_DIR"))  # fmt: skip
    resolved = resolve_spec(spec)
    if not target_module(spec.target).OWN:
        raise UsageError(f"this script trains target {DEFAULT_TARGET}, not {spec.target}; dfmspec plan compiles for {spec.target}")
    findings = [finding for finding in check_spec(resolved) if finding.severity >= Severity.WARNING]
    if resolved["data.source"] == "webdataset" and resolved["dataset.path"] is None:
        raise UsageError("no dataset is named: give --dataset-path, or --mock for random latents")
    for finding in findings:
        _say(render(finding))
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if errors:
        raise InvalidSpec(f"{errors[0].message} [{errors[0].code}]")
    return resolved


def run_paths(value: Any, name: str) -> Any:
    """A path with ${RUN_DIR} filled in, absolute; alone, as the how-to has it: checkpoints/<name>."""
    if not isinstance(value, str):
        return value
    run_dir = os.environ.get("DFMSPEC_RUN_DIR")
    if run_dir is None:
        value = value.replace("${RUN_DIR}/checkpoints", "checkpoints/" + name).replace("${RUN_DIR}", "checkpoints/" + name)
    else:
        value = value.replace("${RUN_DIR}", run_dir)
    return os.path.abspath(os.path.expanduser(value))


def _train(resolved: Resolved) -> int:
    """Hand the configuration to the trainer."""
    config = target_module(resolved.spec.target).config(resolved.values)
    located = json.loads(canonical(config)) | {"run": {"resume": resolved["run.resume"]}}
    for section, _, field in (key.partition(".") for key in PATH_KEYS):
        if field in located[section]:
            located[section][field] = run_paths(located[section][field], resolved.spec.name)

    from dfmspec.spec.experiment import Experiment

    experiment = Experiment.model_validate(located)
    try:
        import megatron.core
        import megatron.energon
        import torch
    except ImportError as error:
        raise OSError(f"the trainer needs {error.name}; run: {EXTRA}") from error
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if experiment.cluster.device == "cuda" and processes > gpus:
        raise PreflightError(
            f"{processes} process{'es need a GPU each' if processes > 1 else ' needs a GPU'}, and this machine has {gpus or 'none'}; "
            f"{'start as many, or ' if gpus else ''}give cluster.device=cpu to try it on the CPU"
        )
    if experiment.cluster.device == "cuda" and experiment.model.attention_backend == "flash":
        from dfmspec.trainer.ops.libraries import FLASH_ATTENTION, installed

        if not installed(FLASH_ATTENTION):
            wanted = f"{FLASH_ATTENTION.name}=={FLASH_ATTENTION.version}"
            raise OSError(f"model.attention_backend flash needs {wanted}; run: pip install 'dfmspec[flash]', or set it to auto")
    del torch, megatron
    return run(experiment, config=config)


def run(experiment: Any, *, config: dict[str, Any]) -> int:
    """One rank of training, on an Experiment whose paths are absolute."""
    import torch.distributed as dist

    from dfmspec.trainer import loop, setup
    from dfmspec.trainer.clock import Stages
    from dfmspec.trainer.prepare.writer import ensure_dataset

    stages = Stages()
    stages.end("imports")
    die_with_parent()
    if _rank() == 0:
        ensure_dataset(experiment)
    stages.end("data set")
    setup.initialize_distributed(experiment)
    try:
        dist.barrier()
        stages.end("process groups")
        run_dir = os.environ.get("DFMSPEC_RUN_DIR")
        events = os.path.join(run_dir, "events.jsonl") if run_dir else None
        attempt = os.environ.get("DFMSPEC_ATTEMPT_DIR")
        loop.train(
            experiment, config=config, digest=config_digest(config), resume=resume_from(experiment), events=events,
            attempt_dir=Path(attempt) if attempt else None, stages=stages,
        )  # fmt: skip
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()
    return OK


def resume_from(experiment: Any) -> Callable[..., Path | None]:
    """What decides where a run starts, by `run.resume`, `checkpoint.load` and `checkpoint.ckpt_step`."""

    def decide(report: Callable[[str], None]) -> Path | None:
        from dfmspec.trainer.checkpoint.writer import find

        resume, folder, step = experiment.run.resume, Path(experiment.checkpoint.load), experiment.checkpoint.ckpt_step
        own = Path(experiment.checkpoint.save)
        elsewhere = own != folder  # somebody named a place to resume from
        if elsewhere and resume == "auto" and own.is_dir():  # started from elsewhere once; this may be the same run again
            continued: Path | None = find(own, iteration=None, report=report)
            if continued is not None:
                return continued
        if resume == "never":
            if list(folder.glob("iter_*")):
                raise CheckpointError(f"{folder} has checkpoints and run.resume is never; use another folder, or resume=auto")
            return None
        if isinstance(resume, int):
            step = resume
        elif resume not in ("auto", "require"):
            folder = local_path(resume).absolute()
        found: Path | None = find(folder, iteration=step, report=report) if folder.is_dir() or step is not None else None
        if found is None and (elsewhere or resume != "auto"):
            raise CheckpointError(f"{folder} has no checkpoint to resume from")
        return found

    return decide


if __name__ == "__main__":
    sys.exit(main())
