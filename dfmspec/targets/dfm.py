"""Target dfm: NVIDIA DFM's own script at 7cb7634, which reads one override file and knows nothing of dfmspec.

Upstream keeps copies of derived values that it never recomputes, so every one is written out; a section that it skips
in silence is never emitted. See references in docs/deviations.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmspec.targets import Derived, Values
from dfmspec.targets.megatron_core import SHARED

ENTRY = "examples/megatron/recipes/dit/pretrain_dit_model.py"

DERIVED: tuple[Derived, ...] = (
    *SHARED,
    Derived(
        "model.qk_layernorm", ("model.tensor_model_parallel_size",), lambda v: v["model.tensor_model_parallel_size"] > 1,
        "TP > 1 needs the q/k norms' gradients reduced",
    ),
)  # fmt: skip
_OURS = ("cluster", "launcher", "run")


def config(values: Values) -> dict[str, Any]:
    """The override file: Megatron-Bridge's sections alone."""
    nested: dict[str, Any] = {}
    for key, value in sorted(values.items()):
        section, dot, field = key.rpartition(".")
        if dot and section not in _OURS and value is not None:
            nested.setdefault(section, {})[field] = value
    return nested


def minimal_arguments(values: Values, origins: Mapping[str, Any]) -> list[str] | None:
    """Never: upstream's defaults need their derived copies set."""
    return None
