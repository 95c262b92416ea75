"""Keys under the names that other versions of a target's code have for them: what `fix --upgrade` writes anew.

A table a revision of the catalogue: the name of another version, and the name at this one. Sources: Megatron-Bridge
training/config.py at DFM's pin and in 0.6, where the evaluation's keys have a section of their own; the how-to's words.
"""

from __future__ import annotations

from collections.abc import Mapping

_EVALUATION = {
    "validation.eval_interval": "train.eval_interval",
    "validation.eval_iters": "train.eval_iters",
}
RENAMES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("megatron_core", "0.16.1"): _EVALUATION,
    ("dfm", "7cb7634"): _EVALUATION,
    ("dfm_wan", "7cb7634"): _EVALUATION,
    ("dfm_flux", "7cb7634"): _EVALUATION,
}
"""(target, revision) -> key of another version -> key at the revision."""
