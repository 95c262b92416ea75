"""Every layout on GPUs gives the numbers of one GPU, fifty iterations from a checkpointed start, in fp32 and in bf16.

The layouts with CUDA graphs where a run has them, the one GPU without.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import once
from tests.trainer import parity

pytestmark = pytest.mark.gpu

START, LAST = 2, 52
GPUS = torch.cuda.device_count()
LAYOUTS = [name for name in parity.CUTS if name != "one" and parity.ranks(name) <= GPUS]
PRECISIONS = {"fp32": parity.FP32, "bf16": parity.BF16}


def made(layout: str, precision: str, last: int) -> dict[str, Any]:
    """With as many layers and packs as the largest layout here needs."""
    layers, packs = 8 if GPUS > 2 else 4, 8 if GPUS > 4 else 4
    experiment = parity.gpu_experiment(
        parity.CUTS[layout], bf16=precision == "bf16", iterations=LAST, layers=layers, packs=packs
    )
    return experiment | {"train": experiment["train"] | {"train_iters": last}}


def reference(shared: Path, precision: str) -> tuple[Path, list[dict[str, Any]]]:
    """The checkpoint that every layout sets out from, and what one GPU makes of it."""
    start = shared / f"start_{precision}"
    checkpoint = start / f"iter_{START:07d}"

    def train(one: Path) -> None:
        jobs = [
            parity.Job("one", start, made("one", precision, START), save=True),
            parity.Job("one", one, made("one", precision, LAST), start=checkpoint),
        ]
        said = parity.run_all(jobs)
        assert not said, said

    return checkpoint, parity.records(once(shared / f"one_{precision}", train))


@pytest.fixture(scope="session")
def runs(shared: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """The records of a layout in a precision.

    All layouts of as many ranks run when one of them is asked for, in the same processes.
    One test process has all of a precision (`--dist loadgroup`).
    """

    @cache
    def of_ranks(count: int, precision: str) -> Callable[[str], list[dict[str, Any]]]:
        checkpoint, _ = reference(shared, precision)
        chosen = [layout for layout in LAYOUTS if parity.ranks(layout) == count]
        return parity.together(
            [
                parity.Job(
                    layout,
                    shared / f"{layout}_{precision}",
                    made(layout, precision, LAST),
                    start=checkpoint,
                    graphs=True,
                )
                for layout in chosen
            ]
        )

    return lambda layout, precision: of_ranks(parity.ranks(layout), precision)(layout)


def say(name: str, difference: parity.Difference) -> None:
    """A line for the tables in docs/measurements."""
    if out := os.environ.get("PARITY_TABLE"):
        with Path(out).open("a") as table:
            table.write(json.dumps({"layout": name, **vars(difference)}) + "\n")


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        pytest.param(layout, precision, marks=pytest.mark.xdist_group(precision))
        for precision in PRECISIONS
        for layout in LAYOUTS
    ],
)
def test_a_layout_agrees_with_one_gpu(
    layout: str, precision: str, shared: Path, runs: Callable[[str, str], list[dict[str, Any]]]
) -> None:
    _, one = reference(shared, precision)
    difference = parity.compare(one, runs(layout, precision))
    say(f"{layout} {precision}", difference)

    assert difference.agrees(PRECISIONS[precision]), difference


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize(("layout", "fault"), parity.FAULTS)
def test_a_fault_of_the_upstream_is_caught(layout: str, fault: str, shared: Path, tmp_path: Path) -> None:
    checkpoint, one = reference(shared, "fp32")
    other = parity.run(layout, tmp_path / layout, fault, made(layout, "fp32", START + 4), start=checkpoint)
    difference = parity.compare(one, other)
    say(f"{layout} fp32, {fault}", difference)

    assert not difference.agrees()
    assert difference.gradient > 100 * parity.FP32.gradient
