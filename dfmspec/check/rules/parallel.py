"""PAR: how ranks are arranged, and what of the model the arrangement must divide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from dfmspec.check.rules.base import (
    CP,
    DFM,
    DFM_DIT,
    ERROR,
    FFN,
    HEADS,
    HIDDEN,
    HINT,
    LAYERS,
    LENGTH,
    MBS,
    PP,
    SP,
    TP,
    VPP,
    WARNING,
    Rule,
    UnknownValue,
    View,
    excludes,
    must_divide,
    path,
    together,
)
from dfmspec.diagnostics import Finding
from dfmspec.spec.gpus import GPUS
from dfmspec.targets.layout import divisors

INSTANCES = "ddp.num_distributed_optimizer_instances"

_NPROC = "cluster.nproc_per_node"
_SHARP = "dist.use_sharp"
_SHARP_GROUP = "dist.sharp_enabled_group"
_QUERY_GROUPS = "model.num_query_groups"
_OVERLAPS = ("ddp.overlap_grad_reduce", "ddp.overlap_param_gather")
_DENSE = {
    "model.num_moe_experts": None,
    "model.expert_model_parallel_size": 1,
    "model.moe_ffn_hidden_size": None,
}
"""What the keys of experts are in a network without any."""


def _world_size(view: View) -> Iterator[Finding]:
    layout = view.layout
    if layout.data_parallel_size:
        return
    world = layout.world_size
    model_parallel = layout.model_parallel_size
    tp: int = view[TP]
    pp: int = view[PP]
    cp: int = view[CP]

    def distance(sizes: tuple[int, int, int]) -> int:
        return abs(sizes[0] - tp) + abs(sizes[1] - pp) + abs(sizes[2] - cp)

    # What works: fewer processes, or another layout, the most similar ones first.
    nearest = world // model_parallel * model_parallel or model_parallel
    hint = f"use {nearest} processes"
    try:
        fits = sorted(_legal_sizes(view, world), key=lambda sizes: (distance(sizes), sizes))
    except UnknownValue:  # what else the sizes must divide is not known
        view.missed.clear()
    else:
        triples = "; ".join(f"TP {t} PP {p} CP {c}" for t, p, c in fits[:6])
        hint += f", or one of: {triples}"
    yield Finding(
        path(TP if view.is_set_by_user(TP) else _NPROC),
        f"{world} processes are not a multiple of TP {tp} x PP {pp} x CP {cp} = {model_parallel}",
        hint,
    )


def _legal_sizes(view: View, world: int) -> list[tuple[int, int, int]]:
    """Every (TP, PP, CP) that a number of processes and the model allow."""
    heads = view[HEADS]
    ffn = view[FFN]
    layers = view[LAYERS]
    tokens = (view.or_null(LENGTH) or 0) * view[MBS]
    sequence_parallel = view[SP]
    has_pipeline = view.trainer.HAS_PIPELINE
    interleaved = view.or_null(VPP) is not None

    found = []
    for t, p, c in product(divisors(world), repeat=3):
        # Most triples end here.
        if world % (t * p * c):
            continue
        # What is cut into equal parts.
        pieces = c * t if sequence_parallel else c
        remainders = (heads % t, ffn % t, layers % p, tokens % pieces)
        # What needs a size above 1, or cannot have one.
        sequence_parallel_needs_tp = sequence_parallel and t == 1
        interleaving_needs_stages = has_pipeline and interleaved and p == 1
        one_stage_only = not has_pipeline and p > 1
        refused = sequence_parallel_needs_tp or interleaving_needs_stages or one_stage_only
        if not any(remainders) and not refused:
            found.append((t, p, c))
    return found


def _comma(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


_MLP = must_divide(TP, FFN, words="the MLP is cut over the tensor-parallel ranks")


def _mlp_divides(view: View) -> Iterator[Finding]:
    # A TP that does not divide the heads is told once.
    if view[HEADS] % view[TP] == 0:
        yield from _MLP(view)


def _within_a_rack(view: View, ranks: int) -> bool:
    """Whether NVLink joins so many ranks over the nodes of a rack."""
    gpu = GPUS.get(view.or_null("cluster.gpu"))
    return gpu is not None and gpu.per_node < gpu.nvlink_domain and ranks <= gpu.nvlink_domain


def _too_many_for_a_node(view: View) -> Iterator[Finding]:
    gpu = GPUS[view["cluster.gpu"]]
    nproc = view[_NPROC]
    if view["cluster.device"] == "cuda" and nproc > gpu.per_node:
        yield Finding(
            path(view.key_set_by_user(_NPROC, otherwise="cluster.gpu")),
            f"{nproc} processes on a node, one a GPU, and {gpu.machine} has {gpu.per_node} at most",
            f"{_NPROC} {gpu.per_node} or fewer, and more cluster.nnodes",
        )


def _tp_across_nodes(view: View) -> Iterator[Finding]:
    nproc = view[_NPROC]
    tp = view[TP]
    if view["cluster.nnodes"] > 1 and nproc % tp and not _within_a_rack(view, tp):
        works = _comma(divisors(nproc))
        yield Finding(
            path(TP),
            f"TP {tp} does not fit the {nproc} processes of a node, so tensor-parallel groups cross nodes",
            f"TP that stays on a node: {works}",
        )


def _cp_across_nodes(view: View) -> Iterator[Finding]:
    nproc = view[_NPROC]
    tp = view[TP]
    cp = view[CP]
    ranks = tp * cp
    # Where TP does not fit a node, PAR106 has said so.
    crosses = cp > 1 and nproc % tp == 0 and nproc % ranks and not _within_a_rack(view, ranks)
    if view["cluster.nnodes"] > 1 and crosses:
        works = _comma(divisors(nproc // tp))
        yield Finding(
            path(CP),
            (
                f"TP {tp} x CP {cp} = {ranks} does not fit the {nproc} processes of a node, "
                "so context-parallel groups cross nodes"
            ),
            f"CP that stays on a node: {works}",
        )


def _grouped_queries(view: View) -> str:
    return (
        f"cross-attention has no grouped queries: num_query_groups {view[_QUERY_GROUPS]} "
        f"must equal num_attention_heads {view[HEADS]}"
    )


def _experts(view: View) -> Iterator[Finding]:
    for key, dense in _DENSE.items():
        if view.or_null(key) != dense and view.is_set_by_user(key):
            yield Finding(path(key), f"{key} {view[key]}: the DiT is dense, it has no experts to spread", "remove it")


def _optimizer_instances(view: View) -> Iterator[Finding]:
    instances = view[INSTANCES]
    dp = view.data_parallel_size
    cp = view[CP]
    ranks = dp * cp
    # Each instance shards over equally many ranks; context-parallel ranks hold copies of the weights too.
    if instances < 1 or ranks % instances:
        message = f"{INSTANCES} {instances} does not divide DP {dp} x CP {cp} = {ranks}"
        works = _comma(divisors(ranks))
        yield Finding(path(INSTANCES), message, f"one of: {works}")
    # Without sharding there is nothing to have instances of.
    elif instances > 1 and not view["optimizer.use_distributed_optimizer"]:
        message = f"{INSTANCES} {instances} needs the distributed optimizer, which is off"
        yield Finding(path(INSTANCES), message, "set optimizer.use_distributed_optimizer to true")


def _hierarchical(view: View) -> Iterator[Finding]:
    key = "model.hierarchical_context_parallel_sizes"
    sizes = view[key]
    cp = view[CP]
    fits = all(_is_positive(size) for size in sizes) and math.prod(sizes) == cp
    if not fits:
        message = f"{key} {sizes} does not multiply to CP {cp}"
        yield Finding(path(key), message, f"two numbers whose product is {cp}, or remove it")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _mapping(view: View) -> Iterator[Finding]:
    key = "dist.use_tp_pp_dp_mapping"
    if not view[key]:
        return
    # The order of ranks has no place for CP.
    if view[CP] > 1:
        yield Finding(path(key), f"{key} arranges TP, PP and DP only, but CP is {view[CP]}", "set it to false")
    # Megatron-Bridge asserts it.
    if view["ddp.use_megatron_fsdp"] or view["dist.use_megatron_fsdp"]:
        yield Finding(path(key), f"{key} does not work with Megatron FSDP", "set it to false")


def _replicas_without_instances(view: View) -> bool:
    return bool(view[_SHARP] and view[_SHARP_GROUP] == "dp_replica" and view[INSTANCES] <= 1)


def _overlaps_nothing(view: View) -> bool:
    """Whether a person asked for an overlap, and there is one data-parallel rank."""
    if not view.resolved.world_size_is_given or view.data_parallel_size * view[CP] != 1:
        return False
    asked = [key for key in view.set_by_user(*_OVERLAPS) if view[key]]
    return bool(asked)


_TC = "megatron-core transformer/transformer_config.py, __post_init__"
_PS = "megatron-core parallel_state.py, initialize_model_parallel"

RULES = (
    # What the sizes must divide.
    Rule(
        "PAR101",
        "world-size-not-divisible",
        ERROR,
        _world_size,
        (
            "Megatron forms data-parallel groups of world_size / (TP x PP x CP) ranks; "
            "a remainder leaves ranks without a group, and every rank stops with an assertion."
        ),
        "Megatron-Bridge training/config.py, get_data_parallel_size",
    ),
    Rule(
        "PAR102",
        "heads-not-divisible",
        ERROR,
        must_divide(
            TP,
            HEADS,
            words="each tensor-parallel rank needs whole heads",
            fits=lambda v, heads: v[HIDDEN] % heads == 0,
        ),
        (
            "Attention heads are dealt out whole over the tensor-parallel ranks; "
            "megatron-core raises a ValueError otherwise."
        ),
        _TC,
    ),
    Rule(
        "PAR103",
        "sequence-parallel-without-tensor-parallel",
        ERROR,
        excludes(
            lambda v: v[SP] and v[TP] == 1,
            at=SP,
            message="sequence_parallel cuts activations over the tensor-parallel ranks, but TP is 1",
            hint="set model.tensor_model_parallel_size to 2 or more, or sequence_parallel to false",
        ),
        "megatron-core refuses the combination when the model is built.",
        "megatron-core model_parallel_config.py, __post_init__",
    ),
    Rule(
        "PAR104",
        "query-groups-not-heads",
        ERROR,
        excludes(
            lambda v: v[_QUERY_GROUPS] != v[HEADS],
            at=_QUERY_GROUPS,
            message=_grouped_queries,
            hint="remove model.num_query_groups to have it derived",
        ),
        "megatron-core's cross-attention raises a ValueError when the model is built.",
        "megatron-core transformer/attention.py, CrossAttention",
    ),
    Rule(
        "PAR105",
        "ffn-not-divisible",
        ERROR,
        _mlp_divides,
        "Column- and row-parallel linear layers need equal slices; the model cannot be built.",
        "megatron-core utils.py, divide",
    ),
    # Where tensor parallelism costs more than it gains.
    Rule(
        "PAR106",
        "tensor-parallel-across-nodes",
        WARNING,
        _tp_across_nodes,
        "Tensor-parallel collectives run many times in each layer; over the network they dominate the step.",
        "megatron-core's rank order tp-cp-ep-dp-pp",
    ),
    Rule(
        "PAR108",
        "sequence-parallel-on-dfm",
        WARNING,
        excludes(
            lambda v: v[SP] and v[TP] > 1,
            at=SP,
            message=(
                "DFM's DiT does not reduce all gradients under sequence parallelism: "
                "replicas drift, and the trunk's gradient is scaled by TP"
            ),
            hint="set it to false, or use target: megatron_core",
        ),
        (
            "Losses look healthy, because clipping and Adam hide the scale; "
            "the weights of tensor-parallel ranks grow apart in silence."
        ),
        "NVIDIA DFM model/dit/dit_layer_spec.py, dit_model.py; megatron-core tensor_parallel/mappings.py",
        targets=DFM_DIT,
    ),
    # What only other networks, or other optimizers, have.
    Rule(
        "PAR109",
        "experts-in-a-dense-model",
        ERROR,
        _experts,
        (
            "The DiT block has a plain MLP. A positive number of experts is accepted and never used; "
            "other expert settings stop every rank."
        ),
        _TC,
        targets=DFM,
    ),
    Rule(
        "PAR110",
        "optimizer-instances-not-divisible",
        ERROR,
        _optimizer_instances,
        "Each instance of the distributed optimizer shards over an equal part of the data-parallel ranks.",
        _PS,
        targets=DFM,
    ),
    # How groups of ranks are formed.
    Rule(
        "PAR111",
        "hierarchical-context-parallel-sizes-wrong",
        ERROR,
        _hierarchical,
        (
            "The inner and outer context-parallel groups must hold all CP ranks; "
            "without an error the exchange would be left out."
        ),
        _PS,
        targets=DFM,
    ),
    Rule(
        "PAR112",
        "sharp-group-impossible",
        ERROR,
        together(
            excludes(
                lambda v: v[_SHARP_GROUP] and not v[_SHARP],
                at=_SHARP_GROUP,
                message="dist.sharp_enabled_group needs dist.use_sharp, which is off",
                hint="set dist.use_sharp to true, or remove the group",
            ),
            excludes(
                _replicas_without_instances,
                at=_SHARP_GROUP,
                message=f"the group dp_replica exists only with {INSTANCES} above 1",
                hint="use the group dp",
            ),
        ),
        "megatron-core asserts it when the groups are formed, after NCCL is up.",
        _PS,
        targets=DFM,
    ),
    Rule(
        "PAR113",
        "mapping-without-context-parallel",
        ERROR,
        _mapping,
        (
            "The alternative order of ranks knows nothing of context parallelism: "
            "groups would be wrong in silence. With FSDP it is an assertion."
        ),
        "Megatron-Bridge training/config.py, DistributedInitConfig",
        targets=DFM,
    ),
    # What works, and is slow or useless.
    Rule(
        "PAR114",
        "tensor-parallel-not-a-power-of-two",
        HINT,
        excludes(
            lambda v: v[TP] & (v[TP] - 1),
            at=TP,
            message=lambda v: f"TP {v[TP]} is not a power of two, as the how-to asks",
            hint=(
                "it works where heads and MLP divide; with sequence parallelism, "
                "DFM's padding to 64 tokens needs a power of two"
            ),
        ),
        "Not a rule of Megatron's own, but kernels and collectives are tuned for powers of two.",
        "the how-to's table of parallel sizes",
    ),
    Rule(
        "PAR115",
        "context-parallel-across-nodes",
        HINT,
        _cp_across_nodes,
        "Keys and values travel between the context-parallel ranks in every layer; over the network that is slow.",
        "megatron-core's rank order tp-cp-ep-dp-pp",
        targets=DFM,
    ),
    Rule(
        "PAR117",
        "more-processes-than-gpus",
        WARNING,
        _too_many_for_a_node,
        "Two processes share a GPU and its memory, or find none: the launch fails once the nodes are there.",
        "NVIDIA's HGX and NVL72 machines",
    ),
    Rule(
        "PAR116",
        "overlap-without-data-parallel",
        HINT,
        excludes(
            _overlaps_nothing,
            at=lambda v: v.set_by_user(*_OVERLAPS)[0],
            message="the data-parallel size is 1: there is nothing to reduce or gather, so nothing to overlap",
            hint="remove it, or use more processes",
        ),
        "The flags cost memory for buckets and gain nothing.",
        "megatron-core distributed",
    ),
)
