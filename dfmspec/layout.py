"""Rank arithmetic, without torch: Megatron's tp-cp-dp-pp order (megatron/core/parallel_state.py, order "tp-cp-ep-dp-pp")."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """How the ranks of a run are arranged."""

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model; 0 when the world size is no multiple of the model-parallel size."""
        whole, rest = divmod(self.world_size, self.model_parallel_size)
        return 0 if rest else whole


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, in order."""
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def nearest_multiples(number: int, of: int) -> list[int]:
    """The multiples of `of` next below and next above `number`, the positive ones."""
    below = number // of * of
    return [value for value in (below, below + of) if value > 0]
