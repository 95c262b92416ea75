"""PAR, PIP: how ranks are arranged, and what of the model the arrangement must divide."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from dfmspec.diagnostics import Finding, Severity
from dfmspec.layout import divisors
from dfmspec.rules.base import DFM, OURS, Rule, View, excludes, must_divide, path

TP, PP, CP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size", "model.context_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"


def _world_size(view: View) -> Iterator[Finding]:
    layout = view.layout
    if layout.data_parallel_size:
        return
    world, tp, pp, cp = layout.world_size, view[TP], view[PP], view[CP]
    heads, layers = view["model.num_attention_heads"], view["model.num_layers"]
    triples = [
        f"TP {t} PP {p} CP {c}"
        for t, p, c in product(divisors(world), repeat=3)
        if world % (t * p * c) == 0 and heads % t == 0 and layers % p == 0 and [t, p, c].count(1) + (t == tp) + (p == pp) + (c == cp) >= 3
    ]
    nearest = world // layout.model_parallel_size * layout.model_parallel_size or layout.model_parallel_size
    yield Finding(
        path(TP if view.is_users(TP) else "cluster.nproc_per_node"),
        f"{world} processes are not a multiple of TP {tp} x PP {pp} x CP {cp} = {layout.model_parallel_size}",
        f"use {nearest} processes, or one of: {'; '.join(triples[:6])}",
    )


def _tp_across_nodes(view: View) -> Iterator[Finding]:
    nproc, tp = view["cluster.nproc_per_node"], view[TP]
    if view["cluster.nnodes"] > 1 and nproc % tp:
        yield Finding(
            path(TP), f"TP {tp} does not fit the {nproc} processes of a node, so tensor-parallel groups cross nodes",
            f"TP that stays on a node: {', '.join(map(str, divisors(nproc)))}",
        )  # fmt: skip


def _virtual_stages(view: View) -> Iterator[Finding]:
    vpp, pp, layers = view[VPP], view[PP], view["model.num_layers"]
    if vpp is None:
        return
    if pp == 1:
        yield Finding(path(VPP), f"VPP {vpp} needs a pipeline, but PP is 1", "set model.pipeline_model_parallel_size, or remove it")
    elif vpp == 1:
        yield Finding(path(VPP), "VPP 1 is no interleaving, and megatron-core refuses it", "remove it")
    elif layers % (pp * vpp):
        yield Finding(
            path(VPP), f"{layers} layers are not a multiple of PP {pp} x VPP {vpp} = {pp * vpp}",
            f"VPP may be {', '.join(str(v) for v in divisors(layers // pp) if v > 1)}" if layers % pp == 0 else "see PIP101",
        )  # fmt: skip
    else:
        microbatches = view["train.global_batch_size"] // (view["train.micro_batch_size"] * view.data_parallel_size)
        if microbatches % pp:
            yield Finding(
                path(VPP), f"interleaving needs microbatches in multiples of PP {pp}; an iteration has {microbatches}",
                f"train.global_batch_size {view['train.micro_batch_size'] * view.data_parallel_size * pp} or a multiple",
            )  # fmt: skip


RULES = (
    Rule(
        "PAR101", "world-size-not-divisible", Severity.ERROR, _world_size,
        "Megatron forms data-parallel groups of world_size / (TP x PP x CP) ranks; a remainder leaves ranks without a group.",
        ("cluster.nproc_per_node=4", f"{TP}=3"), ("cluster.nproc_per_node=4", f"{TP}=2"),
    ),
    Rule(
        "PAR102", "heads-not-divisible", Severity.ERROR,
        must_divide(TP, "model.num_attention_heads", words="each tensor-parallel rank needs whole heads"),
        "Attention heads are dealt out whole over the tensor-parallel ranks.",
        ("cluster.nproc_per_node=3", f"{TP}=3"), ("cluster.nproc_per_node=4", f"{TP}=4"),
    ),
    Rule(
        "PAR103", "sequence-parallel-without-tensor-parallel", Severity.ERROR,
        excludes(lambda v: v["model.sequence_parallel"] and v[TP] == 1, at="model.sequence_parallel",
                 message="sequence_parallel cuts activations over the tensor-parallel ranks, but TP is 1",
                 hint="set model.tensor_model_parallel_size to 2 or more, or sequence_parallel to false"),
        "megatron-core refuses the combination when the model is built.",
        ("model.sequence_parallel=true",), ("model.sequence_parallel=true", "cluster.nproc_per_node=2", f"{TP}=2"),
    ),
    Rule(
        "PAR104", "query-groups-not-heads", Severity.ERROR,
        excludes(lambda v: v["model.num_query_groups"] != v["model.num_attention_heads"], at="model.num_query_groups",
                 message="cross-attention has no grouped queries: num_query_groups must equal num_attention_heads",
                 hint="remove model.num_query_groups to have it derived"),
        "megatron-core's cross-attention raises a ValueError when the model is built.",
        ("model.num_query_groups=8",), ("model.num_query_groups=16",),
    ),
    Rule(
        "PAR105", "ffn-not-divisible", Severity.ERROR,
        must_divide(TP, "model.ffn_hidden_size", words="the MLP is cut over the tensor-parallel ranks"),
        "Column- and row-parallel linear layers need equal slices.",
        ("cluster.nproc_per_node=2", f"{TP}=2", "model.ffn_hidden_size=4607"), ("cluster.nproc_per_node=2", f"{TP}=2"),
    ),
    Rule(
        "PAR106", "tensor-parallel-across-nodes", Severity.WARNING, _tp_across_nodes,
        "Tensor-parallel collectives run many times in each layer; over the network they dominate the step.",
        ("cluster.nnodes=2", "cluster.nproc_per_node=2", f"{TP}=4"), ("cluster.nnodes=2", "cluster.nproc_per_node=4", f"{TP}=4"),
    ),
    Rule(
        "PAR107", "context-parallel-unsupported", Severity.ERROR,
        excludes(lambda v: v[CP] > 1, at=CP, message="dfmspec's trainer does not cut sequences over context-parallel ranks yet",
                 hint="use tensor or pipeline parallelism, or target: dfm"),
        "Every rank would compute the whole sequence, and gradients would be counted CP times.",
        ("cluster.nproc_per_node=2", f"{CP}=2"), (f"{CP}=1",), OURS,
    ),
    Rule(
        "PAR108", "sequence-parallel-on-dfm", Severity.WARNING,
        excludes(lambda v: v["model.sequence_parallel"] and v[TP] > 1, at="model.sequence_parallel",
                 message="DFM's DiT does not reduce all gradients under sequence parallelism: replicas drift, and the trunk's gradient is scaled by TP",
                 hint="set it to false, or use target: megatron_core"),
        "Losses look healthy, because clipping and Adam hide the scale; the weights of tensor-parallel ranks grow apart.",
        ("model.sequence_parallel=true", "cluster.nproc_per_node=2", f"{TP}=2"), ("cluster.nproc_per_node=2", f"{TP}=2"), DFM,
    ),
    Rule(
        "PIP101", "layers-not-divisible", Severity.ERROR,
        must_divide(PP, "model.num_layers", words="each pipeline stage gets the same number of layers"),
        "megatron-core asserts equal stages when the model is built.",
        ("cluster.nproc_per_node=3", f"{PP}=3"), ("cluster.nproc_per_node=4", f"{PP}=4"), OURS,
    ),
    Rule(
        "PIP102", "virtual-pipeline-impossible", Severity.ERROR, _virtual_stages,
        "megatron-core raises or asserts when the model is built, or in the first iteration.",
        (f"{VPP}=2",), ("cluster.nproc_per_node=2", f"{PP}=2", f"{VPP}=2", "train.global_batch_size=4"), OURS,
    ),
    Rule(
        "PIP103", "pipeline-on-dfm", Severity.ERROR,
        excludes(lambda v: v[PP] > 1 or v[VPP] is not None, at=PP,
                 message="DFM's DiT does not work with pipeline parallelism: embedders are not synchronised and evaluation fails",
                 hint="use TP, or target: megatron_core, whose pipeline gives the numbers of one process"),
        "Stages receive buffers of the wrong size, draw different condition masks, and grow apart.",
        ("cluster.nproc_per_node=2", f"{PP}=2"), ("cluster.nproc_per_node=2", f"{TP}=2"), DFM,
    ),
    Rule(
        "PIP104", "overlap-with-pipeline", Severity.ERROR,
        excludes(lambda v: v["ddp.overlap_grad_reduce"] and v[PP] > 1, at="ddp.overlap_grad_reduce",
                 message="with a pipeline, the noise embedding's gradients are summed over stages before they are reduced, which overlap_grad_reduce prevents",
                 hint="set ddp.overlap_grad_reduce to false, or model.pipeline_model_parallel_size to 1"),
        "The copies of the noise embedding on the stages would grow apart.",
        ("cluster.nproc_per_node=2", f"{PP}=2", "ddp.overlap_grad_reduce=true"), ("ddp.overlap_grad_reduce=true",), OURS,
    ),
)  # fmt: skip
