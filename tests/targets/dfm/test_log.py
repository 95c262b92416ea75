"""What the lines of NVIDIA DFM's scripts say: of runs on H200s, recorded, and of lines that reach us damaged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dfmspec.targets.dfm.log import told

LOGS = Path(__file__).parent / "logs"
LINE = (LOGS / "dit.log").read_text().partition("\n [")[2].partition("\n")[0]
"""The first iteration of a recorded log, without its first two characters."""


def kinds(name: str) -> list[tuple[str, int | None]]:
    found = [told(line) for line in (LOGS / f"{name}.log").read_text().splitlines()]
    return [(each.kind, each.iteration) for each in found if each is not None]


def test_a_recorded_run_is_read_from_its_first_line_to_its_last() -> None:
    assert kinds("dit") == [
        ("started", 0),
        *(("iteration", iteration) for iteration in (5, 10, 15, 20)),
        ("saving", 20),
        ("saved", 20),
        *(("iteration", iteration) for iteration in (25, 30, 35, 40)),
        ("saving", 40),
        ("saved", 40),
        ("trained", None),
        ("saving", 40),
        ("saved", 40),
    ]


def test_a_stop_by_a_signal_and_what_goes_on_from_it() -> None:
    assert kinds("dit_sigterm")[-3:] == [("saving", 63), ("saved", 63), ("stopped", None)]
    assert kinds("dit_resumed") == [("started", 63), ("iteration", 80), ("iteration", 100)]


def test_iterations_are_the_last_ranks_and_checkpoints_the_firsts() -> None:
    assert {kind for kind, _ in kinds("dit_dp2_rank1")} == {"iteration"}
    assert "iteration" not in {kind for kind, _ in kinds("dit_dp2_rank0")}
    assert [iteration for kind, iteration in kinds("tp2_rank1") if kind == "iteration"] == list(range(2, 21, 2))


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_other_scripts_print_the_same_lines(name: str) -> None:
    assert [iteration for kind, iteration in kinds(name) if kind == "iteration"] == list(range(2, 21, 2))
    assert kinds(name)[-2:] == [("evaluation", 20), ("evaluation", 20)]


def test_the_figures_of_an_iteration() -> None:
    found = told(f" [{LINE}")

    assert found is not None
    assert found.time is not None
    assert found.fields == {
        "loss": 1.275198,
        "seconds": 0.3776,
        "nan": 0,
        "samples": 2,
        "lr": 8.876071e-05,
        "loss_scale": 1.0,
        "grad_norm": found.fields["grad_norm"],
        "skipped": 0.0,
    }
    assert 0 < found.fields["grad_norm"] < 10


def test_a_loss_that_is_no_number_is_left_out_upstream() -> None:
    without = re.sub(r" lm loss: \S+ \|", "", LINE).replace("nan iterations:   0", "nan iterations:   1")
    found = told(without)

    assert found is not None
    assert (found.fields["loss"], found.fields["nan"]) == (None, 1)
    assert told(LINE.replace("1.275198E+00", "NAN")).fields["loss"] is None


@pytest.mark.parametrize(
    "line",
    [
        f"\x1b[32m[{LINE}\x1b[0m",
        f"[default1]: [{LINE}",
        f"[rank1]: [{LINE}",
        f"Step Time : 0.05s GPU utilization: 5.7MODEL_TFLOP/s/GPU [{LINE}Step Time : 0.05s",
    ],
)
def test_other_words_around_a_line_do_not_hide_it(line: str) -> None:
    assert told(line) == told(f" [{LINE}")


def test_a_line_that_was_cut_says_nothing() -> None:
    whole = told(LINE)
    for length in range(len(LINE.rstrip())):
        assert told(LINE[:length]) in (None, whole)
    assert told(LINE[:-20]) is None


def test_words_of_a_configuration_say_nothing() -> None:
    assert told("  exit_signal_handler: true") is None
    assert told("  iteration 5/ 40 | of somebody else") is None
    assert told("") is None
    assert told("loading distributed checkpoint") == told("x")


def test_recorded_logs_name_nobody() -> None:
    for file in LOGS.glob("*.log"):
        found = re.findall(
            r"/root|GPU-[0-9a-f]{8}|\d+\.\d+\.\d+\.\d+|@|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}", file.read_text()
        )
        assert not found, file.name
