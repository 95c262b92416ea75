"""torchrun's options by name, as torch 2.13's own parser has them; and which of them a plan gives."""

from __future__ import annotations

from collections.abc import Sequence

OF_THE_PLAN = (
    "nproc-per-node",
    "nnodes",
    "node-rank",
    "master-addr",
    "master-port",
    "rdzv-backend",
    "rdzv-endpoint",
    "rdzv-id",
    "rdzv-conf",
    "standalone",
    "module",
    "no-python",
    "run-path",
    "log-dir",
    "redirects",
    "tee",
)
"""What the plan says of where and how ranks start, and what the run directory has of them."""
FREE = (
    "max-restarts",
    "monitor-interval",
    "start-method",
    "event-log-handler",
    "role",
    "local-ranks-filter",
    "duplicate-stdout-filters",
    "duplicate-stderr-filters",
    "local-addr",
    "logs-specs",
    "numa-binding",
    "signals-to-handle",
    "shutdown-timeout",
    "virtual-local-rank",
)
"""The others, which a spec may give."""


def options_of(words: Sequence[str]) -> list[str]:
    """`--max-restarts 2` as torchrun's words have it, each option with its value as one word: `--max-restarts=2`."""
    options: list[str] = []
    for word in words:
        is_value = options and not word.startswith("-") and "=" not in options[-1]
        if is_value:
            options[-1] = f"{options[-1]}={word}"
        else:
            options.append(word)
    return options


def name_of(option: str) -> str:
    """The name in an option, with hyphens: torchrun takes both."""
    return option.partition("=")[0].removeprefix("--").replace("_", "-")
