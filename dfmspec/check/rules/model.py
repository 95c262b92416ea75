"""MOD, SMP: the network's geometry, what it recomputes, and the sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dfmspec.check.rules.base import (
    DFM,
    DFM_DIT,
    DIT,
    ERROR,
    HEADS,
    HIDDEN,
    HINT,
    LAYERS,
    LENGTH,
    OURS,
    PP,
    SP,
    TP,
    VPP,
    WARNING,
    Check,
    Rule,
    View,
    excludes,
    listed,
    path,
    requires,
    same,
    together,
)
from dfmspec.data.encoders import EMBEDDED_PICTURES, EMBEDDED_TEXTS
from dfmspec.diagnostics import Finding
from dfmspec.targets.layout import nearest_multiples

_SOURCE = "data.source"
_HEAD_WIDTH = "model.kv_channels"
_MAX_HEIGHT = "model.max_img_h"
_MAX_WIDTH = "model.max_img_w"

# How latents are cut, by the model and in DFM's random data.
_PATCH = "model.patch_spatial"
_FRAMES = "model.patch_temporal"
_MOCK_PATCH = "dataset.patch_spatial"
_MOCK_FRAMES = "dataset.patch_temporal"

# What is recomputed in the backward pass.
_GRANULARITY = "model.recompute_granularity"
_METHOD = "model.recompute_method"
_RECOMPUTED = "model.recompute_num_layers"
_MODULES = "model.recompute_modules"
_DISTRIBUTED = "model.distribute_saved_activations"
_EXPERTS_RECOMPUTED = "model.moe_layer_recompute"

# Options of megatron-core that the DiT makes little or no use of.
_FUSION = "model.bias_activation_fusion"
_TE_ACTIVATION = "model.use_te_activation_func"
_FP8_INPUT = "model.activation_func_fp8_input_store"
_VOCABULARY = "model.vocab_size"
_TOKENIZERS = "tokenizer.vocab_size"
_OFFLOADING = "model.fine_grained_activation_offloading"
_NO_ROTARY = "model.no_rope_freq"
_LATENT_ATTENTION = "model.multi_latent_attention"
_VARIANT = "model.experimental_attention_variant"
_LINEAR = "model.linear_attention_type"
_NORMALIZATION = "model.normalization"

_SIGMA_MIN = "diffusion.sigma_min"
_SIGMA_MAX = "diffusion.sigma_max"


def _position_width(view: View) -> Iterator[Finding]:
    hidden = view[HIDDEN]
    if hidden % 16:
        near = listed(nearest_multiples(hidden, 16), " or ")
        yield Finding(
            path(HIDDEN),
            f"{HIDDEN} {hidden} is not a multiple of 16: "
            "3-D sin-cos positions take 1/4 for time and 3/8 for each side, in pairs",
            f"{HIDDEN} {near}",
        )


def _head_counts(hidden: int) -> list[int]:
    """The numbers of heads up to 64 whose width fused attention takes: a multiple of 8, at most 256."""
    fitting = []
    for heads in range(1, 65):
        width = hidden // heads
        if hidden % heads == 0 and width % 8 == 0 and width <= 256:
            fitting.append(heads)
    return fitting


def _heads(view: View) -> Iterator[Finding]:
    hidden = view[HIDDEN]
    heads = view[HEADS]
    if hidden % heads == 0:
        return
    # TP is asked for where a number of heads is left to be judged by it.
    works = [number for number in _head_counts(hidden) if number % view[TP] == 0]
    suits = listed(works) or "no number that suits attention kernels"
    near = listed(nearest_multiples(hidden, math.lcm(heads, 16)), " or ")
    yield Finding(
        path(view.key_set_by_user(HEADS, otherwise=HIDDEN)),
        f"{HIDDEN} {hidden} is not a multiple of {HEADS} {heads}; a head is an equal share of the width",
        f"{HEADS} may be {suits}; or {HIDDEN} {near}",
    )


def _head_width(view: View) -> Iterator[Finding]:
    width = view[_HEAD_WIDTH]
    hidden = view[HIDDEN]
    # A width that is no whole share is MOD101's.
    if hidden % view[HEADS] and not view.is_set_by_user(_HEAD_WIDTH):
        return
    if width % 8 or width > 256:
        works = listed(_head_counts(hidden)) or "none: change hidden_size"
        yield Finding(
            path(view.key_set_by_user(HEADS, otherwise=HIDDEN)),
            f"a head is {width} wide; fused attention needs a multiple of 8, at most 256",
            f"num_attention_heads may be {works}",
        )


def _recompute(view: View) -> Iterator[Finding]:
    granularity = view.or_null(_GRANULARITY)
    method = view.or_null(_METHOD)
    layers = view.or_null(_RECOMPUTED)
    if granularity == "full":
        yield from _full_recomputation(view, method, layers)
    elif granularity == "selective" and layers is not None:
        yield Finding(
            path(_RECOMPUTED),
            "recompute_granularity selective takes modules, not layers",
            "remove model.recompute_num_layers",
        )
    elif granularity is None and (method or layers):
        yield Finding(
            path(_METHOD if method else _RECOMPUTED),
            "recompute_method and recompute_num_layers do nothing without recompute_granularity",
            "set model.recompute_granularity=full, or remove them",
            WARNING,
        )


def _full_recomputation(view: View, method: str | None, layers: int | None) -> Iterator[Finding]:
    # It needs to know which layers.
    missing = []
    if method is None:
        missing.append("recompute_method")
    if layers is None:
        missing.append("recompute_num_layers")
    if method is None or layers is None:
        names = listed(missing, " and ")
        yield Finding(
            path(_GRANULARITY),
            f"recompute_granularity full needs {names}",
            "for example model.recompute_method=uniform model.recompute_num_layers=1",
        )
        return

    # Uniform: groups of so many layers, in the whole of each rank's chunk.
    if method == "uniform" and view.trainer.OWN:
        chunk = view[LAYERS] // (view[PP] * (view.or_null(VPP) or 1))
        if chunk % layers:
            works = listed(number for number in range(1, chunk + 1) if chunk % number == 0)
            yield Finding(
                path(_RECOMPUTED),
                f"recompute_method uniform goes over {chunk} layers of a rank by {layers}, and past the last of them",
                f"model.recompute_num_layers {works}; or recompute_method block",
            )
            return

    there = view[LAYERS]
    if layers > there:
        yield Finding(
            path(_RECOMPUTED),
            f"recompute_num_layers {layers} is more than the {there} layers",
            f"1 to {there}",
            WARNING,
        )


_ABSENT = {
    "moe_act": "model.moe_grouped_gemm",
    "mla_up_proj": "model.multi_latent_attention",
    "moe": "experts",
    "shared_experts": "experts",
}
"""What each module belongs to that megatron-core can recompute, and that no network here has."""


def _modules(view: View) -> Iterator[Finding]:
    modules = view[_MODULES]
    granularity = view.or_null(_GRANULARITY)
    if not view.is_set_by_user(_MODULES):
        return
    if granularity != "selective":
        yield Finding(
            path(_MODULES),
            f"{_MODULES} does nothing without recompute_granularity selective",
            "set it, or remove the modules",
            WARNING,
        )
        return

    for module in modules:
        # Every network's attention asks for it.
        if module == "core_attn":
            continue
        if module in ("mlp", "layernorm"):
            if view.network == "dit":
                yield Finding(
                    path(_MODULES),
                    f"recompute module {module} has no effect: the DiT's block does not ask for it",
                    "core_attn, or full recomputation",
                    WARNING,
                )
            continue
        reason = "is not known"
        if module in _ABSENT:
            reason = f"needs {_ABSENT[module]}, which the network does not have"
        yield Finding(path(_MODULES), f"recompute module {module} {reason}", "core_attn, or full recomputation")


_EMBEDDED = {
    "model.in_channels": EMBEDDED_PICTURES.channels,
    "model.patch_temporal": 1,
    "model.crossattn_emb_size": EMBEDDED_TEXTS.width,
}
"""The shapes of the latents and texts of `data.source: embedded`."""


def _embedded_fits(view: View) -> Iterator[Finding]:
    if view[_SOURCE] == "webdataset":
        return
    # A latent has an eighth of the picture's side.
    side = view["data.resolution"] // EMBEDDED_PICTURES.compression
    pixels = side * 8
    patch = view[_PATCH]
    length = view[LENGTH]

    # A picture has a place in the position table.
    for key in (_MAX_HEIGHT, _MAX_WIDTH):
        most = view[key]
        if side > most:
            yield Finding(
                path(key),
                f"pictures of {pixels} px are {side} latent pixels high and wide, more than {key} {most}",
                f"{key} {side} or more",
            )

    # It is cut into whole patches, which fit a pack.
    tokens = (side // patch) ** 2
    if side % patch:
        works = listed(size for size in (1, 2, 4) if side % size == 0)
        yield Finding(
            path(_PATCH),
            f"a latent of {side}x{side} is no whole number of {patch}x{patch} patches",
            f"{_PATCH} {works}",
        )
    elif tokens > length:
        yield Finding(
            path(LENGTH),
            f"one picture of {pixels} px has {tokens} tokens, but a pack has {length}",
            f"{LENGTH} {tokens} or more",
        )

    # The pictures that dfmspec draws have shapes of their own.
    if view[_SOURCE] != "embedded":
        return
    for key, value in _EMBEDDED.items():
        given = view[key]
        if given != value:
            yield Finding(
                path(key),
                f"{key} is {given}, but the embedded data has {value}",
                f"{key} {value}, or a dataset.path of your own",
            )


def _mock_whole_patches(view: View) -> Iterator[Finding]:
    if not view.is_mock:
        return
    for key in ("dataset.H_latents", "dataset.W_latents"):
        size = view[key]
        patch = view[_MOCK_PATCH]
        if size % patch:
            near = listed(nearest_multiples(size, patch), " or ")
            yield Finding(
                path(key),
                f"{key} {size} is not a multiple of dataset.patch_spatial {patch}",
                f"{key} {near}",
            )


_POSITIONS = {
    "dataset.F_latents": "model.max_frames",
    "dataset.H_latents": _MAX_HEIGHT,
    "dataset.W_latents": _MAX_WIDTH,
}
"""The sizes of DFM's random data, and the axes of the position table that hold them."""


def _mock_positions(view: View) -> Iterator[Finding]:
    if not view.is_mock:
        return
    for key, most in _POSITIONS.items():
        size = view[key]
        limit = view[most]
        if size > limit:
            severity = None if view.is_set_by_user(key) else HINT
            yield Finding(
                path(key),
                f"{key} {size} is beyond the position table of {most} {limit}: positions of other places are used",
                f"at most {limit}, or a larger {most}",
                severity,
            )


def _other_patches(view: View) -> bool:
    spatial: int = view[_PATCH]
    temporal: int = view[_FRAMES]
    return spatial != 2 or temporal != 1


def _always_2x2x1(view: View) -> str:
    spatial = view[_PATCH]
    temporal = view[_FRAMES]
    return f"{_PATCH} {spatial} and patch_temporal {temporal}: DFM's task encoder always cuts patches of 2x2x1"


def _table_not_square(view: View) -> bool:
    height: int = view[_MAX_HEIGHT]
    width: int = view[_MAX_WIDTH]
    return height != width or height % view[_PATCH] != 0


def _axes_swapped(view: View) -> str:
    height = view[_MAX_HEIGHT]
    width = view[_MAX_WIDTH]
    return f"max_img_h {height} and max_img_w {width}: DFM's position table swaps the axes of one that is not square"


def _mock_cut_otherwise(view: View) -> bool:
    if not view.is_mock:
        return False
    spatial: int = view[_MOCK_PATCH]
    temporal: int = view[_MOCK_FRAMES]
    return spatial != view[_PATCH] or temporal != 1


def _no_bias_to_fuse(view: View) -> bool:
    return view[_FUSION] and not view["model.gated_linear_unit"] and not view["model.add_bias_linear"]


_LAYOUT = ("model.add_bias_linear", "model.gated_linear_unit", "model.add_qkv_bias")
"""What adds parameters to a block, or takes some away."""


def _changes_of_layout(view: View) -> Iterator[str]:
    return (key for key in _LAYOUT if view[key])


def _below_the_tokenizers(view: View) -> bool:
    if view.network == "dit":
        return False
    size = view[_VOCABULARY]
    return size is not None and size < (view[_TOKENIZERS] or 0)


def _no_such_dropout(key: str) -> Check:
    """A rate of dropout is a probability, and drops not everything."""
    return excludes(
        lambda v: v[key] is not None and not 0 <= v[key] < 1,
        at=key,
        message=lambda v: f"{key} {v[key]} must be at least 0 and below 1",
        hint="0 for none, as the DiT has",
    )


def _must_be_below_one(key: str, hint: str) -> Check:
    return excludes(
        lambda v: v[key] >= 1,
        at=key,
        message=lambda v: f"{key} {v[key]} must be below 1",
        hint=hint,
    )


_TC = "megatron-core transformer/transformer_config.py, __post_init__"

RULES = (
    # Widths, and what is recomputed.
    Rule(
        "MOD101",
        "hidden-not-divisible-by-heads",
        ERROR,
        _heads,
        "The width of a head is a floor division: attention would be narrower than the model, in silence.",
        _TC,
    ),
    Rule(
        "MOD102",
        "hidden-size-not-multiple-of-16",
        ERROR,
        _position_width,
        "The position embedding is split over three axes, and each into sines and cosines; the model cannot be built.",
        "NVIDIA DFM model/common/dit_embeddings.py",
        targets=DIT,
    ),
    Rule(
        "MOD103",
        "recompute-incomplete",
        ERROR,
        _recompute,
        "megatron-core raises a ValueError when the configuration is built. Without a granularity, and for more layers "
        "than there are, it says nothing and recomputes something else, in silence.",
        _TC,
    ),
    # Pictures, patches and positions.
    Rule(
        "MOD104",
        "picture-does-not-fit",
        ERROR,
        _embedded_fits,
        "The first batch would stop the run.",
        "dfmspec/trainer/data/patches.py",
        targets=OURS,
    ),
    Rule(
        "MOD105",
        "fixed-by-dfm",
        ERROR,
        excludes(
            _other_patches,
            at=lambda v: _PATCH if v[_PATCH] != 2 else _FRAMES,
            message=_always_2x2x1,
            hint="set patch_spatial 2 and patch_temporal 1",
        ),
        "Accepted at start; shapes do not match in the first iteration, or validation decodes other patches in "
        "silence.",
        "NVIDIA DFM data/common/diffusion_energon_datamodule.py, dit_model_provider.py",
        targets=DFM_DIT,
    ),
    Rule(
        "MOD106",
        "head-width-unsupported",
        WARNING,
        _head_width,
        "Accepted at start; attention falls back to an unfused kernel, slower by far, in silence, or Transformer "
        "Engine refuses it in the first iteration.",
        "Transformer Engine's fused attention",
        targets=DIT,
    ),
    Rule(
        "MOD107",
        "hidden-size-below-256",
        ERROR,
        excludes(
            lambda v: v[HIDDEN] < 256,
            at=HIDDEN,
            message=lambda v: f"{HIDDEN} {v[HIDDEN]} is less than 256, the width of DFM's frame-rate embedding",
            hint="256 or more, a multiple of 16",
        ),
        "The embedding is padded up to hidden_size; below, the padding is negative and crops it in silence.",
        "NVIDIA DFM model/dit/dit_model.py",
        targets=DFM_DIT,
    ),
    Rule(
        "MOD108",
        "mock-beyond-positions",
        WARNING,
        _mock_positions,
        "One flat index serves three axes, so an overflow of one takes another place's position in silence; beyond "
        "the table the GPU asserts.",
        "NVIDIA DFM model/common/dit_embeddings.py",
        targets=DFM_DIT,
    ),
    Rule(
        "MOD109",
        "position-table-not-square",
        WARNING,
        excludes(
            _table_not_square,
            at=_MAX_HEIGHT,
            message=_axes_swapped,
            hint="set both to the larger, a multiple of patch_spatial",
        ),
        "The table is built height first where its helper takes width first, so positions are mixed up in silence.",
        "NVIDIA DFM model/common/dit_embeddings.py",
        targets=DFM_DIT,
    ),
    Rule(
        "MOD110",
        "mock-data-do-not-fit",
        ERROR,
        together(
            excludes(
                _mock_cut_otherwise,
                at=lambda v: _MOCK_PATCH if v[_MOCK_PATCH] != v[_PATCH] else _MOCK_FRAMES,
                message="the random data are cut into other patches than the model takes",
                hint="set dataset.patch_spatial to model.patch_spatial, and patch_temporal to 1",
            ),
            same(
                "dataset.context_embeddings_dim",
                "model.crossattn_emb_size",
                when=lambda v: v.is_mock,
                what="the width of a text",
            ),
            _mock_whole_patches,
        ),
        "Accepted at start; shapes do not match in the first iteration.",
        "NVIDIA DFM data/dit/dit_mock_datamodule.py",
        targets=DFM_DIT,
    ),
    # The block: its activation and its parameters.
    Rule(
        "MOD111",
        "activation-impossible",
        ERROR,
        together(
            excludes(
                _no_bias_to_fuse,
                at=_FUSION,
                message="bias_activation_fusion fuses a bias that the MLP does not have",
                hint="set it to false, or model.add_bias_linear to true",
            ),
            excludes(
                lambda v: v[_FUSION] and v[_TE_ACTIVATION],
                at=_TE_ACTIVATION,
                message="bias_activation_fusion and use_te_activation_func exclude each other",
                hint="use one of the two",
            ),
            excludes(
                lambda v: v[_FP8_INPUT],
                at=_FP8_INPUT,
                message="activation_func_fp8_input_store is for SwiGLU only, and DiT's activation is GELU",
                hint="remove it",
            ),
        ),
        "megatron-core raises a ValueError when the configuration is built.",
        _TC,
        targets=DFM_DIT,
    ),
    Rule(
        "MOD112",
        "checkpoint-layout-changed",
        HINT,
        excludes(
            lambda v: any(_changes_of_layout(v)),
            at=lambda v: next(_changes_of_layout(v)),
            message="this changes the parameters of every block: checkpoints of the published DiT no longer fit",
            hint="leave it out to stay compatible",
        ),
        "Loading a checkpoint of the other kind fails after the model is built.",
        "NVIDIA DFM model/dit/dit_model_provider.py",
        targets=DFM_DIT,
    ),
    # What recomputation cannot be of, or with.
    Rule(
        "MOD113",
        "recompute-module-unsupported",
        ERROR,
        _modules,
        "megatron-core refuses modules of other models, and names it does not know; a module the network lacks is "
        "recomputed nowhere, in silence.",
        _TC,
        targets=DFM,
    ),
    Rule(
        "MOD114",
        "recompute-excluded",
        ERROR,
        together(
            excludes(
                lambda v: v[_DISTRIBUTED] and v[_GRANULARITY] and v[SP],
                at=_DISTRIBUTED,
                message="distribute_saved_activations cuts what sequence_parallel has cut already",
                hint="use one of the two",
            ),
            excludes(
                lambda v: v[_EXPERTS_RECOMPUTED],
                at=_EXPERTS_RECOMPUTED,
                message="moe_layer_recompute recomputes experts, and the DiT has none; "
                "it turns selective recomputation on",
                hint="remove it",
            ),
        ),
        "megatron-core raises a ValueError, or turns on a recomputation that nobody asked for, in silence.",
        _TC,
        targets=DFM,
    ),
    # Options of other models.
    Rule(
        "MOD115",
        "vocabulary-without-text",
        ERROR,
        together(
            excludes(
                lambda v: v.network == "dit" and v.or_null(_VOCABULARY) is not None,
                at=_VOCABULARY,
                message=lambda v: f"{_VOCABULARY} {v[_VOCABULARY]}: the DiT has no vocabulary",
                hint="remove it",
            ),
            excludes(
                _below_the_tokenizers,
                at=_VOCABULARY,
                message=lambda v: f"{_VOCABULARY} {v[_VOCABULARY]} is less than the tokenizer's {v[_TOKENIZERS]}",
                hint="remove it",
            ),
        ),
        "A size below the tokenizer's stops the run; any other is padded and never used, in silence.",
        "Megatron-Bridge training/setup.py",
        targets=DFM,
    ),
    Rule(
        "MOD116",
        "offloading-impossible",
        ERROR,
        excludes(
            lambda v: v[_OFFLOADING],
            at=_OFFLOADING,
            message="fine_grained_activation_offloading needs a handler that only megatron-core's GPT model sets up",
            hint="set it to false, or use recomputation",
        ),
        "Refused with modules that do not fit; accepted with others, and then the first forward pass fails.",
        f"{_TC}; megatron-core models/gpt/gpt_model.py",
        targets=DFM,
    ),
    Rule(
        "MOD117",
        "language-model-option",
        ERROR,
        together(
            excludes(
                lambda v: v.or_null(_NO_ROTARY) is not None,
                at=_NO_ROTARY,
                message="model.no_rope_freq: the DiT has no rotary positions",
                hint="remove it",
            ),
            excludes(
                lambda v: v[_LATENT_ATTENTION],
                at=_LATENT_ATTENTION,
                message="multi_latent_attention belongs to another network; the DiT's attention ignores it",
                hint="remove it",
            ),
            excludes(
                lambda v: v.or_null(_VARIANT) or v.or_null(_LINEAR),
                at=lambda v: _VARIANT if v[_VARIANT] else _LINEAR,
                message="the DiT builds its own attention; experimental variants are of language models",
                hint="remove it",
            ),
        ),
        "Refused when the configuration is built, or accepted and never used, in silence.",
        _TC,
        targets=DFM_DIT,
    ),
    Rule(
        "MOD118",
        "normalization-without-effect",
        WARNING,
        excludes(
            lambda v: v.is_set_by_user(_NORMALIZATION) and v[_NORMALIZATION] != "LayerNorm",
            at=_NORMALIZATION,
            message=lambda v: (
                f"{_NORMALIZATION} {v[_NORMALIZATION]} has no effect: "
                "DiT's blocks have their own LayerNorm and q/k RMSNorm"
            ),
            hint="remove it",
        ),
        "Any word is accepted, and nothing changes, in silence.",
        "NVIDIA DFM model/dit/dit_layer_spec.py",
        targets=DFM_DIT,
    ),
    # Dropout, and parameters without a value.
    Rule(
        "MOD119",
        "dropout-impossible",
        ERROR,
        together(
            _no_such_dropout("model.hidden_dropout"),
            _no_such_dropout("model.attention_dropout"),
        ),
        "Accepted at start; torch refuses it in the first iteration, or drops everything.",
        "torch.nn.functional.dropout",
        targets=DFM,
    ),
    Rule(
        "MOD120",
        "meta-initialisation",
        ERROR,
        requires(
            "model.init_model_with_meta_device",
            ("ddp.use_megatron_fsdp", True),
            because="without FSDP nothing gives the parameters their values",
        ),
        "Accepted at start; the parameters stay without storage.",
        "Megatron-Bridge models/model_provider.py",
        targets=DFM_DIT,
    ),
    # The sampler and the averaged weights.
    Rule(
        "SMP101",
        "sampler-range-empty",
        ERROR,
        excludes(
            lambda v: v[_SIGMA_MIN] >= v[_SIGMA_MAX],
            at=_SIGMA_MIN,
            message=lambda v: f"{_SIGMA_MIN} {v[_SIGMA_MIN]} is not below {_SIGMA_MAX} {v[_SIGMA_MAX]}",
            hint="EDM's values are 0.002 and 80",
        ),
        "The noise levels of the sampler would not fall.",
        "Karras et al. 2022, equation 5",
        targets=OURS,
    ),
    Rule(
        "SMP102",
        "condition-always-dropped",
        ERROR,
        together(
            _must_be_below_one("diffusion.condition_dropout", hint="DFM drops 0.2 of the conditions"),
            _must_be_below_one("diffusion.ema_decay", hint="0.9999 is usual"),
        ),
        "The network would never see a text, or the averaged weights never change.",
        "dfmspec/trainer/optim/ema.py",
        targets=OURS,
    ),
)
