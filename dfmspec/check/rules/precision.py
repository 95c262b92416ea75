"""PRE: number formats, and what their scaling needs."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import NamedTuple

from dfmspec.check.rules.base import (
    CP,
    DFM,
    DFM_DIT,
    ERROR,
    FFN,
    HIDDEN,
    HINT,
    LAYERS,
    OURS,
    PP,
    SP,
    TP,
    WARNING,
    Check,
    Rule,
    View,
    as_yaml,
    excludes,
    path,
    together,
)
from dfmspec.check.rules.sequence import PAD
from dfmspec.diagnostics import Finding
from dfmspec.spec.gpus import GPUS
from dfmspec.spec.limits import FLASH_HEADS, FP8_ALIGNMENT
from dfmspec.targets.dfm.bridge import PRECISIONS

RECIPE = "mixed_precision.recipe"

_BF16 = "mixed_precision.bf16"
_FP16 = "mixed_precision.fp16"
_FP8 = "mixed_precision.fp8"
_FP4 = "mixed_precision.fp4"
_FP8_RECIPE = "mixed_precision.fp8_recipe"
_PARAMETERS = "mixed_precision.params_dtype"
_ENDS_IN_BF16 = "mixed_precision.first_last_layers_bf16"
_LAYERS_AT_ENDS = (
    "mixed_precision.num_layers_at_start_in_bf16",
    "mixed_precision.num_layers_at_end_in_bf16",
)
_GATHER = "mixed_precision.fp8_param_gather"
_REUSE = "mixed_precision.reuse_grad_buf_for_mxfp8_param_ag"
_OVERLAPS = ("ddp.overlap_param_gather", "ddp.overlap_grad_reduce")

_DEVICE = "cluster.device"
_IMPLEMENTATION = "model.transformer_impl"
_ATTENTION = "model.attention_backend"
_HEAD = "model.kv_channels"
_TEXT = "model.crossattn_emb_size"
_RECOMPUTED = "model.recompute_modules"

_SINCE = {name: gpu.capability for name, gpu in GPUS.items()}
_FP8_SINCE = 89
_BLOCKWISE_SINCE = 90
_MXFP8_SINCE = 100
_FLASH_SINCE = 90


def _set_by_user(view: View, *keys: str) -> str:
    """The first of the keys that a person set; the recipe's, where nobody set any."""
    return next((key for key in keys if view.is_set_by_user(key)), RECIPE)


def _recipe(view: View) -> Iterator[Finding]:
    name = view[RECIPE]
    if name in PRECISIONS:
        return
    close = get_close_matches(name, PRECISIONS, n=1, cutoff=0.5)
    names = ", ".join(PRECISIONS)
    hint = f"did you mean {close[0]}?" if close else f"one of: {names}"
    yield Finding(path(RECIPE), f"mixed_precision {name} is not one of Megatron-Bridge's recipes", hint)


def _not_bf16(view: View) -> Iterator[Finding]:
    # Without a recipe, nothing puts the number formats together.
    if view.or_null(RECIPE) is None:
        yield Finding(
            path(RECIPE),
            "mixed_precision null leaves the number formats to what the recipe put into model, ddp and optimizer",
            "remove it to have bf16_mixed",
        )
    # An unknown recipe is PRE102's.
    elif view[RECIPE] in PRECISIONS and (not view[_BF16] or view.or_null(_PARAMETERS) != "torch.bfloat16"):
        yield Finding(
            path(_set_by_user(view, _BF16, _PARAMETERS)),
            "DFM's DiT casts its embedders and noise levels to bf16 whatever the precision",
            "use bf16_mixed, or one of the bf16_with_ recipes",
        )


def _fp8_layers(view: View) -> Iterator[Finding]:
    most = view[LAYERS] // view[PP]
    if not (view[_FP8] and view[_ENDS_IN_BF16]):
        return
    # Delayed scaling has one FP8 context around all layers.
    if view[_FP8_RECIPE] == "delayed":
        message = "delayed scaling cannot leave the first and last layers in bf16"
        yield Finding(path(_ENDS_IN_BF16), message, "set it to false, or use another fp8_recipe")
    # They are counted within a pipeline stage.
    for key in _LAYERS_AT_ENDS:
        if not 0 <= view[key] <= most:
            message = f"{key} {view[key]} is not between 0 and the {most} layers of a stage"
            yield Finding(path(key), message, f"0 to {most}")


def _mxfp8(view: View) -> Iterator[Finding]:
    gather = view[_GATHER]
    reuse = view[_REUSE]
    at = path(_set_by_user(view, _REUSE, _GATHER))
    # In mxfp8 each of the two flags needs the other.
    if gather and view[_FP8_RECIPE] == "mxfp8" and not reuse:
        message = "mxfp8 with fp8_param_gather needs reuse_grad_buf_for_mxfp8_param_ag"
        yield Finding(at, message, f"set {_REUSE} to true")
    if reuse and not gather:
        message = "reuse_grad_buf_for_mxfp8_param_ag needs fp8_param_gather"
        yield Finding(at, message, f"set {_GATHER} to true")
    # A buffer that two collectives share takes them in turns, which both overlaps arrange.
    if reuse:
        off = " and ".join(key for key in _OVERLAPS if not _overlap(view, key))
        if off:
            message = f"mxfp8 parameters need {off}; without, gradients become NaN"
            yield Finding(at, message, f"set {off} to true")


def _overlap(view: View, key: str) -> bool:
    """The flag as comm_overlap leaves it."""
    name = key.split(".")[1]
    chosen = view.or_null(f"comm_overlap.{name}")
    # comm_overlap writes the flag only where there is such a section, and a distributed optimizer.
    if not view.section("comm_overlap") or not view["ddp.use_distributed_optimizer"]:
        return bool(view[key])
    if chosen is None:
        return view.data_parallel_size > 1
    return bool(chosen)


class _Side(NamedTuple):
    """One side of a matrix product."""

    key: str
    """Where a finding about it stands."""
    words: str
    """How it is called in the message."""
    size: int
    hint: str


def _step(view: View) -> int:
    """What Transformer Engine's FP8 products need of every side: mxfp8 scales blocks of 32."""
    return 32 if view[_FP8_RECIPE] == "mxfp8" else 16


def _alignment(view: View) -> Iterator[Finding]:
    if not view[_FP8]:
        return
    step = _step(view)
    tp = view[TP]
    hidden = view[HIDDEN]
    hint = f"a multiple of {step}, or no fp8"
    sides = (
        _Side(HIDDEN, HIDDEN, hidden, hint),
        _Side(FFN, f"{FFN} / TP {tp}", view[FFN] // tp, hint),
        _Side(HIDDEN, f"3 x hidden_size / TP {tp}", 3 * hidden // tp, hint),
        _Side(_TEXT, _TEXT, view[_TEXT], hint),
    )
    for side in sides:
        if side.size % step:
            message = f"fp8 matrix products need widths in multiples of {step}, and {side.words} is {side.size}"
            yield Finding(path(side.key), message, side.hint)
            return


def _shared_tokens(view: View) -> Iterator[Finding]:
    step = _step(view)
    tp = view[TP] if view[SP] else 1
    cp = view[CP]
    ranks = tp * cp
    if not view[_FP8] or ranks <= 1:
        return
    # Ranks that do not divide a sample's tokens are SEQ102's.
    if PAD % ranks:
        return
    share = PAD // ranks
    if share % step:
        words = " x ".join(f"{name} {size}" for name, size in (("TP", tp), ("CP", cp)) if size > 1)
        most = PAD // step
        yield Finding(
            path(CP if cp > 1 else TP),
            f"fp8 matrix products need tokens in multiples of {step}, and a sample's {PAD} over {words} are {share}",
            f"at most {most}, or no fp8",
            WARNING,
        )


def _own_alignment(view: View) -> Iterator[Finding]:
    if not view[_FP8]:
        return
    for side in _own_sides(view):
        if side.size % FP8_ALIGNMENT:
            message = f"FP8 matrix products need sides in multiples of {FP8_ALIGNMENT}, and {side.words} is {side.size}"
            yield Finding(path(side.key), message, side.hint)


def _own_sides(view: View) -> tuple[_Side, ...]:
    """The sides of our trainer's FP8 products: widths of the network, and a rank's tokens."""
    tp = view[TP]
    cp = view[CP]
    packs = view["train.micro_batch_size"]

    # What the tokens of a product are, in words.
    tokens = "a pack's length"
    if packs > 1:
        tokens += f" x train.micro_batch_size {packs}"
    if cp > 1:
        tokens += f" / CP {cp}"

    # What helps: widths that TP divides well, or longer packs.
    over_tp = "" if tp == 1 else f" / TP {tp}"
    key = "dataset.task_encoder_seq_length"
    whole = FP8_ALIGNMENT * cp
    longer = f"{key} in multiples of {whole}, or no {_FP8}"
    wider = f"sizes that TP divides into multiples of {FP8_ALIGNMENT}, or no {_FP8}"

    length = view["model.seq_length"]
    attention = view[_HEAD] * view["model.num_attention_heads"]
    return (
        _Side(HIDDEN, HIDDEN, view[HIDDEN], wider),
        _Side(FFN, f"{FFN}{over_tp}", view[FFN] // tp, wider),
        _Side(_HEAD, f"kv_channels x heads{over_tp}", attention // tp, wider),
        _Side(_TEXT, _TEXT, view[_TEXT], wider),
        _Side(key, tokens, length * packs // cp, longer),
    )


def _without_fp8(view: View) -> str:
    if view[_DEVICE] == "cpu":
        return "FP8 matrix products are for GPUs, and cluster.device is cpu"
    return "FP8 matrix products take bf16 activations, and bf16 is off"


_NO_FLASH = {_DEVICE: "cpu", _IMPLEMENTATION: "local", _BF16: False}
"""Values with which FlashAttention 4 is never called."""


def _own_kernels(view: View) -> Iterator[Finding]:
    gpu = view.or_null("cluster.gpu")
    head = view[_HEAD]
    off = _never_flash(view)
    has = _SINCE.get(gpu)
    if view[_ATTENTION] == "flash":
        # The key does nothing.
        if off:
            message = f"FlashAttention 4 is for Transformer Engine's layers in bf16 on a GPU, and {off}"
            yield Finding(path(_ATTENTION), message, "set it to auto", WARNING)
        # The kernel does not run on this GPU.
        elif has is not None and has < _FLASH_SINCE:
            message = f"FlashAttention 4 needs compute capability 9.0, and {gpu} has {_version(has)}"
            yield Finding(path(_ATTENTION), message, "set it to auto")
        # It runs, and nobody compared its gradients.
        elif head not in FLASH_HEADS:
            heads = ", ".join(map(str, FLASH_HEADS))
            message = (
                f"FlashAttention 4's gradients were compared with plain attention at heads of {heads} channels, "
                f"and a head has {head}"
            )
            yield Finding(path(_ATTENTION), message, "set it to auto")
    if view.or_null(_FP8) and has is not None and has < _FP8_SINCE:
        message = f"FP8 matrix products need compute capability 8.9, and {gpu} has {_version(has)}"
        yield Finding(path(_FP8), message, f"remove {_FP8}")


def _never_flash(view: View) -> str:
    """The first value with which FlashAttention 4 is never called, in words."""
    for key, value in _NO_FLASH.items():
        if view[key] == value:
            return f"{key} is {as_yaml(view[key])}"
    return ""


def _version(capability: int) -> float:
    return capability / 10


def _hardware(view: View) -> Iterator[Finding]:
    gpu = view["cluster.gpu"]
    has = _SINCE[gpu]
    recipe = view[_FP8_RECIPE] if view.or_null(_FP8) else None
    needs = _capability_for(view, recipe)
    if has < needs:
        what = f"fp8 recipe {recipe}"
        if view.or_null(_FP4):
            what = "fp4"
        works = ", ".join(name for name, capability in _SINCE.items() if capability >= needs)
        message = f"{what} needs compute capability {_version(needs)}, and {gpu} has {_version(has)}"
        yield Finding(path(RECIPE), message, f"a GPU of: {works}")


def _capability_for(view: View, fp8_recipe: str | None) -> int:
    """The compute capability, times ten, that the number formats need."""
    if fp8_recipe == "mxfp8" or view.or_null(_FP4):
        return _MXFP8_SINCE
    if fp8_recipe == "blockwise":
        return _BLOCKWISE_SINCE
    if fp8_recipe:
        return _FP8_SINCE
    return 0


def _recomputes_with_delayed_scaling(view: View) -> bool:
    delayed = view.or_null(_FP8) and view[_FP8_RECIPE] == "delayed"
    if not delayed or view.or_null("model.recompute_granularity") != "selective":
        return False
    modules = view.or_null(_RECOMPUTED) or ()
    return not {"layernorm", "moe_act"}.isdisjoint(modules)


def _custom_needs_a_factory(name: str) -> Check:
    """A custom recipe of a number format is whatever a function of the user's makes."""
    on = f"mixed_precision.{name}"
    recipe = f"mixed_precision.{name}_recipe"
    factory = f"model.{name}_quantizer_factory"
    return excludes(
        lambda v: v[on] and v[recipe] == "custom" and not v.or_null(factory),
        at=recipe,
        message=f"{name}_recipe custom needs {factory}",
        hint="name the factory, or use a recipe that exists",
    )


_FP8_RECIPES = ("tensorwise", "delayed", "mxfp8", "blockwise", "custom")
_TC = "megatron-core transformer/transformer_config.py, __post_init__"
_MP = "Megatron-Bridge training/mixed_precision.py"

RULES = (
    # Which format the network computes in.
    Rule(
        "PRE101",
        "transformer-engine-on-cpu",
        ERROR,
        excludes(
            lambda v: v[_DEVICE] == "cpu" and v[_IMPLEMENTATION] == "transformer_engine",
            at=_IMPLEMENTATION,
            message="Transformer Engine has no CPU kernels",
            hint="remove model.transformer_impl to have it derived",
        ),
        "The import fails on every rank.",
        "Transformer Engine",
        targets=OURS,
    ),
    Rule(
        "PRE102",
        "precision-recipe-unknown",
        ERROR,
        _recipe,
        "Every rank stops with a ValueError before the configuration is checked.",
        f"{_MP}, get_mixed_precision_config",
        targets=DFM,
    ),
    Rule(
        "PRE103",
        "precision-not-bf16",
        ERROR,
        _not_bf16,
        (
            "Accepted at start; types do not match in the first iteration, "
            "or the network trains in another precision than the file says, in silence."
        ),
        "NVIDIA DFM model/common/dit_embeddings.py, model/dit/dit_model.py, edm/edm_pipeline.py",
        targets=DFM,
    ),
    Rule(
        "PRE104",
        "two-precisions",
        ERROR,
        together(
            excludes(
                lambda v: v[_BF16] and v[_FP16],
                at=lambda v: _FP16 if v.is_set_by_user(_FP16) else _BF16,
                message="bf16 and fp16 are both on",
                hint="use bf16; DiT needs it",
            ),
            excludes(
                lambda v: v[_FP8] and v[_FP4],
                at=lambda v: _FP8 if v.is_set_by_user(_FP8) else _FP4,
                message="fp8 and fp4 are both on",
                hint="use one of the two",
            ),
        ),
        "Megatron refuses two formats at once.",
        f"{_MP}; {_TC}",
        targets=DFM,
    ),
    # What FP8 needs of DFM.
    Rule(
        "PRE105",
        "fp8-parameters-without-fp8",
        ERROR,
        excludes(
            lambda v: v[_GATHER] and not v.or_null(_FP8),
            at=_GATHER,
            message="fp8_param_gather gathers fp8 parameters, and fp8 is off",
            hint=f"set {_FP8} to hybrid, or fp8_param_gather to false",
        ),
        "megatron-core raises a ValueError when the configuration is built.",
        _TC,
        targets=DFM,
    ),
    Rule(
        "PRE106",
        "fp8-layers-impossible",
        ERROR,
        _fp8_layers,
        "megatron-core raises a ValueError when the configuration is built.",
        _TC,
        targets=DFM,
    ),
    Rule(
        "PRE107",
        "mxfp8-incomplete",
        ERROR,
        _mxfp8,
        "Refused at start: without the overlaps, mxfp8 parameters give NaN.",
        f"{_MP}, finalize; megatron-core DistributedDataParallelConfig",
        targets=DFM,
    ),
    Rule(
        "PRE108",
        "fp8-sizes-not-aligned",
        ERROR,
        together(
            _alignment,
            _shared_tokens,
        ),
        "Accepted at start; Transformer Engine refuses the first matrix product whose size does not fit.",
        "megatron-core fp8_utils.py",
        targets=DFM_DIT,
    ),
    # What FP8 and kernels need of our trainer.
    Rule(
        "PRE114",
        "fp8-sizes-of-the-trainer",
        ERROR,
        _own_alignment,
        (
            "cuBLAS refuses the first product with a side that is no multiple of 16. "
            "Texts are padded to it; a pack is not."
        ),
        "cuBLAS, Using the cublasLt API: FP8; dfmspec/trainer/ops/fp8.py",
        targets=OURS,
    ),
    Rule(
        "PRE115",
        "fp8-without-bf16",
        ERROR,
        excludes(
            lambda v: v[_FP8] and (v[_DEVICE] == "cpu" or not v[_BF16]),
            at=_FP8,
            message=_without_fp8,
            hint=f"remove {_FP8}",
        ),
        "The first product fails.",
        "dfmspec/trainer/ops/fp8.py",
        targets=OURS,
    ),
    Rule(
        "PRE116",
        "kernels-without-their-gpu",
        ERROR,
        _own_kernels,
        "The first call of the kernel fails; where it is never called, the key does nothing, in silence.",
        "flash-attn-4; NVIDIA's compute capabilities",
        targets=OURS,
    ),
    # What formats need of a GPU, and of one another.
    Rule(
        "PRE109",
        "precision-unsupported-by-gpu",
        ERROR,
        _hardware,
        "Accepted at start; Transformer Engine refuses it in the first iteration.",
        "NVIDIA's compute capabilities",
        targets=DFM,
    ),
    Rule(
        "PRE110",
        "fp8-recompute-impossible",
        ERROR,
        excludes(
            _recomputes_with_delayed_scaling,
            at=_RECOMPUTED,
            message="delayed scaling cannot recompute layernorm or moe_act",
            hint="use another fp8_recipe, or other modules",
        ),
        "megatron-core raises a ValueError when the configuration is built.",
        _TC,
        targets=DFM,
    ),
    Rule(
        "PRE111",
        "custom-recipe-without-factory",
        ERROR,
        together(
            _custom_needs_a_factory("fp8"),
            _custom_needs_a_factory("fp4"),
        ),
        "megatron-core raises a ValueError when the configuration is built.",
        _TC,
        targets=DFM,
    ),
    # Formats that nobody tried, or that do not exist.
    Rule(
        "PRE112",
        "fp8-untested-on-dit",
        HINT,
        excludes(
            lambda v: v.or_null(_FP8) or v.or_null(_FP4),
            at=lambda v: _set_by_user(v, RECIPE, _FP8, _FP4),
            message="no fp8 or fp4 configuration of DFM's DiT is published: its numbers are unknown",
            hint="compare a short run with bf16_mixed first",
        ),
        "adaLN and the embedders stay in bf16; whether the loss follows bf16 is for a trial to show.",
        "NVIDIA DFM examples",
        targets=DFM_DIT,
    ),
    Rule(
        "PRE113",
        "fp8-word-unknown",
        ERROR,
        together(
            excludes(
                lambda v: v[_FP8] not in (None, "hybrid", "e4m3"),
                at=_FP8,
                message=lambda v: f"{_FP8} {v[_FP8]} is not a format that Megatron takes",
                hint="hybrid or e4m3",
            ),
            excludes(
                lambda v: v[_FP4] not in (None, "e2m1"),
                at=_FP4,
                message=lambda v: f"{_FP4} {v[_FP4]} is not a format that Megatron takes",
                hint="e2m1",
            ),
            excludes(
                lambda v: v[_FP8] and v[_FP8_RECIPE] not in _FP8_RECIPES,
                at=_FP8_RECIPE,
                message=lambda v: f"{_FP8_RECIPE} {v[_FP8_RECIPE]} is not known",
                hint="tensorwise, delayed, mxfp8, blockwise or custom",
            ),
        ),
        "Any word is accepted at start; Transformer Engine fails in the first iteration.",
        "megatron-core enums.py and fp8_utils.py",
        targets=DFM,
    ),
)
