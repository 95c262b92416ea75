"""events.jsonl: one JSON object a line, written by rank 0 while it trains.

The types, and what each has beside `type` and `time`, in seconds since the epoch:

- started: iteration, train_iters, attempt, seconds of the start's stages
- iteration: iteration, loss, grad_norm, lr, seconds, tokens_per_second, padding (a share of the packs)
- evaluation: iteration, loss (null: it was not finite)
- checkpoint: iteration, path, manifest_digest, seconds, blocked
- save_failed: iteration, error
- stopped and finished: iteration, signal
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dfmspec.record.files import json_object

Event = dict[str, Any]

_NUMBER = (int, float)
_NEEDED: dict[str, dict[str, Any]] = {
    "started": {"iteration": int, "train_iters": int},
    "iteration": {"iteration": int, "loss": _NUMBER, "seconds": _NUMBER, "tokens_per_second": _NUMBER},
    "evaluation": {"iteration": int, "loss": (*_NUMBER, type(None))},
    "checkpoint": {"iteration": int, "path": str},
    "save_failed": {"iteration": int},
    "stopped": {"iteration": int},
    "finished": {"iteration": int},
}
"""The fields without which an event of a type is none."""
_OPTIONAL: dict[str, Any] = {
    "attempt": (int, type(None)),
    "manifest_digest": str,
    "padding": _NUMBER,
    "seconds": (*_NUMBER, dict),
    "signal": (int, type(None)),
}
"""Fields that came with later versions, or that not every event of a type has."""


def read_events(path: Path, offset: int = 0, kinds: Collection[str] = tuple(_NEEDED)) -> list[Event]:
    """The events after a byte offset, those of some types; a line that was cut short or damaged is left out."""
    try:
        with path.open("rb") as handle:
            handle.seek(offset)
            lines = handle.read().split(b"\n")
    except OSError:  # there is none yet, or it cannot be read
        return []
    events = []
    marks = [f'"{kind}"'.encode() for kind in kinds]
    for line in lines:
        # Of a long run most lines are of one type.
        if not any(mark in line for mark in marks):
            continue
        try:
            event = json_object(line)
        except ValueError:
            continue
        if _is_event(event) and event["type"] in kinds:
            events.append(event)
    return events


def _is_event(event: Event) -> bool:
    """Whether an object has what an event of its type needs, each of its kind."""
    kind = event.get("type")
    if not isinstance(kind, str) or kind not in _NEEDED:
        return False
    present = {name: of_kind for name, of_kind in _OPTIONAL.items() if name in event}
    expected = {"time": _NUMBER, **present, **_NEEDED[kind]}
    return all(_is_a(event.get(name), of_kind) for name, of_kind in expected.items())


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; true and false are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)
