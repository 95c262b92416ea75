"""DDP: how gradients and parameters are shared over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import DFM, ERROR, HINT, PP, WARNING, Rule, View, excludes, path, requires
from dfmspec.diagnostics import Finding

FSDP = ("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp")
FORMAT = "checkpoint.ckpt_format"
_TORCH_FSDP = "dist.use_torch_fsdp2"
_GATHER = "ddp.overlap_param_gather"
_STRATEGY = "ddp.data_parallel_sharding_strategy"
_STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
_BUCKET = "ddp.bucket_size"
_GLOO = "dist.use_gloo_process_groups"
_LAZY = "dist.lazy_init"
_TP_OVERLAP = "comm_overlap.tp_comm_overlap"


def uses_fsdp(view: View) -> bool:
    """Whether either section turns Megatron FSDP on: upstream then sets both."""
    ddp, dist = FSDP
    return bool(view[ddp] or view[dist])


def _fsdp_key(view: View) -> str:
    """The key by which a person turned Megatron FSDP on, or else the first."""
    for key in FSDP:
        if view.is_set_by_user(key) and view[key]:
            return key
    return FSDP[0]


def _fsdp(view: View) -> Iterator[Finding]:
    # PyTorch's FSDP, which DFM cannot use at all.
    if view[_TORCH_FSDP]:
        if uses_fsdp(view):
            yield Finding(
                path(_TORCH_FSDP),
                "use_torch_fsdp2 and use_megatron_fsdp exclude each other",
                "use one of the two",
            )
        else:
            yield Finding(
                path(_TORCH_FSDP),
                "use_torch_fsdp2 is not usable with DFM's DiT: it works without checkpoints, clipping and fp8 only",
                "set it to false",
            )

    # Megatron's, and the format of checkpoints that is its alone.
    if uses_fsdp(view):
        pp = view[PP]
        if pp > 1:
            yield Finding(
                path(_fsdp_key(view)),
                f"Megatron FSDP does not work with PP {pp}",
                "set model.pipeline_model_parallel_size to 1",
            )
        kind = view[FORMAT]
        if kind != "fsdp_dtensor":
            yield Finding(
                path(_fsdp_key(view)),
                f"Megatron FSDP saves and loads fsdp_dtensor only, and {FORMAT} is {kind}",
                f"set {FORMAT} to fsdp_dtensor",
            )
    elif view[FORMAT] == "fsdp_dtensor":
        yield Finding(
            path(FORMAT),
            f"{FORMAT} fsdp_dtensor needs Megatron FSDP, which is off",
            "set ddp.use_megatron_fsdp to true, or the format to torch_dist",
        )


def _shards_nothing(view: View) -> bool:
    return uses_fsdp(view) and view[_STRATEGY] == "no_shard"


def _gloo_needed(view: View) -> bool:
    shards_optimizer = not view[_GLOO] and view["optimizer.use_distributed_optimizer"]
    return shards_optimizer and view[FORMAT] != "torch_dist"


_EXPERT_OVERLAPS = (
    "model.overlap_moe_expert_parallel_comm",
    "model.delay_wgrad_compute",
    "comm_overlap.overlap_moe_expert_parallel_comm",
    "comm_overlap.delay_wgrad_compute",
    "ddp.overlap_moe_expert_parallel_comm",
    "ddp.delay_wgrad_compute",
)


def _expert_overlaps(view: View) -> list[str]:
    """The keys by which a person turned on an overlap of messages between experts."""
    return [key for key in view.set_by_user(*_EXPERT_OVERLAPS) if view[key]]


def _section_incomplete(view: View) -> bool:
    if view.or_null(_TP_OVERLAP) is not None or view.is_set_by_user(_TP_OVERLAP):
        return False
    return bool(view.section("comm_overlap"))


def _section_turns_on(view: View) -> bool:
    """Whether a comm_overlap section overlaps gradients that nobody asked to overlap."""
    if view.or_null(_TP_OVERLAP) is None:
        return False
    return view.data_parallel_size > 1 and not view.set_by_user("comm_overlap.overlap_grad_reduce")


RULES = (
    # What the overlap of gathers needs.
    Rule(
        "DDP101",
        "param-gather-without-grad-overlap",
        ERROR,
        excludes(
            lambda v: v[_GATHER] and not v["ddp.overlap_grad_reduce"],
            at=_GATHER,
            message="overlap_param_gather needs overlap_grad_reduce",
            hint="set ddp.overlap_grad_reduce to true too",
        ),
        "Accepted when the configuration is checked; megatron-core asserts it in the first iteration.",
        "megatron-core distributed/param_and_grad_buffer.py",
    ),
    Rule(
        "DDP102",
        "param-gather-without-distributed-optimizer",
        ERROR,
        excludes(
            lambda v: v[_GATHER] and not v["ddp.use_distributed_optimizer"],
            at=_GATHER,
            message="overlap_param_gather gathers what the distributed optimizer sharded, and that is off",
            hint="set optimizer.use_distributed_optimizer to true",
        ),
        "Accepted when the configuration is checked; megatron-core asserts it when the model is wrapped, or in the "
        "first iteration.",
        "megatron-core distributed/param_and_grad_buffer.py",
    ),
    Rule(
        "DDP103",
        "per-token-loss-averaged",
        ERROR,
        requires(
            "model.calculate_per_token_loss",
            ("ddp.average_in_collective", False),
            because="a loss per token is divided once, after the reduction",
            unless=uses_fsdp,
        ),
        "megatron-core asserts it when the model is wrapped.",
        "megatron-core distributed/distributed_data_parallel.py",
        targets=DFM,
    ),
    # FSDP.
    Rule(
        "DDP104",
        "fsdp-impossible",
        ERROR,
        _fsdp,
        "Asserted at start, or accepted and failing when the model is built or first saved.",
        "Megatron-Bridge training/config.py, validate",
        targets=DFM,
    ),
    Rule(
        "DDP105",
        "fsdp-shards-nothing",
        WARNING,
        excludes(
            _shards_nothing,
            at=_fsdp_key,
            message="ddp.data_parallel_sharding_strategy no_shard (the default) shards nothing: no memory is saved",
            hint="set it to optim_grads_params, optim_grads or optim",
        ),
        "FSDP runs with full copies everywhere, in silence.",
        "megatron-core DistributedDataParallelConfig",
        targets=DFM,
    ),
    Rule(
        "DDP106",
        "sharding-strategy-unknown",
        ERROR,
        excludes(
            lambda v: v[_STRATEGY] not in _STRATEGIES,
            at=_STRATEGY,
            message=lambda v: f"{_STRATEGY} {v[_STRATEGY]} is not known",
            hint="no_shard, optim, optim_grads or optim_grads_params",
        ),
        "Accepted at start; FSDP fails when the model is wrapped.",
        "megatron-core distributed/fsdp",
        targets=DFM,
    ),
    # What the distributed optimizer saves without gloo.
    Rule(
        "DDP107",
        "gloo-needed",
        ERROR,
        excludes(
            _gloo_needed,
            at=_GLOO,
            message=lambda v: (
                f"without gloo groups the distributed optimizer saves torch_dist only, and {FORMAT} is {v[FORMAT]}"
            ),
            hint="set dist.use_gloo_process_groups to true",
        ),
        "Asserted at start, with an empty message.",
        "Megatron-Bridge training/config.py, validate",
        targets=DFM,
    ),
    # Overlaps that section comm_overlap turns on.
    Rule(
        "DDP108",
        "expert-overlap-on-dit",
        ERROR,
        excludes(
            _expert_overlaps,
            at=lambda v: _expert_overlaps(v)[0],
            message=lambda v: f"{_expert_overlaps(v)[0]} overlaps messages between experts, and the DiT has none",
            hint="remove it",
        ),
        "megatron-core asserts it when the configuration is built; in ddp it has no effect.",
        "megatron-core TransformerConfig.__post_init__",
        targets=DFM,
    ),
    Rule(
        "DDP109",
        "comm-overlap-incomplete",
        ERROR,
        excludes(
            _section_incomplete,
            at=lambda v: v.section("comm_overlap")[0],
            message="a comm_overlap section needs tp_comm_overlap: its class has no default for it",
            hint="set comm_overlap.tp_comm_overlap to false",
        ),
        "The section stays a plain mapping, and the first reader fails with an AttributeError.",
        "Megatron-Bridge training/comm_overlap.py",
        targets=DFM,
    ),
    Rule(
        "DDP110",
        "comm-overlap-turns-on",
        HINT,
        excludes(
            _section_turns_on,
            at=_TP_OVERLAP,
            message="with DP above 1 a comm_overlap section turns overlap_grad_reduce and overlap_param_gather on, "
            "with buckets of 128 Mi parameters",
            hint="set comm_overlap.overlap_grad_reduce, overlap_param_gather and bucket_size to choose",
        ),
        "Memory grows by the buckets, in silence.",
        "Megatron-Bridge training/comm_overlap.py",
        targets=DFM,
    ),
    # Buckets and process groups.
    Rule(
        "DDP111",
        "bucket-empty",
        ERROR,
        excludes(
            lambda v: v[_BUCKET] < 1,
            at=_BUCKET,
            message=lambda v: f"{_BUCKET} {v[_BUCKET]} holds no parameter",
            hint="40000000, for example; null for megatron-core's choice",
        ),
        "Accepted; every parameter becomes a bucket of its own, and so a collective, in silence.",
        "megatron-core distributed/param_and_grad_buffer.py",
        targets=DFM,
    ),
    Rule(
        "DDP112",
        "lazy-initialisation",
        ERROR,
        excludes(
            lambda v: v[_LAZY],
            at=_LAZY,
            message="dist.lazy_init returns before the groups exist, and DFM's script does not finish it",
            hint="set it to false",
        ),
        "Accepted at start; the model is then built without process groups.",
        "Megatron-Bridge training/initialize.py",
        targets=DFM,
    ),
)
