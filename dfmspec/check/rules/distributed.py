"""DDP: how gradients and parameters are shared over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import DFM, ERROR, HINT, PP, WARNING, Rule, View, excludes, path, requires
from dfmspec.diagnostics import Finding

FSDP = ("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp")
FORMAT = "checkpoint.ckpt_format"


def uses_fsdp(view: View) -> bool:
    """Whether either section turns Megatron FSDP on: upstream then sets both."""
    return bool(view[FSDP[0]] or view[FSDP[1]])


def _fsdp_key(view: View) -> str:
    return next((key for key in FSDP if view.is_users(key) and view[key]), FSDP[0])


def _fsdp(view: View) -> Iterator[Finding]:
    if view["dist.use_torch_fsdp2"]:
        if uses_fsdp(view):
            yield Finding(path("dist.use_torch_fsdp2"), "use_torch_fsdp2 and use_megatron_fsdp exclude each other", "use one of the two")
        else:
            yield Finding(path("dist.use_torch_fsdp2"), "use_torch_fsdp2 is not usable with DFM's DiT: it works without checkpoints, clipping and fp8 only", "set it to false")
    if uses_fsdp(view):
        if view[PP] > 1:
            yield Finding(path(_fsdp_key(view)), f"Megatron FSDP does not work with PP {view[PP]}", "set model.pipeline_model_parallel_size to 1")
        if view[FORMAT] != "fsdp_dtensor":
            yield Finding(path(_fsdp_key(view)), f"Megatron FSDP saves and loads fsdp_dtensor only, and {FORMAT} is {view[FORMAT]}", f"set {FORMAT} to fsdp_dtensor")
    elif view[FORMAT] == "fsdp_dtensor":
        yield Finding(path(FORMAT), f"{FORMAT} fsdp_dtensor needs Megatron FSDP, which is off", "set ddp.use_megatron_fsdp to true, or the format to torch_dist")


_EXPERT_OVERLAPS = tuple(f"{section}.{name}" for section in ("model", "comm_overlap", "ddp") for name in ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute"))

RULES = (
    Rule(
        "DDP101", "param-gather-without-grad-overlap", ERROR,
        excludes(lambda v: v["ddp.overlap_param_gather"] and not v["ddp.overlap_grad_reduce"], at="ddp.overlap_param_gather",
                 message="overlap_param_gather needs overlap_grad_reduce", hint="set ddp.overlap_grad_reduce to true too"),
        "Accepted when the configuration is checked; megatron-core asserts it in the first iteration.", "megatron-core distributed/param_and_grad_buffer.py",
    ),
    Rule(
        "DDP102", "param-gather-without-distributed-optimizer", ERROR,
        excludes(lambda v: v["ddp.overlap_param_gather"] and not v["ddp.use_distributed_optimizer"], at="ddp.overlap_param_gather",
                 message="overlap_param_gather gathers what the distributed optimizer sharded, and that is off", hint="set optimizer.use_distributed_optimizer to true"),
        "Accepted when the configuration is checked; megatron-core asserts it when the model is wrapped, or in the first iteration.",
        "megatron-core distributed/param_and_grad_buffer.py",
    ),
    Rule(
        "DDP103", "per-token-loss-averaged", ERROR,
        requires("model.calculate_per_token_loss", ("ddp.average_in_collective", False), because="a loss per token is divided once, after the reduction",
                 unless=uses_fsdp),
        "megatron-core asserts it when the model is wrapped.", "megatron-core distributed/distributed_data_parallel.py", DFM,
    ),
    Rule(
        "DDP104", "fsdp-impossible", ERROR, _fsdp,
        "Asserted at start, or accepted and failing when the model is built or first saved.", "Megatron-Bridge training/config.py, validate", DFM,
    ),
    Rule(
        "DDP105", "fsdp-shards-nothing", WARNING,
        excludes(lambda v: uses_fsdp(v) and v["ddp.data_parallel_sharding_strategy"] == "no_shard", at=_fsdp_key,
                 message="ddp.data_parallel_sharding_strategy no_shard (the default) shards nothing: no memory is saved",
                 hint="set it to optim_grads_params, optim_grads or optim"),
        "FSDP runs with full copies everywhere, in silence.", "megatron-core DistributedDataParallelConfig", DFM,
    ),
    Rule(
        "DDP106", "sharding-strategy-unknown", ERROR,
        excludes(lambda v: v["ddp.data_parallel_sharding_strategy"] not in ("no_shard", "optim", "optim_grads", "optim_grads_params"), at="ddp.data_parallel_sharding_strategy",
                 message=lambda v: f"ddp.data_parallel_sharding_strategy {v['ddp.data_parallel_sharding_strategy']} is not known",
                 hint="no_shard, optim, optim_grads or optim_grads_params"),
        "Accepted at start; FSDP fails when the model is wrapped.", "megatron-core distributed/fsdp", DFM,
    ),
    Rule(
        "DDP107", "gloo-needed", ERROR,
        excludes(lambda v: not v["dist.use_gloo_process_groups"] and v["optimizer.use_distributed_optimizer"] and v[FORMAT] != "torch_dist", at="dist.use_gloo_process_groups",
                 message=lambda v: f"without gloo groups the distributed optimizer saves torch_dist only, and {FORMAT} is {v[FORMAT]}", hint="set dist.use_gloo_process_groups to true"),
        "Asserted at start, with an empty message.", "Megatron-Bridge training/config.py, validate", DFM,
    ),
    Rule(
        "DDP108", "expert-overlap-on-dit", ERROR,
        excludes(lambda v: [k for k in v.users(*_EXPERT_OVERLAPS) if v[k]], at=lambda v: next(k for k in v.users(*_EXPERT_OVERLAPS) if v[k]),
                 message=lambda v: f"{next(k for k in v.users(*_EXPERT_OVERLAPS) if v[k])} overlaps messages between experts, and the DiT has none", hint="remove it"),
        "megatron-core asserts it when the configuration is built; in ddp it has no effect.", "megatron-core TransformerConfig.__post_init__", DFM,
    ),
    Rule(
        "DDP109", "comm-overlap-incomplete", ERROR,
        excludes(lambda v: v["comm_overlap.tp_comm_overlap"] is None and v.section("comm_overlap") and not v.is_users("comm_overlap.tp_comm_overlap"),
                 at=lambda v: v.section("comm_overlap")[0],
                 message="a comm_overlap section needs tp_comm_overlap: its class has no default for it", hint="set comm_overlap.tp_comm_overlap to false"),
        "The section stays a plain mapping, and the first reader fails with an AttributeError.", "Megatron-Bridge training/comm_overlap.py", DFM,
    ),
    Rule(
        "DDP110", "comm-overlap-turns-on", HINT,
        excludes(lambda v: v["comm_overlap.tp_comm_overlap"] is not None and v.data_parallel_size > 1 and not v.users("comm_overlap.overlap_grad_reduce"),
                 at="comm_overlap.tp_comm_overlap",
                 message="with DP above 1 a comm_overlap section turns overlap_grad_reduce and overlap_param_gather on, with buckets of 128 Mi parameters",
                 hint="set comm_overlap.overlap_grad_reduce, overlap_param_gather and bucket_size to choose"),
        "Memory grows by the buckets, in silence.", "Megatron-Bridge training/comm_overlap.py", DFM,
    ),
    Rule(
        "DDP111", "bucket-empty", ERROR,
        excludes(lambda v: v["ddp.bucket_size"] is not None and v["ddp.bucket_size"] < 1, at="ddp.bucket_size",
                 message=lambda v: f"ddp.bucket_size {v['ddp.bucket_size']} holds no parameter", hint="40000000, for example; null for megatron-core's choice"),
        "Accepted; every parameter becomes a bucket of its own, and so a collective, in silence.", "megatron-core distributed/param_and_grad_buffer.py", DFM,
    ),
    Rule(
        "DDP112", "lazy-initialisation", ERROR,
        excludes(lambda v: v["dist.lazy_init"], at="dist.lazy_init", message="dist.lazy_init returns before the groups exist, and DFM's script does not finish it",
                 hint="set it to false"),
        "Accepted at start; the model is then built without process groups.", "Megatron-Bridge training/initialize.py", DFM,
    ),
)  # fmt: skip
