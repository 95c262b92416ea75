"""Every layout gives the numbers of one process, and the test can tell when it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainer import parity

pytestmark = pytest.mark.xdist_group("parity")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return parity.run("one", tmp_path_factory.mktemp("parity") / "one")


@pytest.mark.parametrize("layout", [name for name in parity.LAYOUTS if name != "one"])
def test_a_layout_agrees_with_one_process(layout: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """Loss, gradient norm before clipping, every gradient at its full shape; shared parameters bitwise equal."""
    difference = parity.compare(reference, parity.run(layout, tmp_path / layout))

    assert difference.agrees(), difference


@pytest.mark.parametrize("layout", ["tp2_sp", "cp2"])
def test_fp8_agrees_within_its_own_rounding(layout: str, tmp_path: Path) -> None:
    """Each rank scales what it multiplies, so a layout rounds otherwise; a gradient that were not summed would be off by half."""

    def made(name: str) -> dict[str, Any]:
        experiment = parity.experiment(parity.LAYOUTS[name])
        experiment["model"]["seq_length"] = experiment["dataset"]["task_encoder_seq_length"] = 96
        return experiment | {"mixed_precision": {"bf16": False, "fp8": "hybrid"}}

    one = parity.run("one", tmp_path / "one", "", made("one"))
    difference = parity.compare(one, parity.run(layout, tmp_path / layout, "", made(layout)))

    assert difference.agrees(parity.Limits(1e-6, 1e-4, 0.15)), difference


@pytest.mark.slow
@pytest.mark.parametrize("layout", parity.LARGE)
def test_a_layout_of_many_ranks_agrees_too(layout: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    def made(name: str) -> dict[str, Any]:
        few = parity.experiment(parity.CUTS[name] | {"num_layers": 8})
        return few | {"train": few["train"] | {"global_batch_size": 8}, "data": few["data"] | {"num_streams": 8}}

    one = tmp_path_factory.getbasetemp() / "one of many"
    if not one.exists():
        parity.run("one", one, "", made("one"))
    difference = parity.compare(parity.records(one), parity.run(layout, tmp_path / layout, "", made(layout)))

    assert difference.agrees(), difference


def test_overlapped_reduction_and_gathering_agree_too(reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """And leave the parameters whole after each step: averages and checkpoints read them. A rank has the gradients of its share alone."""
    made = parity.experiment(parity.LAYOUTS["dp2"])
    made["ddp"] |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    difference = parity.compare(reference, parity.run("dp2", tmp_path / "dp2", "", made))

    assert difference.loss <= parity.FP32.loss and difference.grad_norm <= parity.FP32.grad_norm and difference.replicas == 0, difference


@pytest.mark.parametrize(("layout", "fault"), parity.FAULTS)
def test_a_fault_of_the_upstream_is_caught(layout: str, fault: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """DFM's own faults, injected: the loss alone would pass two of the three."""
    difference = parity.compare(reference, parity.run(layout, tmp_path / layout, fault))

    assert not difference.agrees()
    assert difference.gradient > 100 * parity.FP32.gradient


@pytest.mark.parametrize("layout", ["pp2_vpp2", "tp2_sp", "cp2"])
def test_a_layout_and_one_process_go_on_from_each_others_checkpoints(layout: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """Saved after two iterations in one, loaded in the other: the last two are those of the run that changed nothing."""

    def made(name: str) -> dict[str, Any]:
        return parity.experiment(parity.LAYOUTS[name])

    for first, second in (("one", layout), (layout, "one")):
        short = made(first)
        short["train"]["train_iters"] = 2
        parity.run(first, tmp_path / first, "", short, "--save")
        records = parity.run(second, tmp_path / f"from_{first}", "", made(second), "--from", str(tmp_path / first / "iter_0000002"))
        expected = [{**record, **{key: record[key][2:] for key in ("losses", "grad_norms", "gradients")}} for record in reference]

        assert len(records[0]["losses"]) == 2
        assert parity.compare(expected, records).agrees(), parity.compare(expected, records)
