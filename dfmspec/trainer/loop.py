"""The run: resume, then fetch, step, report, evaluate and save until the last iteration or a signal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from dfmspec import checkpoints
from dfmspec.errors import CheckpointError
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer import checkpoint
from dfmspec.trainer.prefetch import Prefetch
from dfmspec.trainer.report import Reporter
from dfmspec.trainer.setup import Trainer, build_trainer
from dfmspec.trainer.signals import StopSignal
from dfmspec.trainer.step import evaluate, graphed, microbatches, train_step
from dfmspec.trainer.streams import RankStreams

_MAX_FAILED_SAVES = 3


def train(
    experiment: Experiment, *, config: dict[str, Any], digest: str, resume: Callable[..., Path | None], events: str | None, attempt_dir: Path | None
) -> None:
    """Train to `train.train_iters`.

    `config` and `digest` are stored in the checkpoints; `resume` finds the checkpoint to start from, if any; `attempt_dir` is the
    folder of this start of the run, named by its number.

    Raises:
        CheckpointError: nothing that exists can be loaded.
        TrainingError: gradients that are not finite.
        OSError: several checkpoints in a row could not be written.
    """
    stop, train = StopSignal(attempt_dir / "stop" if attempt_dir else None), experiment.train
    report = Reporter(train_iters=train.train_iters, tensorboard_dir=experiment.logger.tensorboard_dir, events=events)
    trainer = build_trainer(experiment)
    trainer.graphs = graphed(trainer)
    start_from = _agreed(resume, report)
    iteration = checkpoint.stored_iteration(start_from) if start_from else 0
    streams = _streams(experiment, "train", consumed=iteration * train.global_batch_size)
    if start_from:
        checkpoint.load(trainer, streams, start_from)
        report.say(f"[INFO] Resumed from iteration {iteration}: {start_from}/")
    save = _Saver(trainer, config, digest, report)
    _refuse_newer(Path(experiment.checkpoint.save), iteration)
    report.event("started", iteration=iteration, train_iters=train.train_iters, attempt=int(attempt_dir.name) if attempt_dir else None)
    report.say("[INFO] Starting pretraining...")

    first, last, stopped_by = iteration + 1, train.train_iters, 0
    saved_at = experiment.checkpoint.save_interval
    if iteration < last:
        batches = Prefetch(experiment, streams, iteration, is_saved=lambda i: i % saved_at == 0)
    while iteration < last:
        began = time.perf_counter()
        iteration += 1
        ready, states = batches.take(more=iteration < last)
        loss, grad_norm = train_step(trainer, iter(ready), iteration)
        seconds = time.perf_counter() - began
        report.iteration(
            iteration,
            console=iteration in (first, last) or iteration % experiment.logger.log_interval == 0,
            loss=loss,
            grad_norm=grad_norm,
            lr=trainer.optimizer.param_groups[0]["lr"],
            seconds=round(seconds, 4),
            tokens_per_second=round(train.global_batch_size * experiment.model.seq_length / seconds, 1),
        )
        if not stopped_by and (stopped_by := stop.agreed()):
            last = min(last, iteration + 1)  # the next iteration's data is on its way already: it is trained on, and then all is saved
        if train.eval_iters and (iteration % train.eval_interval == 0 or iteration == train.train_iters) and not stopped_by:
            report.evaluation(iteration, evaluate(trainer, microbatches(experiment, _streams(experiment, "val")), train.eval_iters))
        if states is not None:
            save(iteration, states, must=iteration == last)
    report.event("stopped" if stopped_by else "finished", iteration=iteration, signal=stopped_by)
    if stopped_by:
        report.say(f"[INFO] Stopped by signal {stopped_by} after iteration {iteration}; the checkpoint above resumes it")
    report.close()


def _agreed(resume: Callable[..., Path | None], report: Reporter) -> Path | None:
    """Rank 0's choice of a checkpoint, for every rank: one reads the disk, and all start from the same."""
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            choice = [resume(report.say)]
        except CheckpointError as error:
            choice = [error]
    dist.broadcast_object_list(choice, src=0)
    if isinstance(choice[0], CheckpointError):
        raise choice[0]
    found: Path | None = choice[0]
    return found


def _refuse_newer(folder: Path, iteration: int) -> None:
    """A run that starts before the newest checkpoint would leave two histories in one folder."""
    later = [path for path in checkpoints.committed(folder) if checkpoints.iteration_of(path) > iteration]
    whole = next((path for path in later if checkpoints.problem(path) is None), None)
    if whole is not None:
        raise CheckpointError(
            f"{folder} has a checkpoint of iteration {checkpoints.iteration_of(whole)}, "
            f"after the {iteration} to start from; give checkpoint.save another folder"
        )


def _streams(experiment: Experiment, split: str, consumed: int = 0) -> RankStreams:
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return RankStreams(experiment, split, rank=rank, size=size, consumed=consumed)


class _Saver:
    """Commits checkpoints; a full disk costs a checkpoint, not the run, until it has cost several in a row."""

    def __init__(self, trainer: Trainer, config: dict[str, Any], digest: str, report: Reporter) -> None:
        self._trainer, self._config, self._digest = trainer, config, digest
        self._report, self._failed = report, 0
        self._folder = Path(trainer.experiment.checkpoint.save)
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, iteration: int, streams: dict[int, Any], *, must: bool) -> None:
        began = time.perf_counter()
        try:
            path = checkpoint.save(self._trainer, streams, self._folder, iteration, self._config, self._digest)
        except OSError as error:
            self._failed += 1
            self._report.event("save_failed", iteration=iteration, error=str(error))
            self._report.say(f"[WARNING] Checkpoint of iteration {iteration} not saved: {error}. Earlier ones are untouched")
            if must or self._failed == _MAX_FAILED_SAVES:
                raise
        else:
            self._failed = 0
            self._report.checkpoint(iteration, path, time.perf_counter() - began)


