"""What the lines say that NVIDIA DFM's scripts print: Megatron-Bridge's training log at the revision that DFM pins.

Sources: megatron/bridge/training/utils/train_utils.py (iterations), checkpointing.py, eval.py, train.py, pretrain.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from dfmspec.targets import Told

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_MOMENT = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\] ")
_ITERATION = re.compile(r"(?<![a-z] )iteration +(\d+)/ *(\d+) \|(.*) number of nan iterations: +(\d+) \|")
"""From its first field to its last: a line that another rank's cut in two is none."""
_FIELD = re.compile(r" ([A-Za-z][A-Za-z /()]*): +(\S+) \|")
_LOSS = "lm loss"
_FIELDS = {
    "learning rate": "lr",
    "grad norm": "grad_norm",
    "loss scale": "loss_scale",
    "number of skipped iterations": "skipped",
}
"""Upstream's name of a figure -> ours."""
_STARTED = re.compile(r"Starting training loop at iteration (\d+)")
_SAVING = re.compile(r"saving checkpoint at iteration +(\d+) to ")
_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+) to (.+) \[ t ")
_EVALUATED = re.compile(r"validation loss at iteration (\d+)(?: on (\w+) set)? \| lm loss value: (\S+) \|")
_TRAINED = re.compile(r"\[after training is done\] datetime")
_STOPPED = re.compile(r"\[exiting program (after receiving SIGTERM\.|after \S+ minutes|at iteration \d+)\] datetime")
_MISSING = re.compile(r">> '--exit-on-missing-checkpoint' set \.\.\. exiting\. <<")
_RANDOM = re.compile(r"will not load any checkpoints and will start from random")


def told(line: str) -> Told | None:
    """What a line says; None: nothing that a run is judged by.

    Lines of other ranks may stand before or behind it, with a prefix of torchrun's or in colours.
    """
    text = _COLOURS.sub("", line)
    for pattern, meaning in _MEANINGS:
        found = pattern.search(text)
        if found is not None:
            return meaning(found, text)
    return None


def _iteration(found: re.Match[str], text: str) -> Told:
    figures = {}
    seconds = math.nan
    batch = 0
    loss: float | None = None
    for name, value in _FIELD.findall(f"{found[3]} |"):
        number = _number(value)
        if number is None:
            continue
        if name == "elapsed time per iteration (ms)":
            seconds = round(number / 1000, 6)
        elif name == "global batch size":
            batch = int(number)
        elif name == _LOSS:
            loss = number
        elif name in _FIELDS:
            figures[_FIELDS[name]] = number
    fields: dict[str, Any] = {
        # Upstream leaves a loss out that is not above zero, which no NaN is.
        "loss": loss,
        "seconds": seconds,
        "nan": int(found[4]),
        "samples": batch,
        **figures,
    }
    return Told("iteration", int(found[1]), _moment(text), fields)


def _number(text: str) -> float | None:
    """A finite number; None: it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _moment(text: str) -> float | None:
    """Seconds since the epoch, by the clock and the zone of this machine; None: the line does not say."""
    found = _MOMENT.search(text)
    if found is None:
        return None
    try:
        return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").timestamp()
    except ValueError:  # garbled
        return None


def _at(kind: str) -> Callable[[re.Match[str], str], Told]:
    """A line that names an iteration."""
    return lambda found, text: Told(kind, int(found[1]))


def _alone(kind: str) -> Callable[[re.Match[str], str], Told]:
    """A line that says one thing."""
    return lambda found, text: Told(kind)


def _saved(found: re.Match[str], text: str) -> Told:
    return Told("saved", int(found[1]), fields={"path": found[2]})


def _evaluated(found: re.Match[str], text: str) -> Told:
    return Told("evaluation", int(found[1]), fields={"loss": _number(found[3]), "split": found[2] or "validation"})


_MEANINGS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], str], Told]], ...] = (
    (_ITERATION, _iteration),
    (_SAVED, _saved),
    (_SAVING, _at("saving")),
    (_EVALUATED, _evaluated),
    (_STARTED, _at("started")),
    (_TRAINED, _alone("trained")),
    (_STOPPED, _alone("stopped")),
    (_MISSING, _alone("nothing_to_load")),
    (_RANDOM, _alone("random_weights")),
)
"""In this order, for a long run has mostly lines of the first kind."""
