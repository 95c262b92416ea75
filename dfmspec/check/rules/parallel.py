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
    View,
    excludes,
    must_divide,
    path,
    together,
)
from dfmspec.diagnostics import Finding
from dfmspec.targets.layout import divisors

INSTANCES = "ddp.num_distributed_optimizer_instances"


def _world_size(view: View) -> Iterator[Finding]:
    layout = view.layout
    if layout.data_parallel_size:
        return
    world, tp, pp, cp = layout.world_size, view[TP], view[PP], view[CP]
    sp, vpp, tokens, pipelined = view[SP], view[VPP], (view[LENGTH] or 0) * view[MBS], view.trainer.HAS_PIPELINE

    def legal(t: int, p: int, c: int) -> bool:
        whole = world % (t * p * c) == view[HEADS] % t == view[FFN] % t == view[LAYERS] % p == tokens % (c * (t if sp else 1)) == 0
        return whole and (t > 1 or not sp) and ((p > 1 or vpp is None) if pipelined else p == 1)

    fits = [sizes for sizes in product(divisors(world), repeat=3) if legal(*sizes)]
    fits.sort(key=lambda sizes: (abs(sizes[0] - tp) + abs(sizes[1] - pp) + abs(sizes[2] - cp), sizes))
    triples = [f"TP {t} PP {p} CP {c}" for t, p, c in fits]
    nearest = world // layout.model_parallel_size * layout.model_parallel_size or layout.model_parallel_size
    yield Finding(
        path(TP if view.is_users(TP) else "cluster.nproc_per_node"),
        f"{world} processes are not a multiple of TP {tp} x PP {pp} x CP {cp} = {layout.model_parallel_size}",
        f"use {nearest} processes, or one of: {'; '.join(triples[:6])}",
    )


def _tp_across_nodes(view: View) -> Iterator[Finding]:
    nproc, tp = view["cluster.nproc_per_node"], view[TP]
    one_switch = view["cluster.gpu"] in ("gb200", "gb300") and tp <= 72  # NVLink reaches over the nodes of a rack
    if view["cluster.nnodes"] > 1 and nproc % tp and not one_switch:
        yield Finding(
            path(TP), f"TP {tp} does not fit the {nproc} processes of a node, so tensor-parallel groups cross nodes",
            f"TP that stays on a node: {', '.join(map(str, divisors(nproc)))}",
        )  # fmt: skip


def _cp_across_nodes(view: View) -> Iterator[Finding]:
    nproc, tp, cp = view["cluster.nproc_per_node"], view[TP], view[CP]
    if view["cluster.nnodes"] > 1 and cp > 1 and nproc % tp == 0 and nproc % (tp * cp):
        yield Finding(
            path(CP), f"TP {tp} x CP {cp} = {tp * cp} does not fit the {nproc} processes of a node, so context-parallel groups cross nodes",
            f"CP that stays on a node: {', '.join(map(str, divisors(nproc // tp)))}",
        )  # fmt: skip


def _experts(view: View) -> Iterator[Finding]:
    for key, dense in (("model.num_moe_experts", None), ("model.expert_model_parallel_size", 1), ("model.moe_ffn_hidden_size", None)):
        if view[key] != dense and view.is_users(key):
            yield Finding(path(key), f"{key} {view[key]}: the DiT is dense, it has no experts to spread", "remove it")


def _optimizer_instances(view: View) -> Iterator[Finding]:
    instances, ranks = view[INSTANCES], view.data_parallel_size * view[CP]
    if instances < 1 or ranks % instances:
        yield Finding(path(INSTANCES), f"{INSTANCES} {instances} does not divide DP {view.data_parallel_size} x CP {view[CP]} = {ranks}", f"one of: {', '.join(map(str, divisors(ranks)))}")
    elif instances > 1 and not view["optimizer.use_distributed_optimizer"]:
        yield Finding(path(INSTANCES), f"{INSTANCES} {instances} needs the distributed optimizer, which is off", "set optimizer.use_distributed_optimizer to true")


def _hierarchical(view: View) -> Iterator[Finding]:
    key = "model.hierarchical_context_parallel_sizes"
    sizes, cp = view[key], view[CP]
    if sizes is None:
        return
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes) or math.prod(sizes) != cp:
        yield Finding(path(key), f"{key} {sizes} does not multiply to CP {cp}", f"two numbers whose product is {cp}, or remove it")


def _mapping(view: View) -> Iterator[Finding]:
    key = "dist.use_tp_pp_dp_mapping"
    if not view[key]:
        return
    if view[CP] > 1:
        yield Finding(path(key), f"{key} arranges TP, PP and DP only, but CP is {view[CP]}", "set it to false")
    if view["ddp.use_megatron_fsdp"] or view["dist.use_megatron_fsdp"]:
        yield Finding(path(key), f"{key} does not work with Megatron FSDP", "set it to false")


_TC = "megatron-core transformer/transformer_config.py, __post_init__"
_PS = "megatron-core parallel_state.py, initialize_model_parallel"

RULES = (
    Rule(
        "PAR101", "world-size-not-divisible", ERROR, _world_size,
        "Megatron forms data-parallel groups of world_size / (TP x PP x CP) ranks; a remainder leaves ranks without a group, and every rank stops with an assertion.",
        "Megatron-Bridge training/config.py, get_data_parallel_size",
    ),
    Rule(
        "PAR102", "heads-not-divisible", ERROR, must_divide(TP, HEADS, words="each tensor-parallel rank needs whole heads", fits=lambda v, heads: v[HIDDEN] % heads == 0),
        "Attention heads are dealt out whole over the tensor-parallel ranks; megatron-core raises a ValueError otherwise.", _TC,
    ),
    Rule(
        "PAR103", "sequence-parallel-without-tensor-parallel", ERROR,
        excludes(lambda v: v[SP] and v[TP] == 1, at=SP,
                 message="sequence_parallel cuts activations over the tensor-parallel ranks, but TP is 1",
                 hint="set model.tensor_model_parallel_size to 2 or more, or sequence_parallel to false"),
        "megatron-core refuses the combination when the model is built.", "megatron-core model_parallel_config.py, __post_init__",
    ),
    Rule(
        "PAR104", "query-groups-not-heads", ERROR,
        excludes(lambda v: v["model.num_query_groups"] != v[HEADS], at="model.num_query_groups",
                 message=lambda v: f"cross-attention has no grouped queries: num_query_groups {v['model.num_query_groups']} must equal num_attention_heads {v[HEADS]}",
                 hint="remove model.num_query_groups to have it derived"),
        "megatron-core's cross-attention raises a ValueError when the model is built.", "megatron-core transformer/attention.py, CrossAttention",
    ),
    Rule(
        "PAR105", "ffn-not-divisible", ERROR, must_divide(TP, FFN, words="the MLP is cut over the tensor-parallel ranks"),
        "Column- and row-parallel linear layers need equal slices; the model cannot be built.", "megatron-core utils.py, divide",
    ),
    Rule(
        "PAR106", "tensor-parallel-across-nodes", WARNING, _tp_across_nodes,
        "Tensor-parallel collectives run many times in each layer; over the network they dominate the step.", "megatron-core's rank order tp-cp-ep-dp-pp",
    ),
    Rule(
        "PAR108", "sequence-parallel-on-dfm", WARNING,
        excludes(lambda v: v[SP] and v[TP] > 1, at=SP,
                 message="DFM's DiT does not reduce all gradients under sequence parallelism: replicas drift, and the trunk's gradient is scaled by TP",
                 hint="set it to false, or use target: megatron_core"),
        "Losses look healthy, because clipping and Adam hide the scale; the weights of tensor-parallel ranks grow apart in silence.",
        "NVIDIA DFM model/dit/dit_layer_spec.py, dit_model.py; megatron-core tensor_parallel/mappings.py", DFM_DIT,
    ),
    Rule(
        "PAR109", "experts-in-a-dense-model", ERROR, _experts,
        "The DiT block has a plain MLP. A positive number of experts is accepted and never used; other expert settings stop every rank.", _TC, DFM,
    ),
    Rule(
        "PAR110", "optimizer-instances-not-divisible", ERROR, _optimizer_instances,
        "Each instance of the distributed optimizer shards over an equal part of the data-parallel ranks.", _PS, DFM,
    ),
    Rule(
        "PAR111", "hierarchical-context-parallel-sizes-wrong", ERROR, _hierarchical,
        "The inner and outer context-parallel groups must hold all CP ranks; without an error the exchange would be left out.", _PS, DFM,
    ),
    Rule(
        "PAR112", "sharp-group-impossible", ERROR,
        together(
            excludes(lambda v: v["dist.sharp_enabled_group"] and not v["dist.use_sharp"], at="dist.sharp_enabled_group",
                     message="dist.sharp_enabled_group needs dist.use_sharp, which is off", hint="set dist.use_sharp to true, or remove the group"),
            excludes(lambda v: v["dist.use_sharp"] and v["dist.sharp_enabled_group"] == "dp_replica" and v[INSTANCES] <= 1, at="dist.sharp_enabled_group",
                     message=f"the group dp_replica exists only with {INSTANCES} above 1", hint="use the group dp"),
        ),
        "megatron-core asserts it when the groups are formed, after NCCL is up.", _PS, DFM,
    ),
    Rule(
        "PAR113", "mapping-without-context-parallel", ERROR, _mapping,
        "The alternative order of ranks knows nothing of context parallelism: groups would be wrong in silence. With FSDP it is an assertion.",
        "Megatron-Bridge training/config.py, DistributedInitConfig", DFM,
    ),
    Rule(
        "PAR114", "tensor-parallel-not-a-power-of-two", HINT,
        excludes(lambda v: v[TP] & (v[TP] - 1), at=TP, message=lambda v: f"TP {v[TP]} is not a power of two, as the how-to asks",
                 hint="it works where heads and MLP divide; with sequence parallelism, DFM's padding to 64 tokens needs a power of two"),
        "Not a rule of Megatron's own, but kernels and collectives are tuned for powers of two.", "the how-to's table of parallel sizes",
    ),
    Rule(
        "PAR115", "context-parallel-across-nodes", HINT, _cp_across_nodes,
        "Keys and values travel between the context-parallel ranks in every layer; over the network that is slow.", "megatron-core's rank order tp-cp-ep-dp-pp", DFM,
    ),
    Rule(
        "PAR116", "overlap-without-data-parallel", HINT,
        excludes(lambda v: v.resolved.world_size_is_given and v.data_parallel_size * v[CP] == 1 and [k for k in v.users("ddp.overlap_grad_reduce", "ddp.overlap_param_gather") if v[k]],
                 at=lambda v: v.users("ddp.overlap_grad_reduce", "ddp.overlap_param_gather")[0],
                 message="the data-parallel size is 1: there is nothing to reduce or gather, so nothing to overlap", hint="remove it, or use more processes"),
        "The flags cost memory for buckets and gain nothing.", "megatron-core distributed",
    ),
)  # fmt: skip
