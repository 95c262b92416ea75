"""SEQ: the length of packs, and how ranks share it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dfmspec.check.rules.base import CP, DFM, DFM_DIT, ERROR, HINT, LAYERS, LENGTH, MBS, OURS, SP, TP, WAN, WARNING, Rule, View, excludes, path, shown, together
from dfmspec.diagnostics import Finding, Severity
from dfmspec.targets.layout import nearest_multiples

_PAD = 64
"""Tokens to which DFM's task encoder pads each sample."""
PACKING = "dataset.packing_buffer_size"


def _pack_over_ranks(view: View) -> Iterator[Finding]:
    cuts = [(name, view[key]) for name, key, cuts in (("CP", CP, True), ("TP", TP, view[SP])) if cuts and view[key] > 1]
    need, length, tokens = math.prod(size for _, size in cuts), view[LENGTH], view[LENGTH] * view[MBS]
    if tokens % need:
        words = " x ".join(f"{name} {size}" for name, size in cuts) + (f" = {need}" if len(cuts) > 1 else "")
        yield Finding(
            path(LENGTH), f"a microbatch's {tokens} tokens are cut over {words}, which does not divide them",
            f"{LENGTH} {' or '.join(map(str, nearest_multiples(length, need)))}",
        )  # fmt: skip


def _padding_shared(view: View) -> Iterator[Finding]:
    tp, cp = view[TP] if view[SP] else 1, view[CP]
    need = tp * cp * (2 if cp > 1 else 1)
    if need > 1 and _PAD % need and (view[SP] or cp > 1):
        words = f"TP {tp} x CP {cp}" if cp == 1 else f"2 x TP {tp} x CP {cp}" if tp > 1 else f"2 x CP {cp}"
        yield Finding(
            path(CP if cp > 1 else SP), f"DFM pads each sample to a multiple of {_PAD} tokens, which {words} = {need} does not divide",
            "with context or sequence parallelism use powers of two whose product (doubled with CP) is at most 64",
        )  # fmt: skip


def _model_length(view: View) -> Iterator[Finding]:
    length, cp = view["model.seq_length"], view[CP]
    if cp > 1 and length % (2 * cp):
        near = " or ".join(map(str, nearest_multiples(length, 2 * cp)))
        at = "model.seq_length" if view.is_users("model.seq_length") else CP
        yield Finding(path(at), f"model.seq_length {length} is not a multiple of 2 x CP {cp} = {2 * cp}", f"model.seq_length {near}; the packs are cut by {LENGTH if view.target == 'dfm' else 'dataset.seq_length'}")


def _communication(view: View) -> Iterator[Finding]:
    key = "model.cp_comm_type"
    value, cp = view[key], view[CP]
    if value is None:
        return
    if cp > 1 and not isinstance(value, str):
        what = f"a list of {len(value)}" if isinstance(value, list) else str(value)
        yield Finding(path(key), f"{key} is {what} for {view[LAYERS]} layers: with CP {cp} lists are refused, or fail when the model is built", "remove it")
    else:
        yield Finding(path(key), f"{key} has no effect: DFM builds its attention without it, and the exchange is p2p", "remove it", Severity.WARNING)


def _all_to_all(view: View) -> Iterator[Finding]:
    key = "model.cp_comm_type"
    words = view[key] if isinstance(view[key], list) else [view[key]]
    if view[CP] > 1 and any("a2a" in str(word) for word in words):
        yield Finding(path(key), f"{key} {shown(view[key])} with CP {view[CP]}: WAN's sequences are packs (thd), and all-to-all does not take packs", "p2p; leave it out")


def _mock_lengths(view: View) -> Iterator[Finding]:
    cp = view[CP]
    if not view.is_mock or cp == 1:
        return
    patch = view["dataset.patch_spatial"]
    tokens = view["dataset.F_latents"] * (view["dataset.H_latents"] // patch) * (view["dataset.W_latents"] // patch)
    for key, length, what in (("dataset.H_latents", tokens, "tokens of a sample"), ("dataset.context_seq_len", view["dataset.context_seq_len"], "tokens of a text")):
        if length % (2 * cp) or not length:
            yield Finding(path(key), f"the {length} {what} are not a multiple of 2 x CP {cp} = {2 * cp}", "change F_latents, H_latents, W_latents or context_seq_len")


_GRAPHS = ("model.enable_cuda_graph", "model.external_cuda_graph", "model.cuda_graph_scope")

RULES = (
    Rule(
        "SEQ101", "sequence-not-divisible", ERROR, _pack_over_ranks,
        "Context parallelism and sequence parallelism give each rank an equal share of the tokens; megatron-core asserts it in the first iteration.",
        "megatron-core tensor_parallel/mappings.py; dfmspec/trainer/data/microbatch.py", OURS,
    ),
    Rule(
        "SEQ102", "padding-not-divisible", ERROR, _padding_shared,
        "Each sample is padded to 64 tokens and no more, so its share of a rank is no whole number: an assertion in the first iteration, or wrong indices in silence.",
        "NVIDIA DFM data/dit/dit_taskencoder.py, model/dit/dit_data_process.py", DFM_DIT,
    ),
    Rule(
        "SEQ103", "packing-format-mismatch", ERROR,
        excludes(lambda v: (v[PACKING] is not None) != (v["model.qkv_format"] == "thd"), at=lambda v: "model.qkv_format" if v.is_users("model.qkv_format") else PACKING,
                 message=lambda v: f"model.qkv_format {v['model.qkv_format']} with packing {'on' if v[PACKING] is not None else 'off'}: packs are thd, and thd is packs",
                 hint="set model.qkv_format to thd and keep dataset.packing_buffer_size"),
        "The batch is flattened while attention takes it for one padded sequence: samples attend to each other in silence, or shapes do not fit.",
        "NVIDIA DFM model/dit/dit_data_process.py", DFM_DIT,
    ),
    Rule(
        "SEQ104", "packing-off", WARNING,
        excludes(lambda v: v[PACKING] is None, at=PACKING, message="without packing, all samples must have one shape, and every one is padded to 64 tokens alone",
                 hint="set dataset.packing_buffer_size, for example to 40"),
        "Accepted at start; the first two samples of different size stop the run.", "NVIDIA DFM data/dit/dit_taskencoder.py, batch", DFM_DIT,
    ),
    Rule(
        "SEQ105", "pack-length-not-padded", HINT,
        excludes(lambda v: v.is_users(LENGTH) and v[LENGTH] % _PAD, at=LENGTH,
                 message=lambda v: f"{LENGTH} {v[LENGTH]} is not a multiple of {_PAD}, to which samples are padded",
                 hint=lambda v: f"{LENGTH} {' or '.join(map(str, nearest_multiples(v[LENGTH], _PAD)))}"),
        "Packs are filled with padded lengths, so the rest is never used, and a sample just short of the limit makes an over-full pack alone.",
        "NVIDIA DFM data/common/diffusion_task_encoder_with_sp.py", DFM_DIT,
    ),
    Rule(
        "SEQ106", "model-length-not-divisible", ERROR, _model_length,
        "Megatron-Bridge asserts it with context parallelism, although the network never uses this length.", "Megatron-Bridge training/config.py, validate", DFM,
    ),
    Rule(
        "SEQ107", "model-length-without-effect", HINT,
        excludes(lambda v: v.is_users("model.seq_length") and v["model.seq_length"] != v[LENGTH], at="model.seq_length",
                 message=lambda v: f"model.seq_length {v['model.seq_length']} feeds the logged TFLOP/s and a check alone; packs have {v[LENGTH]} tokens",
                 hint=f"for honest logs set it to {LENGTH}"),
        "The throughput that upstream logs is computed with this length in silence, whatever the packs hold.", "Megatron-Bridge training/initialize.py", DFM_DIT,
    ),
    Rule(
        "SEQ108", "context-communication-ignored", ERROR, _communication,
        "The attention layers are built without the setting, so a legal word changes nothing in silence; a list fails when the model is built.",
        "NVIDIA DFM model/dit/dit_layer_spec.py; megatron-core TransformerConfig.__post_init__", DFM_DIT,
    ),
    Rule(
        "SEQ109", "mock-lengths-not-divisible", ERROR, _mock_lengths,
        "Each context-parallel rank takes two equal pieces of every sequence; the first iteration fails.", "NVIDIA DFM data/dit/dit_mock_datamodule.py", DFM_DIT,
    ),
    Rule(
        "SEQ110", "tensor-parallel-overlap-on-dit", ERROR,
        together(*(
            excludes(lambda v, key=key: v[key], at=key, message="tp_comm_overlap needs buffers of one fixed length, and packs and texts have several",  # type: ignore[misc]
                     hint="set it to false")
            for key in ("model.tp_comm_overlap", "comm_overlap.tp_comm_overlap")
        )),
        "Buffers are sized from seq_length x micro_batch_size and shared with cross-attention: the model cannot be built, or the first iteration fails. "
        "Without TP or sequence parallelism comm_overlap turns it off with a log line, in silence for most.",
        "Megatron-Bridge training/initialize.py; NVIDIA DFM model/dit/dit_layer_spec.py", DFM,
    ),
    Rule(
        "SEQ111", "cuda-graphs-with-packing", ERROR,
        excludes(lambda v: v["model.cuda_graph_impl"] != "none" or [k for k in v.users(*_GRAPHS) if v[k]],
                 at=lambda v: "model.cuda_graph_impl" if v["model.cuda_graph_impl"] != "none" else next(k for k in v.users(*_GRAPHS) if v[k]),
                 message="a CUDA graph replays fixed shapes, and packs change theirs", hint="set model.cuda_graph_impl to none and remove the scope"),
        "Accepted at start; the first pack with another number of samples replays the wrong shapes, or capture fails.",
        "megatron-core transformer/cuda_graphs.py and TransformerConfig.__post_init__", DFM[:2],
    ),
    Rule(
        "SEQ113", "all-to-all-with-packs", ERROR, _all_to_all,
        "Transformer Engine refuses the exchange for packs in the first iteration: accepted at start.", "Transformer Engine's attention; megatron-core extensions/transformer_engine.py", WAN,
    ),
    Rule(
        "SEQ112", "variable-lengths-refused", ERROR,
        excludes(lambda v: v["model.variable_seq_lengths"] and v["model.moe_token_dispatcher_type"] == "allgather", at="model.variable_seq_lengths",
                 message="megatron-core refuses variable_seq_lengths with the allgather dispatcher, even in a model without experts", hint="remove it: it serves pipelines only"),
        "A ValueError when the configuration is built.", "megatron-core TransformerConfig.__post_init__", DFM,
    ),
)  # fmt: skip
