"""A damaged line of events.jsonl is a line that was cut short."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dfmspec.record.events import read_events
from tests.record.made import event

WHOLE = [
    event("started", 0, train_iters=8, attempt=1, seconds={"imports": 1.0}),
    event("iteration", 1, loss=1.0, grad_norm=0.1, lr=1e-4, seconds=0.1, tokens_per_second=1.0, padding=0.0),
    event("evaluation", 1, loss=None),
    event("checkpoint", 1, path="/x/iter_0000001", seconds=0.1, blocked=0.1),
    event("save_failed", 1, error="full"),
    event("finished", 1, signal=0),
]


@pytest.mark.parametrize("line", WHOLE, ids=[json.loads(line)["type"] for line in WHOLE])
def test_an_event_is_read_as_it_was_written(line: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(line)

    assert read_events(tmp_path / "events.jsonl") == [json.loads(line)]


@pytest.mark.parametrize(
    "line",
    [
        event("iteration", 1, lnss=1.0, seconds=0.1, tokens_per_second=1.0),
        event("iteration", 1, loss="1.0", seconds=0.1, tokens_per_second=1.0),
        event("iteration", 1, loss=True, seconds=0.1, tokens_per_second=1.0),
        event("started", 0, train_iters=8, attempt=[]),
        event("checkpoint", 1, path=3),
        event("surprise", 1),
        '{"type": ["started"], "time": 1, "iteration": 0}\n',
        '{"type": "finished", "iteration": 1}\n',
        "[" * 100_000 + "\n",
        "[]\n",
        "\n",
    ],
)
def test_what_lacks_a_field_or_has_another_kind_is_none(line: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(line + WHOLE[0])

    assert read_events(tmp_path / "events.jsonl") == [json.loads(WHOLE[0])]


def test_a_flipped_bit_costs_one_line_at_most(tmp_path: Path) -> None:
    """200 of them: every other line is read as it was."""
    rng = random.Random(0)
    whole = "".join(WHOLE).encode()
    expected = [json.loads(line) for line in WHOLE]
    file = tmp_path / "events.jsonl"
    for _ in range(200):
        place = rng.randrange(len(whole))
        flipped = whole[place] ^ (1 << rng.randrange(8))
        file.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        found = read_events(file)
        same = [line for line in expected if line in found]
        lost = 2 if whole[place] == ord("\n") else 1  # a line's end holds two together
        assert len(same) >= len(expected) - lost
