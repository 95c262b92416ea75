"""SEQ: the length of packs, and how ranks share it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dfmspec.check.rules.base import (
    CP,
    DFM,
    DFM_DIT,
    ERROR,
    HINT,
    LAYERS,
    LENGTH,
    MBS,
    OURS,
    SP,
    TP,
    WAN,
    WARNING,
    Check,
    Rule,
    View,
    as_yaml,
    excludes,
    path,
    together,
)
from dfmspec.diagnostics import Finding
from dfmspec.targets.layout import nearest_multiples

PACKING = "dataset.packing_buffer_size"
PAD = 64
"""Tokens to which DFM's task encoder pads each sample."""

_FORMAT = "model.qkv_format"
_MODEL_LENGTH = "model.seq_length"
_EXCHANGE = "model.cp_comm_type"
_VARIABLE = "model.variable_seq_lengths"
_GRAPH = "model.cuda_graph_impl"
_FURTHER_GRAPHS = ("model.enable_cuda_graph", "model.external_cuda_graph", "model.cuda_graph_scope")


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _pack_over_ranks(view: View) -> Iterator[Finding]:
    # Context parallelism cuts the tokens; sequence parallelism cuts each piece over TP.
    sizes = {"CP": view[CP]}
    if view[SP]:
        sizes["TP"] = view[TP]
    cuts = {name: size for name, size in sizes.items() if size > 1}
    need = math.prod(cuts.values())
    length = view[LENGTH]
    tokens = length * view[MBS]
    if tokens % need:
        words = " x ".join(f"{name} {size}" for name, size in cuts.items())
        if len(cuts) > 1:
            words += f" = {need}"
        near = _or(nearest_multiples(length, need))
        message = f"a microbatch's {tokens} tokens are cut over {words}, which does not divide them"
        yield Finding(path(LENGTH), message, f"{LENGTH} {near}")


def _padding_shared(view: View) -> Iterator[Finding]:
    tp = view[TP] if view[SP] else 1
    cp = view[CP]
    # Context parallelism gives each rank two pieces, so that causal attention is shared evenly.
    if cp == 1:
        need = tp
        words = f"TP {tp} x CP {cp}"
    elif tp > 1:
        need = 2 * tp * cp
        words = f"2 x TP {tp} x CP {cp}"
    else:
        need = 2 * cp
        words = f"2 x CP {cp}"
    if PAD % need:
        yield Finding(
            path(CP if cp > 1 else SP),
            f"DFM pads each sample to a multiple of {PAD} tokens, which {words} = {need} does not divide",
            "with context or sequence parallelism use powers of two whose product (doubled with CP) is at most 64",
        )


def _mismatched(view: View) -> bool:
    is_packed = view.or_null(PACKING) is not None
    takes_packs: bool = view[_FORMAT] == "thd"
    return is_packed != takes_packs


def _format_and_packing(view: View) -> str:
    packing = "off" if view.or_null(PACKING) is None else "on"
    return f"{_FORMAT} {view[_FORMAT]} with packing {packing}: packs are thd, and thd is packs"


def _padded_lengths(view: View) -> str:
    near = _or(nearest_multiples(view[LENGTH], PAD))
    return f"{LENGTH} {near}"


def _model_length(view: View) -> Iterator[Finding]:
    length = view[_MODEL_LENGTH]
    cp = view[CP]
    if cp == 1:
        return
    pieces = 2 * cp
    # A CP that padding to 64 tokens cannot have either is told once.
    is_told = view.network == "dit" and PAD % pieces and not view.is_set_by_user(_MODEL_LENGTH)
    if length % pieces and not is_told:
        near = _or(nearest_multiples(length, pieces))
        cut_by = LENGTH if view.network == "dit" else "dataset.seq_length"
        yield Finding(
            path(_MODEL_LENGTH if view.is_set_by_user(_MODEL_LENGTH) else CP),
            f"{_MODEL_LENGTH} {length} is not a multiple of 2 x CP {cp} = {pieces}",
            f"{_MODEL_LENGTH} {near}; the packs are cut by {cut_by}",
        )


def _length_for_logs(view: View) -> str:
    return (
        f"{_MODEL_LENGTH} {view[_MODEL_LENGTH]} feeds the logged TFLOP/s and a check alone; "
        f"packs have {view[LENGTH]} tokens"
    )


def _communication(view: View) -> Iterator[Finding]:
    value = view[_EXCHANGE]
    cp = view[CP]
    # A list, with a word for each layer, is judged where there is an exchange.
    if cp > 1 and not isinstance(value, str):
        what = str(value)
        if isinstance(value, list):
            count = len(value)
            what = f"a list of {count}"
        layers = view[LAYERS]
        message = (
            f"{_EXCHANGE} is {what} for {layers} layers: "
            f"with CP {cp} lists are refused, or fail when the model is built"
        )
        yield Finding(path(_EXCHANGE), message, "remove it")
    # A word is read by nobody.
    else:
        message = f"{_EXCHANGE} has no effect: DFM builds its attention without it, and the exchange is p2p"
        yield Finding(path(_EXCHANGE), message, "remove it", WARNING)


def _all_to_all(view: View) -> Iterator[Finding]:
    value = view[_EXCHANGE]
    # One word for all layers, or a list with a word for each.
    if view[CP] > 1 and "a2a" in str(value):
        message = (
            f"{_EXCHANGE} {as_yaml(value)} with CP {view[CP]}: "
            "WAN's sequences are packs (thd), and all-to-all does not take packs"
        )
        yield Finding(path(_EXCHANGE), message, "p2p; leave it out")


def _mock_lengths(view: View) -> Iterator[Finding]:
    cp = view[CP]
    if not view.is_mock or cp == 1:
        return
    patch = view["dataset.patch_spatial"]
    frames = view["dataset.F_latents"]
    rows = view["dataset.H_latents"] // patch
    columns = view["dataset.W_latents"] // patch
    texts = view["dataset.context_seq_len"]
    lengths = {
        "dataset.H_latents": (frames * rows * columns, "tokens of a sample"),
        "dataset.context_seq_len": (texts, "tokens of a text"),
    }
    pieces = 2 * cp
    for key, (length, what) in lengths.items():
        if length % pieces or not length:
            message = f"the {length} {what} are not a multiple of 2 x CP {cp} = {pieces}"
            yield Finding(path(key), message, "change F_latents, H_latents, W_latents or context_seq_len")


def _needs_one_length(key: str) -> Check:
    """A flag that overlaps tensor-parallel messages in buffers that are allocated once."""
    return excludes(
        lambda v: v[key],
        at=key,
        message="tp_comm_overlap needs buffers of one fixed length, and packs and texts have several",
        hint="set it to false",
    )


def _graphs(view: View) -> list[str]:
    """The keys that ask for CUDA graphs; the implementation says it alone."""
    if view[_GRAPH] != "none":
        return [_GRAPH]
    return [key for key in view.set_by_user(*_FURTHER_GRAPHS) if view[key]]


RULES = (
    # What ranks share out equally.
    Rule(
        "SEQ101",
        "sequence-not-divisible",
        ERROR,
        _pack_over_ranks,
        (
            "Context parallelism and sequence parallelism give each rank an equal share of the tokens; "
            "megatron-core asserts it in the first iteration."
        ),
        "megatron-core tensor_parallel/mappings.py; dfmspec/trainer/data/microbatch.py",
        targets=OURS,
    ),
    Rule(
        "SEQ102",
        "padding-not-divisible",
        ERROR,
        _padding_shared,
        (
            "Each sample is padded to 64 tokens and no more, so its share of a rank is no whole number: "
            "an assertion in the first iteration, or wrong indices in silence."
        ),
        "NVIDIA DFM data/dit/dit_taskencoder.py, model/dit/dit_data_process.py",
        targets=DFM_DIT,
    ),
    # Packs, and attention that knows of them.
    Rule(
        "SEQ103",
        "packing-format-mismatch",
        ERROR,
        excludes(
            _mismatched,
            at=lambda v: _FORMAT if v.is_set_by_user(_FORMAT) else PACKING,
            message=_format_and_packing,
            hint="set model.qkv_format to thd and keep dataset.packing_buffer_size",
        ),
        (
            "The batch is flattened while attention takes it for one padded sequence: "
            "samples attend to each other in silence, or shapes do not fit."
        ),
        "NVIDIA DFM model/dit/dit_data_process.py",
        targets=DFM_DIT,
    ),
    Rule(
        "SEQ104",
        "packing-off",
        WARNING,
        excludes(
            lambda v: v.or_null(PACKING) is None,
            at=PACKING,
            message="without packing, all samples must have one shape, and every one is padded to 64 tokens alone",
            hint="set dataset.packing_buffer_size, for example to 40",
        ),
        "Accepted at start; the first two samples of different size stop the run.",
        "NVIDIA DFM data/dit/dit_taskencoder.py, batch",
        targets=DFM_DIT,
    ),
    Rule(
        "SEQ105",
        "pack-length-not-padded",
        HINT,
        excludes(
            lambda v: v.is_set_by_user(LENGTH) and v[LENGTH] % PAD,
            at=LENGTH,
            message=lambda v: f"{LENGTH} {v[LENGTH]} is not a multiple of {PAD}, to which samples are padded",
            hint=_padded_lengths,
        ),
        (
            "Packs are filled with padded lengths, so the rest is never used, "
            "and a sample just short of the limit makes an over-full pack alone."
        ),
        "NVIDIA DFM data/common/diffusion_task_encoder_with_sp.py",
        targets=DFM_DIT,
    ),
    # A length that feeds checks and logs alone.
    Rule(
        "SEQ106",
        "model-length-not-divisible",
        ERROR,
        _model_length,
        "Megatron-Bridge asserts it with context parallelism, although the network never uses this length.",
        "Megatron-Bridge training/config.py, validate",
        targets=DFM,
    ),
    Rule(
        "SEQ107",
        "model-length-without-effect",
        HINT,
        excludes(
            lambda v: v.is_set_by_user(_MODEL_LENGTH) and v[_MODEL_LENGTH] != v[LENGTH],
            at=_MODEL_LENGTH,
            message=_length_for_logs,
            hint=f"for honest logs set it to {LENGTH}",
        ),
        "The throughput that upstream logs is computed with this length in silence, whatever the packs hold.",
        "Megatron-Bridge training/initialize.py",
        targets=DFM_DIT,
    ),
    # The exchange of context parallelism, and its two pieces a rank.
    Rule(
        "SEQ108",
        "context-communication-ignored",
        ERROR,
        _communication,
        (
            "The attention layers are built without the setting, so a legal word changes nothing in silence; "
            "a list fails when the model is built."
        ),
        "NVIDIA DFM model/dit/dit_layer_spec.py; megatron-core TransformerConfig.__post_init__",
        targets=DFM_DIT,
    ),
    Rule(
        "SEQ109",
        "mock-lengths-not-divisible",
        ERROR,
        _mock_lengths,
        "Each context-parallel rank takes two equal pieces of every sequence; the first iteration fails.",
        "NVIDIA DFM data/dit/dit_mock_datamodule.py",
        targets=DFM_DIT,
    ),
    # What needs one fixed length.
    Rule(
        "SEQ110",
        "tensor-parallel-overlap-on-dit",
        ERROR,
        together(
            _needs_one_length("model.tp_comm_overlap"),
            _needs_one_length("comm_overlap.tp_comm_overlap"),
        ),
        (
            "Buffers are sized from seq_length x micro_batch_size and shared with cross-attention: "
            "the model cannot be built, or the first iteration fails. "
            "Without TP or sequence parallelism comm_overlap turns it off with a log line, in silence for most."
        ),
        "Megatron-Bridge training/initialize.py; NVIDIA DFM model/dit/dit_layer_spec.py",
        targets=DFM,
    ),
    Rule(
        "SEQ111",
        "cuda-graphs-with-packing",
        ERROR,
        excludes(
            _graphs,
            at=lambda v: _graphs(v)[0],
            message="a CUDA graph replays fixed shapes, and packs change theirs",
            hint="set model.cuda_graph_impl to none and remove the scope",
        ),
        "Accepted at start; the first pack with another number of samples replays the wrong shapes, or capture fails.",
        "megatron-core transformer/cuda_graphs.py and TransformerConfig.__post_init__",
        targets=DFM_DIT + WAN,
    ),
    # What megatron-core and Transformer Engine refuse.
    Rule(
        "SEQ113",
        "all-to-all-with-packs",
        ERROR,
        _all_to_all,
        "Transformer Engine refuses the exchange for packs in the first iteration: accepted at start.",
        "Transformer Engine's attention; megatron-core extensions/transformer_engine.py",
        targets=WAN,
    ),
    Rule(
        "SEQ112",
        "variable-lengths-refused",
        ERROR,
        excludes(
            lambda v: v[_VARIABLE] and v["model.moe_token_dispatcher_type"] == "allgather",
            at=_VARIABLE,
            message=(
                "megatron-core refuses variable_seq_lengths with the allgather dispatcher, "
                "even in a model without experts"
            ),
            hint="remove it: it serves pipelines only",
        ),
        "A ValueError when the configuration is built.",
        "megatron-core TransformerConfig.__post_init__",
        targets=DFM,
    ),
)
