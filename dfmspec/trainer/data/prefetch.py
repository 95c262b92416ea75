"""The next iteration's microbatches, collated while this one trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.data.microbatch import Microbatch, microbatches, num_microbatches
from dfmspec.trainer.data.streams import RankStreams, States

Ready = tuple[list[Microbatch], States | None]
"""The microbatches of an iteration, and the streams' states after it where they are known."""


class Prefetch:
    """Iterations of a run, one ahead.

    A stream is then ahead of the training, so its state after an iteration is taken between that iteration's packs and
    the next ones': for the iterations that are saved, and for the last one that is asked for.
    """

    def __init__(
        self,
        experiment: Experiment,
        streams: RankStreams,
        after: int,
        is_saved: Callable[[int], bool],
    ) -> None:
        """Begin with iteration number `after` + 1; `is_saved` tells which iterations' states are kept."""
        self._batches = microbatches(experiment, streams)
        self._streams = streams
        self._count = num_microbatches(experiment)
        self._is_saved = is_saved
        self._iterations = count(after + 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next = self._thread.submit(self._collate)

    def _collate(self) -> Ready:
        """The next iteration, in the thread."""
        batches = list(islice(self._batches, self._count))
        if self._is_saved(next(self._iterations)):
            return batches, self._streams.states()
        return batches, None

    def take(self, *, more: bool) -> Ready:
        """Wait for the next iteration; `more`: another one follows, and is begun.

        Without `more`, the streams' states are known in any case.
        """
        batches, states = self._next.result()
        if more:
            self._next = self._thread.submit(self._collate)
            return batches, states
        self._thread.shutdown()
        return batches, self._streams.states()
