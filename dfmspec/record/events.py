"""events.jsonl: one JSON object a line, written by rank 0 while it trains, or by the supervisor of a script.

The types, and what each has beside `type` and `time`, in seconds since the epoch:

- started: iteration, train_iters, attempt, seconds of the start's stages
- iteration: iteration, loss (null: it was no number), grad_norm, lr, seconds, tokens_per_second; of our trainer padding
  (a share of the packs); of a script loss_scale, skipped and nan (iterations since the last line that made no step)
- evaluation: iteration, loss (null: it was not finite); of a script split (validation, or test at its end)
- checkpoint: iteration, path, seconds; of our trainer manifest_digest, blocked
- save_failed: iteration, error
- stopped and finished: iteration, signal
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dfmspec.record.files import json_object

Event = dict[str, Any]

_NUMBER = (int, float)
_NEEDED: dict[str, dict[str, Any]] = {
    "started": {"iteration": int, "train_iters": int},
    "iteration": {
        "iteration": int,
        "loss": (*_NUMBER, type(None)),
        "seconds": _NUMBER,
        "tokens_per_second": _NUMBER,
    },
    "evaluation": {"iteration": int, "loss": (*_NUMBER, type(None))},
    "checkpoint": {"iteration": int, "path": str},
    "save_failed": {"iteration": int},
    "stopped": {"iteration": int},
    "finished": {"iteration": int},
}
"""The fields without which an event of a type is none."""
_OPTIONAL: dict[str, Any] = {
    "attempt": (int, type(None)),
    "lr": _NUMBER,
    "grad_norm": _NUMBER,
    "skipped": _NUMBER,
    "nan": _NUMBER,
    "manifest_digest": str,
    "padding": _NUMBER,
    "seconds": (*_NUMBER, dict),
    "split": str,
    "signal": (int, type(None)),
}
"""Fields that came with later versions, or that not every event of a type has."""


def needed_fields() -> dict[str, dict[str, Any]]:
    """Each type of event, and the Python types of the fields without which it is none."""
    return _NEEDED


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


def evaluation_losses(events: Sequence[Event]) -> list[float | None]:
    """The losses of evaluations on the validation split, in order; None: one was not finite."""
    evaluations = [event for event in events if event["type"] == "evaluation"]
    return [event["loss"] for event in evaluations if event.get("split", "validation") == "validation"]


def _is_event(event: Event) -> bool:
    """Whether an object has what an event of its type needs, each of its kind."""
    kind = event.get("type")
    if not isinstance(kind, str) or kind not in _NEEDED:
        return False
    present = {name: of_kind for name, of_kind in _OPTIONAL.items() if name in event}
    expected = {"time": _NUMBER, **present, **_NEEDED[kind]}
    return all(name in event and _is_a(event[name], of_kind) for name, of_kind in expected.items())


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; true and false are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def events_of_attempt(of_the_run: Sequence[Event], attempt: int) -> list[Event]:
    """The events of one attempt: from its `started` to the next one's."""
    found: list[Event] = []
    of_the_attempt = False
    for event in of_the_run:
        if event["type"] == "started":
            of_the_attempt = event.get("attempt") == attempt
        if of_the_attempt:
            found.append(event)
    return found
