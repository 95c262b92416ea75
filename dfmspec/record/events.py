"""events.jsonl: one JSON object a line, written by rank 0 while it trains.

The types, and what each has beside `type` and `time`, in seconds since the epoch:

- started: iteration, train_iters, attempt, seconds of the start's stages
- iteration: iteration, loss, grad_norm, lr, seconds, tokens_per_second, padding (a share of the packs)
- evaluation: iteration, loss
- checkpoint: iteration, path, seconds, blocked
- save_failed: iteration, error
- stopped and finished: iteration, signal
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_events(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    """The events after a byte offset; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    with path.open("rb") as handle:
        handle.seek(offset)
        lines = handle.read().split(b"\n")
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "type" in event:
            events.append(event)
    return events
