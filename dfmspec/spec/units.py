"""Numbers with a unit, as people write them: 20k iterations, 4h, 1h30m, 512GiB.

A key has the unit that its name or its meaning says (`UNITS`); any other number counts things, and takes k, M and G.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fractions import Fraction

_THOUSANDS = {"k": 1000, "M": 1000**2, "G": 1000**3}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {
    "B": 1,
    **{f"{prefix}B": size for prefix, size in _THOUSANDS.items()},
    "TB": 1000**4,
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}

COUNT = "count"
"""The unit of a key that UNITS does not have."""
SLURM_TIME = "slurm time"
"""A time as Slurm writes it, such as 4:00:00."""
SUFFIXES: Mapping[str, Mapping[str, int]] = {
    COUNT: _THOUSANDS,
    "seconds": _SECONDS,
    "minutes": _SECONDS,
    SLURM_TIME: _SECONDS,
    "bytes": _BYTES,
}
"""Unit of a key -> the suffixes that its numbers may have."""
_EXAMPLES = {
    COUNT: "a number, or one with k, M or G, such as 20k",
    "seconds": "seconds, or a time such as 90s, 30m or 1h30m",
    "minutes": "minutes, or a time such as 30m or 1h30m",
    SLURM_TIME: "a time such as 4h, 1h30m or 2d, or as Slurm writes it, in quotes",
    "bytes": "bytes, or a size such as 512GiB or 80GB",
}
UNITS = {
    "launcher.time_limit": SLURM_TIME,
    "launcher.stop_before": "seconds",
    "dist.distributed_timeout_minutes": "minutes",
    "dist.distributed_timeout_seconds_after_init": "seconds",
    "train.exit_duration_in_mins": "minutes",
    "ft.simulated_fault_base_delay": "seconds",
    "nvrx_straggler.report_time_interval": "seconds",
    "inprocess_restart.barrier_timeout": "seconds",
    "inprocess_restart.completion_timeout": "seconds",
    "inprocess_restart.hard_timeout": "seconds",
    "inprocess_restart.heartbeat_interval": "seconds",
    "inprocess_restart.heartbeat_timeout": "seconds",
    "inprocess_restart.last_call_wait": "seconds",
    "inprocess_restart.monitor_process_interval": "seconds",
    "inprocess_restart.monitor_thread_interval": "seconds",
    "inprocess_restart.progress_watchdog_interval": "seconds",
    "inprocess_restart.soft_timeout": "seconds",
    "inprocess_restart.termination_grace_time": "seconds",
}
"""Key -> its unit; `x-unit` of the catalogues."""
_PART = r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]+)"


def with_unit(text: str, field: Mapping[str, Any]) -> int | float | str | None:
    """The number that a text means for a field, in the field's own unit; None where it has no such unit.

    `20k` is 20000; `1h30m` is 90 for a field in minutes, 5400 for one in seconds, and 1:30:00 for Slurm's time.

    Args:
        text: what a spec has.
        field: the field's entry in a catalogue.
    """
    unit = unit_of(field)
    parts = _parts(text)
    sizes = SUFFIXES[unit]
    if not parts or any(suffix not in sizes for _, suffix in parts):
        return None
    # Most specs have no such number, and need not wait for what adds them exactly.
    from fractions import Fraction

    # Several parts are a time, from the largest on: 1h30m.
    found = [sizes[suffix] for _, suffix in parts]
    if len(parts) > 1 and (sizes is not _SECONDS or found != sorted(set(found), reverse=True)):
        return None
    try:
        total = sum((Fraction(number) * sizes[suffix] for number, suffix in parts), Fraction())
        if unit == SLURM_TIME:
            return _as_slurm_has_it(total)
        return _plain(total / 60 if unit == "minutes" else total)
    except (ValueError, OverflowError):  # more digits than any number of a spec
        return None


def unit_of(field: Mapping[str, Any]) -> str:
    """The unit of a field's numbers."""
    return str(field.get("x-unit", COUNT))


def has_some_unit(text: str) -> bool:
    """Whether a text is a number with a suffix, be it the right one or not."""
    return bool(_parts(text))


def in_words(field: Mapping[str, Any]) -> str:
    """What a field's numbers may be written as, in words."""
    return _EXAMPLES[unit_of(field)]


def pattern_of(unit: str) -> str:
    """A regular expression of the texts that `with_unit` takes, for editors."""
    suffixes = "|".join(SUFFIXES[unit])
    part = rf"[0-9]+(\.[0-9]+)?({suffixes})"
    return rf"^({part})+$" if SUFFIXES[unit] is _SECONDS else rf"^{part}$"


def _parts(text: str) -> list[tuple[str, str]]:
    """The numbers of a text, each with its suffix; none where it is anything else."""
    if not re.fullmatch(f"(?:{_PART})+", text):
        return []
    return re.findall(_PART, text)


def _as_slurm_has_it(seconds: Fraction) -> str:
    """A time as days-hours:minutes:seconds, the days where there are some."""
    minutes, rest = divmod(-(-seconds.numerator // seconds.denominator), 60)  # 0 would be no limit at all
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}"


def _plain(number: Fraction) -> int | float:
    """A whole number as an integer."""
    return int(number) if number.denominator == 1 else float(number)
