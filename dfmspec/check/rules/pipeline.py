"""PIP: pipeline stages, and what only a pipeline can use."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import DFM, DFM_DIT, ERROR, GBS, LAYERS, MBS, OURS, PP, VPP, Rule, View, excludes, must_divide, path
from dfmspec.diagnostics import Finding
from dfmspec.targets.layout import divisors


def _virtual_stages(view: View) -> Iterator[Finding]:
    vpp, pp, layers = view[VPP], view[PP], view[LAYERS]
    if vpp is None:
        return
    if pp == 1:
        yield Finding(path(VPP), f"VPP {vpp} needs a pipeline, but PP is 1", "set model.pipeline_model_parallel_size, or remove it")
    elif vpp == 1:
        yield Finding(path(VPP), "VPP 1 is no interleaving, and megatron-core refuses it", "remove it")
    elif layers % (pp * vpp):
        yield Finding(
            path(VPP), f"{layers} layers are not a multiple of PP {pp} x VPP {vpp} = {pp * vpp}",
            "see PIP101" if layers % pp else "remove it" if layers == pp else f"VPP may be {', '.join(str(v) for v in divisors(layers // pp) if v > 1)}",
        )  # fmt: skip
    else:
        microbatches = view[GBS] // (view[MBS] * view.data_parallel_size)
        if microbatches % pp:
            yield Finding(
                path(VPP), f"interleaving needs microbatches in multiples of PP {pp}; an iteration has {microbatches}",
                f"train.global_batch_size {view[MBS] * view.data_parallel_size * pp} or a multiple",
            )  # fmt: skip


_SPLITS = ("model.num_layers_in_first_pipeline_stage", "model.num_layers_in_last_pipeline_stage", "model.account_for_embedding_in_pipeline_split",
           "model.account_for_loss_in_pipeline_split", "model.pipeline_model_parallel_layout")  # fmt: skip
_DEFER = ("model.defer_embedding_wgrad_compute", "comm_overlap.defer_embedding_wgrad_compute")
_P2P = ("model.overlap_p2p_comm", "model.overlap_p2p_comm_warmup_flush", "comm_overlap.overlap_p2p_comm")


def _offloading(view: View) -> Iterator[Finding]:
    key, count = "model.cpu_offloading", "model.cpu_offloading_num_layers"
    if not view[key]:
        return
    if not 0 <= view[count] < view[LAYERS]:
        yield Finding(path(count), f"{count} {view[count]} is not between 0 and {view[LAYERS] - 1}, one less than the layers", f"at most {view[LAYERS] - 1}")
    if view["model.recompute_granularity"] is not None:
        yield Finding(path(key), f"{key} does not work with recompute_granularity {view['model.recompute_granularity']}", "use one of the two")


_TC = "megatron-core transformer/transformer_config.py, __post_init__"

RULES = (
    Rule(
        "PIP101", "layers-not-divisible", ERROR, must_divide(PP, LAYERS, words="each pipeline stage gets the same number of layers"),
        "megatron-core asserts equal stages when the model is built.", "megatron-core transformer/transformer_block.py, get_num_layers_to_build", OURS,
    ),
    Rule(
        "PIP102", "virtual-pipeline-impossible", ERROR, _virtual_stages,
        "megatron-core raises or asserts when the model is built, or in the first iteration.", "megatron-core parallel_state.py and pipeline_parallel/schedules.py", OURS,
    ),
    Rule(
        "PIP103", "pipeline-on-dfm", ERROR,
        excludes(lambda v: v[PP] > 1 or v[VPP] is not None, at=lambda v: PP if v[PP] > 1 else VPP,
                 message="DFM's DiT does not work with pipeline parallelism: embedders are not synchronised and evaluation fails",
                 hint="use TP, or target: megatron_core, whose pipeline gives the numbers of one process"),
        "Accepted at start; then stages receive buffers of the wrong size, draw different condition masks, and grow apart in silence. VPP fails at any PP.",
        "NVIDIA DFM model/dit/dit_model.py, dit_step.py, edm/edm_pipeline.py; its table of parallelism lists no PP", DFM_DIT,
    ),
    Rule(
        "PIP104", "overlap-with-pipeline", ERROR,
        excludes(lambda v: v["ddp.overlap_grad_reduce"] and v[PP] > 1, at="ddp.overlap_grad_reduce",
                 message="with a pipeline, the noise embedding's gradients are summed over stages before they are reduced, which overlap_grad_reduce prevents",
                 hint="set ddp.overlap_grad_reduce to false, or model.pipeline_model_parallel_size to 1"),
        "The copies of the noise embedding on the stages would grow apart.", "dfmspec/trainer/optim/gradients.py", OURS,
    ),
    Rule(
        "PIP105", "pipeline-split-without-pipeline", ERROR,
        excludes(lambda v: [key for key in v.users(*_SPLITS) if v[key] is not False], at=lambda v: next(key for key in v.users(*_SPLITS) if v[key] is not False),
                 message="this key shares layers out over pipeline stages, and DFM's DiT has one stage", hint="remove it"),
        "With one stage, megatron-core checks little and builds fewer layers than num_layers in silence, or refuses the arithmetic.", _TC, DFM,
    ),
    Rule(
        "PIP106", "pipeline-overlap-without-pipeline", ERROR,
        excludes(lambda v: [key for key in v.users(*_P2P) if v[key]], at=lambda v: next(key for key in v.users(*_P2P) if v[key]),
                 message="this key overlaps messages between pipeline stages, and DFM's DiT has one stage", hint="remove it"),
        "Accepted without effect, or refused when overlap_p2p_comm and batch_p2p_comm do not fit.", "megatron-core model_parallel_config.py, __post_init__", DFM,
    ),
    Rule(
        "PIP107", "embedding-deferral-without-pipeline", ERROR,
        excludes(lambda v: [key for key in v.users(*_DEFER) if v[key]], at=lambda v: next(key for key in v.users(*_DEFER) if v[key]),
                 message="defer_embedding_wgrad_compute needs a pipeline and a language model's output layer", hint="remove it"),
        "megatron-core raises a ValueError when the configuration is built; with PP it is accepted, and does nothing for a network without a vocabulary.", "megatron-core model_parallel_config.py, __post_init__", DFM,
    ),
    Rule(
        "PIP108", "cpu-offloading-impossible", ERROR, _offloading,
        "megatron-core raises a ValueError when the configuration is built.", _TC, DFM,
    ),
)  # fmt: skip
