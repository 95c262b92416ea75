"""NVIDIA DFM at 7cb7634 as it is installed: where it is, its code by digests, and versions that do not go together.

The digests were made from the three repositories at the revisions that DFM pins; what fails together was seen with
real runs.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from dfmspec.targets import Source, Together, Upstream
from dfmspec.targets.dfm.log import told

_PACKAGES = (
    Source(
        "NVIDIA DFM",
        "7cb7634",
        "dfm",
        "9e30f125576d0358ddcefad68f6aa5ea840b71d92ec288edb60d5de667207f2c",
    ),
    Source(
        "Megatron-Bridge",
        "953aabf7",
        "megatron.bridge",
        "9dc599aea38d9262985f965a5b22b33b1da42b7994a9d2a4e641d51ba202e6d1",
    ),
    Source(
        "megatron-core",
        "2d398b42",
        "megatron.core",
        "87b9bce2d05a8788cce6cce1ff6ee7746be493134986a81e7eefeb6098093aa9",
    ),
)
_SCRIPTS = {
    "dit": "2c4f421c760aedd379c8f2bbc70af156fa4aed9e90af6b611f2c845246ee67ca",
    "wan": "95ea03d659e06f91bba7ee1cd0c85b4b7ca8805f7eab7973644e7b953157bac4",
    "flux": "41f6d8323434c002e96d8d45c1200e152c31bb21600635bd67e2639a686fb9d7",
}
"""Folder of a script -> sha256 of the script."""
_TOGETHER = (
    Together(
        "megatron-energon",
        "6.",
        needs=("multi-storage-client<1",),
        mends="'multi-storage-client<1'",
        why='the first batch fails: profile "default" is not found',
        with_data=True,
    ),
    Together(
        "megatron-energon",
        "6.",
        needs=("av", "bitstring", "ebmlite", "soundfile"),
        mends="'megatron-energon[av_decode]<7'",
        why="the first batch fails: AV decoding is not available",
        with_data=True,
    ),
)


def upstream_of(script: str) -> Upstream:
    """What is known of one of DFM's scripts, by its path in the checkout."""
    source = Source("its script", "7cb7634", script, _SCRIPTS[PurePosixPath(script).parent.name])
    return Upstream(
        name="NVIDIA DFM",
        variable="DFM_ROOT",
        root="/opt/DFM",
        sources=(*_PACKAGES, source),
        together=_TOGETHER,
        handler="megatron.bridge.training.utils.sig_utils:DistributedSignalHandler",
        told=told,
    )
