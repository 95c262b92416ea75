"""Presets: environment variables that go together, by name, each with its reason. A new one is an entry of PRESETS.

What the variables do: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html.
"""

from __future__ import annotations

from typing import NamedTuple


class Setting(NamedTuple):
    """A variable of a preset."""

    name: str
    value: str
    why: str


_LONGER = Setting(
    "NCCL_IB_TIMEOUT",
    "22",
    "waits 4 us x 2^22, about 17 s, for an answer: a link that comes back is not the end of a run",
)
_VERBS = Setting(
    "NCCL_NET",
    "IB",
    "ends a run that finds no such adapter, where NCCL would go on over sockets, many times slower, without a word",
)

PRESETS = {
    "infiniband": (_VERBS, _LONGER),
    "roce": (
        _VERBS,
        _LONGER,
        Setting(
            "NCCL_IB_GID_INDEX",
            "3",
            "RoCE v2 over IPv4 on most machines (show_gids lists what yours has); another goes into launcher.env",
        ),
    ),
    "ethernet": (
        Setting(
            "NCCL_NET",
            "Socket",
            "plain sockets, whatever adapters there are",
        ),
    ),
    "no_nvls": (
        Setting(
            "NCCL_NVLS_ENABLE",
            "0",
            "no NVLink multicast: its buffers fail or hang where jobs share a host or its fabric manager is old",
        ),
    ),
    "nccl_debug": (
        Setting(
            "NCCL_DEBUG",
            "INFO",
            "what NCCL finds and chooses, in the logs of the ranks; for a trial, since it writes much",
        ),
        Setting(
            "NCCL_DEBUG_SUBSYS",
            "INIT,NET,GRAPH",
            "of that, how it starts, over what it talks and along which rings",
        ),
    ),
}
"""What a spec may name in launcher.env_presets."""


def preset_of(name: str, presets: list[str]) -> tuple[str, Setting] | None:
    """The last of some presets that sets a variable, and how; None where none does."""
    for preset in reversed(presets):
        for setting in PRESETS[preset]:
            if setting.name == name:
                return preset, setting
    return None
