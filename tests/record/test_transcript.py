"""Events made of what ranks print: whole, in order, and the same whenever they are read."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from dfmspec.record.events import Event, read_events
from dfmspec.record.run_dir import RunDir
from dfmspec.record.transcript import Facts, Transcript
from dfmspec.targets.dfm.log import told

LOGS = Path(__file__).parents[1] / "targets" / "dfm" / "logs"


def facts(**other: Any) -> Facts:
    return Facts(told=told, train_iters=40, tokens=1024, saves=True)._replace(**other)


def run_with(folder: Path, *logs: str, attempt: int = 1) -> RunDir:
    """A run directory whose ranks have printed recorded logs."""
    run = RunDir(folder / "run")
    for rank, log in enumerate(logs):
        place = run.attempt(attempt).node(0).rank(rank)
        place.path.mkdir(parents=True)
        place.stdout.write_text((LOGS / f"{log}.log").read_text())
    return run


def without_times(events: list[Event]) -> list[Event]:
    return [{key: value for key, value in event.items() if key not in ("time", "seconds")} for event in events]


def test_a_recorded_run_becomes_the_events_of_a_training(tmp_path: Path) -> None:
    run = run_with(tmp_path, "dit")
    transcript = Transcript(run, 1, 1, 1, facts())
    pid = run.attempt(1).node(0).rank(0).pid
    pid.touch()
    os.utime(pid, (1000, 1000))
    events = transcript.forward(is_live=False, is_last=True)

    assert events == read_events(run.events)
    assert [event["type"] for event in events] == [
        "started", *["iteration"] * 4, "checkpoint", *["iteration"] * 4, "checkpoint", "checkpoint", "finished",
    ]  # fmt: skip
    assert events[1]["tokens_per_second"] == pytest.approx(2 * 1024 / 0.3776, rel=1e-4)
    assert events[5]["path"].endswith("/checkpoints/iter_0000020")
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert transcript.ended == "finished"


def test_the_ranks_of_two_logs_are_put_in_order(tmp_path: Path) -> None:
    run = run_with(tmp_path, "tp2_rank0", "tp2_rank1")
    events = Transcript(run, 1, 2, 1, facts(train_iters=20)).forward(is_live=False, is_last=True)

    assert [(event["type"], event["iteration"]) for event in events][-5:] == [
        ("iteration", 18), ("iteration", 20), ("checkpoint", 20), ("checkpoint", 20), ("finished", 20),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_lines_that_come_in_pieces_give_the_same_events(seed: int, tmp_path: Path) -> None:
    whole = run_with(tmp_path / "whole", "flux")
    expected = Transcript(whole, 1, 1, 1, facts(train_iters=20)).forward(is_live=False, is_last=True)
    pieces = random.Random(seed)
    run = RunDir(tmp_path / "run")
    log = run.attempt(1).node(0).rank(0).stdout
    log.parent.mkdir(parents=True)
    transcript = Transcript(run, 1, 1, 1, facts(train_iters=20))
    text = (LOGS / "flux.log").read_bytes()
    while text:
        taken = pieces.randint(1, 3000)
        with log.open("ab") as file:
            file.write(text[:taken])
        text = text[taken:]
        transcript.forward(is_live=False)
    transcript.forward(is_live=False, is_last=True)

    assert without_times(read_events(run.events)) == without_times(expected)


def test_a_second_reader_makes_the_events_anew_and_leaves_those_of_other_attempts(tmp_path: Path) -> None:
    run = run_with(tmp_path, "dit_sigterm")
    first = Transcript(run, 1, 1, 1, facts()).forward(is_live=False, is_last=True)
    half = RunDir(tmp_path / "run")
    place = half.attempt(2).node(0).rank(0)
    place.path.mkdir(parents=True)
    log = (LOGS / "dit_resumed.log").read_text()
    place.stdout.write_text(log[: len(log) // 2])
    Transcript(run, 2, 1, 1, facts()).forward(is_live=False)
    place.stdout.write_text(log)
    second = Transcript(run, 2, 1, 1, facts()).forward(is_live=False, is_last=True)

    assert read_events(run.events) == [*first, *second]
    assert first[-1]["type"] == "stopped"
    assert first[-1]["iteration"] == 63


def test_the_events_stay_when_the_logs_are_gone(tmp_path: Path) -> None:
    run = run_with(tmp_path, "dit")
    events = Transcript(run, 1, 1, 1, facts()).forward(is_live=False, is_last=True)
    run.attempt(1).node(0).rank(0).stdout.unlink()
    Transcript(run, 1, 1, 1, facts()).forward(is_live=False, is_last=True)

    assert read_events(run.events) == events


def test_a_start_whose_line_is_lost_is_told_by_the_first_iteration(tmp_path: Path) -> None:
    run = run_with(tmp_path, "dit")
    log = run.attempt(1).node(0).rank(0).stdout
    log.write_text(log.read_text().replace("Starting training loop", "Start"))
    events = Transcript(run, 1, 1, 1, facts()).forward(is_live=False, is_last=True)

    assert (events[0]["type"], events[0]["iteration"]) == ("started", 4)
    assert events[1]["iteration"] == 5


def test_a_start_that_is_seen_late_comes_first_all_the_same(tmp_path: Path) -> None:
    run = run_with(tmp_path, "tp2_rank0", "tp2_rank1")
    first = run.attempt(1).node(0).rank(0).stdout
    text = first.read_text()
    first.unlink()
    transcript = Transcript(run, 1, 2, 1, facts(train_iters=20))
    assert transcript.forward(is_live=False) == []
    first.write_text(text.replace("Starting training loop at iteration 0", "Starting training loop at iteration 1"))
    events = transcript.forward(is_live=False, is_last=True)

    assert [(event["type"], event["iteration"]) for event in events][:3] == [
        ("started", 1), ("iteration", 2), ("iteration", 4),
    ]  # fmt: skip


def test_an_end_without_its_last_save_is_none(tmp_path: Path) -> None:
    run = run_with(tmp_path, "dit")
    log = run.attempt(1).node(0).rank(0).stdout
    log.write_text(log.read_text().rpartition("  successfully saved")[0])
    transcript = Transcript(run, 1, 1, 1, facts())
    transcript.forward(is_live=False, is_last=True)

    assert transcript.ended is None


def test_what_is_no_text_and_has_no_end_is_passed_over(tmp_path: Path) -> None:
    run = run_with(tmp_path, "dit")
    log = run.attempt(1).node(0).rank(0).stdout
    log.write_bytes(b"\xff\x00" * 2_000_000 + b"\n" + log.read_bytes())
    events = Transcript(run, 1, 1, 1, facts()).forward(is_live=False, is_last=True)

    assert events[-1]["type"] == "finished"
    assert json.loads(run.events.read_text().splitlines()[0])["type"] == "started"
