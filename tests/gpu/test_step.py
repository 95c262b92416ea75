"""What makes a step fast on a GPU changes no number: fused update, CUDA graphs, compiled blocks, side stream."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, cycle
from typing import Any

import pytest
import torch

from dfmspec.trainer.ops.libraries import FLASH_ATTENTION, usable
from tests.trainer import parity

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("one process")]


BACKENDS = [
    "fused",
    pytest.param(
        "flash", marks=pytest.mark.skipif(not usable(FLASH_ATTENTION), reason="needs FlashAttention 4 on Hopper")
    ),
]


@pytest.fixture(scope="module")
def build() -> Iterator[Any]:
    """Makes a trainer of the small experiment with all weights awake, and its packs."""
    from dfmspec.spec.experiment import Experiment
    from dfmspec.trainer import setup
    from dfmspec.trainer.data.streams import RankStreams
    from tests.trainer.parity_worker import wake

    setup.initialize_distributed(Experiment.model_validate(parity.gpu_experiment({}, bf16=True, iterations=8)))

    def make(
        bf16: bool = True,
        length: int = 344,
        resolution: int = 128,
        fp8: str | None = None,
        ddp: dict[str, Any] | None = None,
        **model: Any,
    ) -> tuple[Any, Any]:
        made = parity.gpu_experiment(model, bf16=bf16, iterations=8)
        made["mixed_precision"]["fp8"] = fp8
        made["ddp"] |= ddp or {}
        made["data"]["resolution"] = resolution
        made["model"]["seq_length"] = made["dataset"]["task_encoder_seq_length"] = length
        experiment = Experiment.model_validate(made)
        trainer = setup.build_trainer(experiment)
        wake(trainer.chunks)
        trainer.optimizer.reload_model_params()
        return trainer, RankStreams(experiment, "train", rank=0, size=1)

    yield make
    torch.distributed.destroy_process_group()


def run(
    trainer: Any, packs: Any, iterations: int = 5
) -> tuple[list[tuple[float, float, float]], dict[str, torch.Tensor]]:
    from dfmspec.trainer import step
    from dfmspec.trainer.data.microbatch import microbatches

    batches = microbatches(trainer.experiment, packs)
    values = [step.train_step(trainer, batches, i).values(i) for i in range(1, iterations + 1)]
    trainer.ema.wait()
    return values, {name: weight.detach().clone() for name, weight in trainer.chunks[0].named_parameters()}


def assert_close(one: Any, other: Any, limit: float) -> None:
    for values, others in zip(one[0], other[0], strict=True):
        assert values == pytest.approx(others, rel=limit)
    for name, weight in one[1].items():
        assert (weight.float() - other[1][name].float()).norm() <= limit * weight.float().norm(), name


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_the_fused_update_is_megatrons_own_step(bf16: bool, build: Any) -> None:
    from dfmspec.trainer.optim.update import FusedUpdate

    fused, packs = build(bf16=bf16)
    assert isinstance(fused.update, FusedUpdate)
    plain, same_packs = build(bf16=bf16)

    def megatrons() -> torch.Tensor:
        _, norm, _ = plain.optimizer.step()
        plain.optimizer.zero_grad()
        return torch.tensor(norm)

    plain.update = megatrons
    assert_close(run(plain, same_packs), run(fused, packs), 2e-3 if bf16 else 1e-5)


def test_gradients_that_are_summed_in_bf16_are_those_of_their_iteration(build: Any) -> None:
    from dfmspec.trainer.optim.update import FusedUpdate

    halves, packs = build(ddp={"grad_reduce_in_fp32": False})
    assert not isinstance(halves.update, FusedUpdate)  # which takes the addresses of fp32 buffers once
    assert_close(run(*build()), run(halves, packs), 2e-2)


@pytest.mark.parametrize(
    ("length", "resolution"),
    [(64, 128), (320, 128), (344, 128), (1024, 256), (4096, 512), (2300, 512)],
    ids=["one short", "short", "short, with padding", "medium", "long", "long, with padding"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_change_nothing(length: int, resolution: int, backend: str, build: Any) -> None:
    from dfmspec.trainer import step

    plain, packs = build(length=length, resolution=resolution, attention_backend=backend)
    expected = run(plain, packs)
    graphed, packs = build(length=length, resolution=resolution, attention_backend=backend)
    graphed.graphs = step.graphed(graphed)
    got = run(graphed, packs)

    assert {how for _, how in graphed.graphs._graphs} == {
        (True,),
        (False,),
    }  # the first microbatch's gradients replace, the others' are added
    assert_close(expected, got, 2e-3)


@pytest.mark.parametrize("options", [{"bf16": False}, {"deterministic_mode": True}, {}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_is_not_replayed_for_other_lengths_than_it_can_hold(
    options: dict[str, Any], backend: str, build: Any
) -> None:
    """Two packs of the same sizes whose segments end elsewhere, in turns.

    torch's attention, which stands in for cuDNN's in fp32 and where bits must repeat, cuts by numbers of the host.
    """
    from dfmspec.trainer import step

    plain, _ = build(attention_backend=backend, **options)
    expected = run(plain, mixed_packs())
    graphed, _ = build(attention_backend=backend, **options)
    graphed.graphs = step.graphed(graphed)
    got = run(graphed, mixed_packs())

    assert graphed.graphs._graphs
    assert_close(expected, got, 2e-3)


def mixed_packs() -> Iterator[tuple[Any, ...]]:
    """Packs of 256 tokens and 26 of text, of two kinds in turns."""
    from dfmspec.trainer.data.microbatch import DrawnSample
    from dfmspec.trainer.noise import draw

    generator, ordinal = torch.Generator().manual_seed(0), count()
    kinds = (((10, 10, 5), (8, 9, 6), (8, 8, 7), (5, 4, 8)), ((9, 10, 8), (8, 10, 7), (8, 8, 6), (2, 11, 5)))
    for kind in cycle(kinds):
        samples = []
        for height, width, text in kind:
            shape, number = (16, 1, 2 * height, 2 * width), next(ordinal)
            drawn = draw(shape, seed=1, split="train", stream=0, ordinal=number, p_mean=0.0, p_std=1.0, dropout=0.2)
            samples.append(
                DrawnSample(
                    str(number),
                    torch.randn(shape, generator=generator),
                    torch.randn(text, 64, generator=generator),
                    drawn,
                )
            )
        yield tuple(samples)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone_and_stops(build: Any) -> None:
    from dfmspec.errors import TrainingError
    from dfmspec.trainer import step
    from dfmspec.trainer.data.microbatch import microbatches

    trainer, packs = build()
    run(trainer, packs, 1)
    before = {name: weight.detach().clone() for name, weight in trainer.chunks[0].named_parameters()}
    batch = [next(microbatches(trainer.experiment, packs)) for _ in range(8)]
    batch[3].y.fill_(float("nan"))

    with pytest.raises(TrainingError, match="iteration 2: loss nan"):
        step.train_step(trainer, iter(batch), 2).values(2)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.chunks[0].named_parameters())


def test_recomputing_blocks_changes_no_gradient(build: Any) -> None:
    plain, packs = build()
    expected = run(plain, packs)
    recomputing, packs = build(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)

    assert_close(expected, run(recomputing, packs), 2e-3)


def test_fp8_stays_near_bf16(build: Any) -> None:
    """In a network whose blocks matter: the noise level opens their gates wide."""
    losses = []
    for options in ({}, {"fp8": "hybrid"}):
        trainer, packs = build(length=352, **options)
        with torch.no_grad():
            for name, weight in trainer.chunks[0].named_parameters():
                if "adaln.up" in name or "noise_embedding.linear_2" in name:
                    weight.mul_(10)
        trainer.optimizer.reload_model_params()
        losses.append(torch.tensor([loss for loss, _, _ in run(trainer, packs, 8)[0]]))

    assert 1e-6 < (losses[1] / losses[0] - 1).abs().max() < 2e-3
