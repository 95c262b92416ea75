"""Every layout gives the numbers of one process, and the test can tell when it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import parity

pytestmark = pytest.mark.xdist_group("parity")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """The records of a layout by its name."""
    base = tmp_path_factory.mktemp("parity")
    return parity.together(
        [parity.Job(name, base / name, parity.experiment(cuts)) for name, cuts in parity.LAYOUTS.items()]
    )


@pytest.fixture(scope="module")
def reference(runs: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return runs("one")


@pytest.mark.parametrize("layout", [name for name in parity.LAYOUTS if name != "one"])
def test_a_layout_agrees_with_one_process(
    layout: str, reference: list[dict[str, Any]], runs: Callable[[str], list[dict[str, Any]]]
) -> None:
    """Loss, gradient norm before clipping, every gradient at its full shape; shared parameters bitwise equal."""
    difference = parity.compare(reference, runs(layout))

    assert difference.agrees(), difference


@pytest.mark.long
def test_fp8_agrees_within_its_own_rounding(tmp_path: Path) -> None:
    """Each rank scales what it multiplies, so a layout rounds otherwise; a gradient not summed would be off by half."""

    others = ("tp2", "tp2_sp", "cp2")

    def made(name: str) -> dict[str, Any]:
        experiment = parity.experiment(parity.LAYOUTS[name])
        experiment["model"]["seq_length"] = experiment["dataset"]["task_encoder_seq_length"] = 96
        return experiment | {"mixed_precision": {"bf16": False, "fp8": "hybrid"}}

    found = parity.together([parity.Job(name, tmp_path / name, made(name)) for name in ("one", *others)])
    differences = {name: parity.compare(found("one"), found(name)) for name in others}

    assert all(difference.agrees(parity.Limits(1e-6, 1e-4, 0.15)) for difference in differences.values()), differences


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """The same for four and eight ranks."""
    base = tmp_path_factory.mktemp("large")

    def made(cuts: dict[str, Any]) -> dict[str, Any]:
        few = parity.experiment(cuts | {"num_layers": 8})
        return few | {"train": few["train"] | {"global_batch_size": 8}, "data": few["data"] | {"num_streams": 8}}

    return parity.together(
        [parity.Job(name, base / name, made(cuts)) for name, cuts in ({"one": {}} | parity.LARGE).items()]
    )


@pytest.mark.long
@pytest.mark.parametrize("layout", parity.LARGE)
def test_a_layout_of_many_ranks_agrees_too(layout: str, large: Callable[[str], list[dict[str, Any]]]) -> None:
    difference = parity.compare(large("one"), large(layout))

    assert difference.agrees(), difference


def test_overlapped_reduction_and_gathering_agree_too(reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """The parameters are whole after each step: averages and checkpoints read them.

    A rank has the gradients of its share alone.
    """
    made = parity.experiment(parity.LAYOUTS["dp2"])
    made["ddp"] |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    difference = parity.compare(reference, parity.run("dp2", tmp_path / "dp2", "", made))

    assert difference.loss <= parity.FP32.loss, difference
    assert difference.grad_norm <= parity.FP32.grad_norm, difference
    assert difference.replicas == 0, difference


@pytest.mark.parametrize(("layout", "fault"), parity.FAULTS)
def test_a_fault_of_the_upstream_is_caught(
    layout: str, fault: str, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    """DFM's own faults, injected: the loss alone would pass two of the three."""
    difference = parity.compare(reference, parity.run(layout, tmp_path / layout, fault))

    assert not difference.agrees()
    assert difference.gradient > 100 * parity.FP32.gradient


@pytest.mark.long
def test_layouts_and_one_process_go_on_from_each_others_checkpoints(
    reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Saved after two iterations in one, loaded in the other: the last two are as in the run that changed nothing."""
    layouts = ["pp2_vpp2", "tp2_sp", "cp2"]

    def job(folder: str, layout: str, iterations: int, **options: Any) -> parity.Job:
        return parity.Job(
            layout, tmp_path / folder, parity.experiment(parity.LAYOUTS[layout], train_iters=iterations), **options
        )

    assert not parity.run_all([job(name, name, 2, save=True) for name in ("one", *layouts)])
    pairs = [(first, second) for name in layouts for first, second in (("one", name), (name, "one"))]
    jobs = {
        (first, second): job(f"{second}_from_{first}", second, 4, start=tmp_path / first / "iter_0000002")
        for first, second in pairs
    }
    assert not parity.run_all(list(jobs.values()))
    expected = [
        record | {key: record[key][2:] for key in ("losses", "grad_norms", "gradients")} for record in reference
    ]

    for pair, each in jobs.items():
        records = parity.records(each.folder)
        assert len(records[0]["losses"]) == 2
        assert parity.compare(expected, records).agrees(), (pair, parity.compare(expected, records))
