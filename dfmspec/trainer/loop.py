"""The run: resume, then fetch, step, report, evaluate and save until the last iteration or a signal."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from dfmspec.errors import CheckpointError
from dfmspec.record import checkpoints
from dfmspec.record.progress import Identity
from dfmspec.record.run_dir import AttemptDir
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.checkpoint import writer as checkpoint
from dfmspec.trainer.clock import Mark, Stages
from dfmspec.trainer.data.microbatch import microbatches
from dfmspec.trainer.data.prefetch import Prefetch
from dfmspec.trainer.data.streams import RankStreams, States
from dfmspec.trainer.report import Reporter
from dfmspec.trainer.setup import Trainer, build_trainer, patience
from dfmspec.trainer.signals import StopSignal
from dfmspec.trainer.step import Outcome, evaluate, graphed, train_step

_MAX_FAILED_SAVES = 3


def train(
    experiment: Experiment,
    *,
    identity: Identity,
    resume: Callable[..., Path | None],
    events: Path | None,
    attempt_dir: Path | None,
    stages: Stages,
) -> None:
    """Train to `train.train_iters`.

    Args:
        experiment: the configuration as resolved.
        identity: what the checkpoints say of whose they are.
        resume: finds the checkpoint to start from, if any; it is given a function that says a line.
        events: the file of events; None: there is none.
        attempt_dir: the folder of this start of the run, named by its number.
        stages: the stages of the start so far.

    Raises:
        CheckpointError: nothing that exists can be loaded.
        TrainingError: gradients that are not finite.
        OSError: several checkpoints in a row could not be written.
    """
    # Set out.
    stop_file = AttemptDir(attempt_dir).stop if attempt_dir else None
    stop = StopSignal(stop_file, patience(experiment))
    last = experiment.train.train_iters
    report = Reporter(train_iters=last, tensorboard_dir=experiment.logger.tensorboard_dir, events=events)
    start_from = _agreed(resume, report)
    trainer, streams, iteration = _set_out(experiment, start_from, report, stages)
    save = _Saver(trainer, identity, report)
    stages.end("checkpoint and streams")
    attempt = int(attempt_dir.name) if attempt_dir else None
    report.event("started", iteration=iteration, train_iters=last, attempt=attempt, seconds=stages.seconds)
    report.say("[INFO] Starting pretraining...")

    # Train.
    iteration, stopped_by = _iterate(trainer, streams, iteration, stop, save, report)

    # Say how it ended.
    report.event("stopped" if stopped_by else "finished", iteration=iteration, signal=stopped_by)
    if stopped_by:
        report.say(
            f"[INFO] Stopped by signal {stopped_by} after iteration {iteration}; the checkpoint above resumes it"
        )
    report.close()
    trainer.release_graphs()


def _iterate(
    trainer: Trainer,
    streams: RankStreams,
    iteration: int,
    stop: StopSignal,
    save: _Saver,
    report: Reporter,
) -> tuple[int, int]:
    """Train on after `iteration`, to the last one or until a signal.

    Returns:
        The iteration that was reached, and the number of the signal, or 0.
    """
    experiment = trainer.experiment
    saved_at = experiment.checkpoint.save_interval
    last = experiment.train.train_iters
    stopped_by = 0
    if iteration >= last:
        report.say(f"[INFO] Nothing to train: iteration {iteration} is reached, and train.train_iters is {last}")
        return iteration, stopped_by
    batches = Prefetch(experiment, streams, iteration, is_saved=lambda i: i % saved_at == 0)
    log = _Log(report, experiment, iteration + 1)
    gc.freeze()  # what is there by now stays: a collection need not go through it, in an iteration or in a save
    while iteration < last:
        # Fetch.
        iteration += 1
        ready, states = batches.take(more=iteration < last)

        # Forward, backward and update.
        outcome = train_step(trainer, iter(ready), iteration)
        log.add(iteration, outcome, trainer.optimizer.param_groups[0]["lr"])

        # Stop, if any rank was told to: after the next iteration, whose data is on its way already.
        if not stopped_by:
            stopped_by = stop.agreed()
            if stopped_by:
                last = min(last, iteration + 1)

        # Report, evaluate and save.
        save.poll()
        evaluates = not stopped_by and _is_evaluated(iteration, experiment)
        if evaluates or states is not None:
            log.flush()
            if evaluates:
                _evaluate(trainer, iteration, stop, report)
            if states is not None:
                save(iteration, states, must=iteration == last)
            log.restart()
    return iteration, stopped_by


def _is_evaluated(iteration: int, experiment: Experiment) -> bool:
    """Whether an evaluation follows an iteration: at an interval, and after the last."""
    train = experiment.train
    is_due = iteration % train.eval_interval == 0 or iteration == train.train_iters
    return train.eval_iters > 0 and is_due


def _evaluate(trainer: Trainer, iteration: int, stop: StopSignal, report: Reporter) -> None:
    """Report the loss on the evaluation split, unless a signal comes before it is known."""
    streams = _streams(trainer.experiment, "val")
    batches = microbatches(trainer.experiment, streams)
    loss = evaluate(trainer, batches, trainer.experiment.train.eval_iters, stop.agreed)
    if loss is not None:
        report.evaluation(iteration, loss)


def _set_out(
    experiment: Experiment,
    start_from: Path | None,
    report: Reporter,
    stages: Stages,
) -> tuple[Trainer, RankStreams, int]:
    """What trains, the samples that come next, and the iteration that is behind them.

    They are those of the checkpoint `start_from`, or, without one, of a beginning.
    """
    # What trains.
    pretrained = experiment.checkpoint.pretrained_checkpoint
    weights = Path(pretrained) if pretrained and not start_from else None
    trainer = build_trainer(experiment, weights)
    trainer.graphs = graphed(trainer)
    stages.end("model")

    # Where it was.
    iteration = checkpoints.iteration_of(start_from) if start_from else 0
    consumed = iteration * experiment.train.global_batch_size
    streams = _streams(experiment, "train", consumed=consumed)
    if start_from:
        checkpoint.load(trainer, streams, start_from)
        report.say(f"[INFO] Resumed from iteration {iteration}: {start_from}/")
    elif pretrained:
        report.say(f"[INFO] Weights from {pretrained}")
    return trainer, streams, iteration


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


def _streams(experiment: Experiment, split: str, consumed: int = 0) -> RankStreams:
    """This rank's streams of a split, after as many packs as the whole run has `consumed`."""
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    return RankStreams(experiment, split, rank=rank, size=size, consumed=consumed)


class _Log:
    """Reports iterations, each when the next one has been given to the GPU.

    So reading an iteration's loss keeps nothing waiting.
    """

    def __init__(self, report: Reporter, experiment: Experiment, first: int) -> None:
        """`first`: the iteration after which a console line comes in any case."""
        self._report = report
        self._experiment = experiment
        self._first = first
        self._waiting: tuple[int, Outcome, float] | None = None
        self.restart()

    def restart(self) -> None:
        """The time of the next iteration counts from now."""
        self._since = Mark(self._experiment.cluster.device)

    def add(self, iteration: int, outcome: Outcome, lr: float) -> None:
        """An iteration that is on its way, or on a CPU done."""
        self.flush()
        self._waiting = (iteration, outcome, lr)

    def flush(self) -> None:
        """Wait for the iteration on its way, and report it."""
        if self._waiting is None:
            return
        iteration, outcome, lr = self._waiting
        self._waiting = None
        loss, grad_norm, tokens = outcome.values(iteration)
        seconds = outcome.done.seconds_since(self._since)
        self._since = outcome.done
        room = self._experiment.train.global_batch_size * self._experiment.model.seq_length
        self._report.iteration(
            iteration,
            console=self._is_said(iteration),
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            seconds=round(seconds, 4),
            tokens_per_second=round(tokens / seconds, 1),
            padding=round(1 - tokens / room, 4),
        )

    def _is_said(self, iteration: int) -> bool:
        """Whether an iteration has a console line: the first, the last, and one of an interval."""
        if iteration in (self._first, self._experiment.train.train_iters):
            return True
        return iteration % self._experiment.logger.log_interval == 0


class _Saver:
    """Commits checkpoints; a full disk costs a checkpoint, not the run, until it has cost several in a row."""

    def __init__(self, trainer: Trainer, identity: Identity, report: Reporter) -> None:
        self._report = report
        self._failed = 0
        """Checkpoints in a row that could not be written."""
        self._beside = trainer.experiment.checkpoint.async_save
        folder = Path(trainer.experiment.checkpoint.save)
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = checkpoint.Writer(trainer, folder, identity)
        self._writing: tuple[int, float, float, Future[Path]] | None = None
        """Iteration, beginning, seconds that the training stood still, and the writing itself."""

    def __call__(self, iteration: int, streams: States, *, must: bool) -> None:
        """Save after an iteration, with the streams' states; what `must` be saved, and is not, ends the run."""
        self.finish()
        began = time.perf_counter()
        writing = self._writer.save(streams, iteration)
        blocked = time.perf_counter() - began
        self._writing = (iteration, began, blocked, writing)
        if must or not self._beside:
            self.finish(must=must)

    def finish(self, *, must: bool = False) -> None:
        """Wait for the checkpoint that is being written, and report it.

        Raises:
            OSError: it could not be written, and it `must` be, or several in a row could not.
        """
        if self._writing is None:
            return
        iteration, began, blocked, writing = self._writing
        self._writing = None
        try:
            path = writing.result()
        except OSError as error:
            self._failed += 1
            self._report.event("save_failed", iteration=iteration, error=str(error))
            self._report.say(
                f"[WARNING] Checkpoint of iteration {iteration} not saved: {error}. Earlier ones are untouched"
            )
            if must or self._failed == _MAX_FAILED_SAVES:
                raise
        else:
            self._failed = 0
            seconds = time.perf_counter() - began
            if not self._beside:
                blocked = seconds
            self._report.checkpoint(iteration, path, seconds, blocked)

    def poll(self) -> None:
        """Report a checkpoint as soon as it is there."""
        if self._writing is None:
            return
        *_, writing = self._writing
        if writing.done():
            self.finish()
