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


FAULTS = [("tp2_sp", "missing_sequence_parallel_flag"), ("tp2", "unreduced_qk_norm"), ("tp2_sp", "summing_final_gather")]


@pytest.mark.parametrize(("layout", "fault"), FAULTS)
def test_a_fault_of_the_upstream_is_caught(layout: str, fault: str, reference: list[dict[str, Any]], tmp_path: Path) -> None:
    """DFM's own faults, injected: the loss alone would pass two of the three."""
    difference = parity.compare(reference, parity.run(layout, tmp_path / layout, fault))

    assert not difference.agrees()
    assert difference.gradient > 100 * parity.FP32.gradient
