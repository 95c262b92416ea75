"""PIP: pipeline stages, and what only a pipeline can use."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import (
    DFM,
    DFM_DIT,
    ERROR,
    GBS,
    LAYERS,
    MBS,
    OURS,
    PP,
    VPP,
    Rule,
    View,
    excludes,
    must_divide,
    path,
)
from dfmspec.diagnostics import Finding
from dfmspec.targets.layout import divisors

_OVERLAP = "ddp.overlap_grad_reduce"
_SPLITS = (
    "model.num_layers_in_first_pipeline_stage",
    "model.num_layers_in_last_pipeline_stage",
    "model.account_for_embedding_in_pipeline_split",
    "model.account_for_loss_in_pipeline_split",
    "model.pipeline_model_parallel_layout",
)
_DEFER = ("model.defer_embedding_wgrad_compute", "comm_overlap.defer_embedding_wgrad_compute")
_P2P = ("model.overlap_p2p_comm", "model.overlap_p2p_comm_warmup_flush", "comm_overlap.overlap_p2p_comm")


def _virtual_stages(view: View) -> Iterator[Finding]:
    vpp = view[VPP]
    pp = view[PP]
    layers = view[LAYERS]
    # Interleaving deals each stage several pieces of the model.
    if pp == 1:
        message = f"VPP {vpp} needs a pipeline, but PP is 1"
        yield Finding(path(VPP), message, "set model.pipeline_model_parallel_size, or remove it")
    elif vpp == 1:
        yield Finding(path(VPP), "VPP 1 is no interleaving, and megatron-core refuses it", "remove it")
    # The pieces are equal.
    elif layers % (pp * vpp):
        pieces = pp * vpp
        message = f"{layers} layers are not a multiple of PP {pp} x VPP {vpp} = {pieces}"
        yield Finding(path(VPP), message, _pieces_that_work(layers, pp))
    # The stages take turns, so a round of microbatches must reach all of them.
    else:
        batch = view[GBS]
        samples = view[MBS] * view.data_parallel_size
        microbatches = batch // samples
        if microbatches % pp:
            round_of_all = samples * pp
            yield Finding(
                path(VPP),
                f"interleaving needs microbatches in multiples of PP {pp}; an iteration has {microbatches}",
                f"train.global_batch_size {round_of_all} or a multiple",
            )


def _pieces_that_work(layers: int, stages: int) -> str:
    """What VPP may be, as a hint."""
    if layers % stages:
        return "see PIP101"
    if layers == stages:
        return "remove it"
    works = ", ".join(str(pieces) for pieces in divisors(layers // stages) if pieces > 1)
    return f"VPP may be {works}"


def _splits(view: View) -> list[str]:
    """The keys with which a person shares out layers; false is what they are anyway."""
    return [key for key in view.set_by_user(*_SPLITS) if view[key] is not False]


def _overlaps(view: View) -> list[str]:
    return [key for key in view.set_by_user(*_P2P) if view[key]]


def _deferrals(view: View) -> list[str]:
    return [key for key in view.set_by_user(*_DEFER) if view[key]]


def _offloading(view: View) -> Iterator[Finding]:
    key = "model.cpu_offloading"
    count = "model.cpu_offloading_num_layers"
    granularity = "model.recompute_granularity"
    if not view[key]:
        return
    # The last layer's activations are needed at once.
    if not 0 <= view[count] < view[LAYERS]:
        most = view[LAYERS] - 1
        message = f"{count} {view[count]} is not between 0 and {most}, one less than the layers"
        yield Finding(path(count), message, f"at most {most}")
    # What is computed again is not kept, so there is nothing to move.
    if view.or_null(granularity) is not None:
        message = f"{key} does not work with recompute_granularity {view[granularity]}"
        yield Finding(path(key), message, "use one of the two")


_TC = "megatron-core transformer/transformer_config.py, __post_init__"

RULES = (
    # What the stages share out equally.
    Rule(
        "PIP101",
        "layers-not-divisible",
        ERROR,
        must_divide(
            PP,
            LAYERS,
            words="each pipeline stage gets the same number of layers",
        ),
        "megatron-core asserts equal stages when the model is built.",
        "megatron-core transformer/transformer_block.py, get_num_layers_to_build",
        targets=OURS,
    ),
    Rule(
        "PIP102",
        "virtual-pipeline-impossible",
        ERROR,
        _virtual_stages,
        "megatron-core raises or asserts when the model is built, or in the first iteration.",
        "megatron-core parallel_state.py and pipeline_parallel/schedules.py",
        targets=OURS,
    ),
    # What does not work beside a pipeline.
    Rule(
        "PIP103",
        "pipeline-on-dfm",
        ERROR,
        excludes(
            lambda v: v[PP] > 1 or v.or_null(VPP) is not None,
            at=lambda v: PP if v[PP] > 1 else VPP,
            message=(
                "DFM's DiT does not work with pipeline parallelism: embedders are not synchronised and evaluation fails"
            ),
            hint="use TP, or target: megatron_core, whose pipeline gives the numbers of one process",
        ),
        (
            "Accepted at start; then stages receive buffers of the wrong size, draw different condition masks, "
            "and grow apart in silence. VPP fails at any PP."
        ),
        "NVIDIA DFM model/dit/dit_model.py, dit_step.py, edm/edm_pipeline.py; its table of parallelism lists no PP",
        targets=DFM_DIT,
    ),
    Rule(
        "PIP104",
        "overlap-with-pipeline",
        ERROR,
        excludes(
            lambda v: v[_OVERLAP] and v[PP] > 1,
            at=_OVERLAP,
            message=(
                "with a pipeline, the noise embedding's gradients are summed over stages before they are reduced, "
                "which overlap_grad_reduce prevents"
            ),
            hint="set ddp.overlap_grad_reduce to false, or model.pipeline_model_parallel_size to 1",
        ),
        "The copies of the noise embedding on the stages would grow apart.",
        "dfmspec/trainer/optim/gradients.py",
        targets=OURS,
    ),
    # What only a pipeline can use.
    Rule(
        "PIP105",
        "pipeline-split-without-pipeline",
        ERROR,
        excludes(
            _splits,
            at=lambda v: _splits(v)[0],
            message="this key shares layers out over pipeline stages, and DFM's DiT has one stage",
            hint="remove it",
        ),
        (
            "With one stage, megatron-core checks little and builds fewer layers than num_layers in silence, "
            "or refuses the arithmetic."
        ),
        _TC,
        targets=DFM,
    ),
    Rule(
        "PIP106",
        "pipeline-overlap-without-pipeline",
        ERROR,
        excludes(
            _overlaps,
            at=lambda v: _overlaps(v)[0],
            message="this key overlaps messages between pipeline stages, and DFM's DiT has one stage",
            hint="remove it",
        ),
        "Accepted without effect, or refused when overlap_p2p_comm and batch_p2p_comm do not fit.",
        "megatron-core model_parallel_config.py, __post_init__",
        targets=DFM,
    ),
    Rule(
        "PIP107",
        "embedding-deferral-without-pipeline",
        ERROR,
        excludes(
            _deferrals,
            at=lambda v: _deferrals(v)[0],
            message="defer_embedding_wgrad_compute needs a pipeline and a language model's output layer",
            hint="remove it",
        ),
        (
            "megatron-core raises a ValueError when the configuration is built; "
            "with PP it is accepted, and does nothing for a network without a vocabulary."
        ),
        "megatron-core model_parallel_config.py, __post_init__",
        targets=DFM,
    ),
    Rule(
        "PIP108",
        "cpu-offloading-impossible",
        ERROR,
        _offloading,
        "megatron-core raises a ValueError when the configuration is built.",
        _TC,
        targets=DFM,
    ),
)
