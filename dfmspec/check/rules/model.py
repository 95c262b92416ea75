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
    OURS,
    PP,
    SP,
    TP,
    VPP,
    WARNING,
    Rule,
    View,
    excludes,
    path,
    requires,
    same,
    together,
)
from dfmspec.diagnostics import Finding, Severity
from dfmspec.targets.layout import nearest_multiples


def _position_width(view: View) -> Iterator[Finding]:
    hidden = view[HIDDEN]
    if hidden % 16:
        yield Finding(
            path(HIDDEN), f"{HIDDEN} {hidden} is not a multiple of 16: 3-D sin-cos positions take 1/4 for time and 3/8 for each side, in pairs",
            f"{HIDDEN} {' or '.join(map(str, nearest_multiples(hidden, 16)))}",
        )  # fmt: skip


def _heads(view: View) -> Iterator[Finding]:
    hidden, heads = view[HIDDEN], view[HEADS]
    if hidden % heads:
        works = [n for n in range(1, 65) if hidden % n == 0 and hidden // n % 8 == 0 and hidden // n <= 256 and n % view[TP] == 0]
        near = " or ".join(map(str, nearest_multiples(hidden, math.lcm(heads, 16))))
        yield Finding(
            path(HEADS if view.is_users(HEADS) else HIDDEN), f"{HIDDEN} {hidden} is not a multiple of {HEADS} {heads}; a head is an equal share of the width",
            f"{HEADS} may be {', '.join(map(str, works)) or 'no number that suits attention kernels'}; or {HIDDEN} {near}",
        )  # fmt: skip


def _recompute(view: View) -> Iterator[Finding]:
    granularity, method, layers = (view[f"model.recompute_{name}"] for name in ("granularity", "method", "num_layers"))
    if granularity == "full" and (method is None or layers is None):
        missing = " and ".join(f"recompute_{name}" for name, value in (("method", method), ("num_layers", layers)) if value is None)
        yield Finding(
            path("model.recompute_granularity"), f"recompute_granularity full needs {missing}",
            "for example model.recompute_method=uniform model.recompute_num_layers=1",
        )  # fmt: skip
    elif granularity == "selective" and layers is not None:
        yield Finding(path("model.recompute_num_layers"), "recompute_granularity selective takes modules, not layers", "remove model.recompute_num_layers")
    elif granularity is None and (method or layers):
        yield Finding(
            path("model.recompute_method" if method else "model.recompute_num_layers"),
            "recompute_method and recompute_num_layers do nothing without recompute_granularity",
            "set model.recompute_granularity=full, or remove them", Severity.WARNING,
        )  # fmt: skip
    elif granularity == "full" and method == "uniform" and view.trainer.OWN and (chunk := view[LAYERS] // (view[PP] * (view[VPP] or 1))) % layers:
        yield Finding(
            path("model.recompute_num_layers"), f"recompute_method uniform goes over {chunk} layers of a rank by {layers}, and past the last of them",
            f"model.recompute_num_layers {', '.join(str(n) for n in range(1, chunk + 1) if chunk % n == 0)}; or recompute_method block",
        )  # fmt: skip
    elif granularity == "full" and layers > view[LAYERS]:
        yield Finding(path("model.recompute_num_layers"), f"recompute_num_layers {layers} is more than the {view[LAYERS]} layers", f"1 to {view[LAYERS]}", Severity.WARNING)


_ABSENT = {"moe_act": "model.moe_grouped_gemm", "mla_up_proj": "model.multi_latent_attention", "moe": "experts", "shared_experts": "experts"}


def _modules(view: View) -> Iterator[Finding]:
    key = "model.recompute_modules"
    modules, granularity = view[key], view["model.recompute_granularity"]
    if not view.is_users(key) or modules is None:
        return
    if granularity != "selective":
        yield Finding(path(key), f"{key} does nothing without recompute_granularity selective", "set it, or remove the modules", Severity.WARNING)
        return
    for module in modules:
        if module in ("mlp", "layernorm"):
            if view.network == "dit":
                yield Finding(path(key), f"recompute module {module} has no effect: the DiT's block does not ask for it", "core_attn, or full recomputation", Severity.WARNING)
        elif module != "core_attn":
            reason = f"needs {_ABSENT[module]}, which the network does not have" if module in _ABSENT else "is not known"
            yield Finding(path(key), f"recompute module {module} {reason}", "core_attn, or full recomputation")


def _head_width(view: View) -> Iterator[Finding]:
    width = view["model.kv_channels"]
    if view[HIDDEN] % view[HEADS] and not view.is_users("model.kv_channels"):
        return  # MOD101
    if width % 8 or width > 256:
        heads = [n for n in range(1, 65) if view[HIDDEN] % n == 0 and (view[HIDDEN] // n) % 8 == 0 and view[HIDDEN] // n <= 256]
        yield Finding(
            path(HEADS if view.is_users(HEADS) else HIDDEN), f"a head is {width} wide; fused attention needs a multiple of 8, at most 256",
            f"num_attention_heads may be {', '.join(map(str, heads)) or 'none: change hidden_size'}",
        )  # fmt: skip


def _embedded_fits(view: View) -> Iterator[Finding]:
    if view["data.source"] == "webdataset":
        return
    side, patch, length = view["data.resolution"] // 8, view["model.patch_spatial"], view["dataset.task_encoder_seq_length"]
    for axis in ("max_img_h", "max_img_w"):
        if side > view[f"model.{axis}"]:
            yield Finding(path(f"model.{axis}"), f"pictures of {side * 8} px are {side} latent pixels high and wide, more than model.{axis} {view[f'model.{axis}']}", f"model.{axis} {side} or more")
    if side % patch:
        yield Finding(path("model.patch_spatial"), f"a latent of {side}x{side} is no whole number of {patch}x{patch} patches", f"model.patch_spatial {', '.join(str(p) for p in (1, 2, 4) if side % p == 0)}")
    elif (tokens := (side // patch) ** 2) > length:
        yield Finding(
            path("dataset.task_encoder_seq_length"), f"one picture of {side * 8} px has {tokens} tokens, but a pack has {length}",
            f"dataset.task_encoder_seq_length {tokens} or more",
        )  # fmt: skip
    made = (("model.in_channels", 16), ("model.patch_temporal", 1), ("model.crossattn_emb_size", 1024)) if view["data.source"] == "embedded" else ()
    for key, value in made:
        if view[key] != value:
            yield Finding(path(key), f"{key} is {view[key]}, but the embedded data has {value}", f"{key} {value}, or a dataset.path of your own")


def _mock_whole_patches(view: View) -> Iterator[Finding]:
    for key in ("dataset.H_latents", "dataset.W_latents") if view.is_mock else ():
        size, patch = view[key], view["dataset.patch_spatial"]
        if size % patch:
            yield Finding(path(key), f"{key} {size} is not a multiple of dataset.patch_spatial {patch}", f"{key} {' or '.join(map(str, nearest_multiples(size, patch)))}")


def _mock_positions(view: View) -> Iterator[Finding]:
    if not view.is_mock:
        return
    for axis, most in (("F_latents", "max_frames"), ("H_latents", "max_img_h"), ("W_latents", "max_img_w")):
        key, size, limit = f"dataset.{axis}", view[f"dataset.{axis}"], view[f"model.{most}"]
        if size > limit:
            message = f"{key} {size} is beyond the position table of model.{most} {limit}: positions of other places are used"
            yield Finding(path(key), message, f"at most {limit}, or a larger model.{most}", None if view.is_users(key) else HINT)


_LAYOUT = ("model.add_bias_linear", "model.gated_linear_unit", "model.add_qkv_bias")

_TC = "megatron-core transformer/transformer_config.py, __post_init__"

RULES = (
    Rule(
        "MOD101", "hidden-not-divisible-by-heads", ERROR, _heads,
        "The width of a head is a floor division: attention would be narrower than the model, in silence.", _TC,
    ),
    Rule(
        "MOD102", "hidden-size-not-multiple-of-16", ERROR, _position_width,
        "The position embedding is split over three axes, and each into sines and cosines; the model cannot be built.", "NVIDIA DFM model/common/dit_embeddings.py",
        targets=DIT,
    ),
    Rule(
        "MOD103", "recompute-incomplete", ERROR, _recompute,
        "megatron-core raises a ValueError when the configuration is built. Without a granularity, and for more layers than there are, it says nothing and "
        "recomputes something else, in silence.", _TC,
    ),
    Rule(
        "MOD104", "picture-does-not-fit", ERROR, _embedded_fits, "The first batch would stop the run.", "dfmspec/trainer/data/patches.py", OURS,
    ),
    Rule(
        "MOD105", "fixed-by-dfm", ERROR,
        excludes(lambda v: (v["model.patch_spatial"], v["model.patch_temporal"]) != (2, 1),
                 at=lambda v: "model.patch_spatial" if v["model.patch_spatial"] != 2 else "model.patch_temporal",
                 message=lambda v: f"model.patch_spatial {v['model.patch_spatial']} and patch_temporal {v['model.patch_temporal']}: DFM's task encoder always cuts patches of 2x2x1",
                 hint="set patch_spatial 2 and patch_temporal 1"),
        "Accepted at start; shapes do not match in the first iteration, or validation decodes other patches in silence.",
        "NVIDIA DFM data/common/diffusion_energon_datamodule.py, dit_model_provider.py", DFM_DIT,
    ),
    Rule(
        "MOD106", "head-width-unsupported", WARNING, _head_width,
        "Accepted at start; attention falls back to an unfused kernel, slower by far, in silence, or Transformer Engine refuses it in the first iteration.", "Transformer Engine's fused attention",
        targets=DIT,
    ),
    Rule(
        "MOD107", "hidden-size-below-256", ERROR,
        excludes(lambda v: v[HIDDEN] < 256, at=HIDDEN, message=lambda v: f"{HIDDEN} {v[HIDDEN]} is less than 256, the width of DFM's frame-rate embedding",
                 hint="256 or more, a multiple of 16"),
        "The embedding is padded up to hidden_size; below, the padding is negative and crops it in silence.", "NVIDIA DFM model/dit/dit_model.py", DFM_DIT,
    ),
    Rule(
        "MOD108", "mock-beyond-positions", WARNING, _mock_positions,
        "One flat index serves three axes, so an overflow of one takes another place's position in silence; beyond the table the GPU asserts.",
        "NVIDIA DFM model/common/dit_embeddings.py", DFM_DIT,
    ),
    Rule(
        "MOD109", "position-table-not-square", WARNING,
        excludes(lambda v: v["model.max_img_h"] != v["model.max_img_w"] or v["model.max_img_h"] % v["model.patch_spatial"], at="model.max_img_h",
                 message=lambda v: f"max_img_h {v['model.max_img_h']} and max_img_w {v['model.max_img_w']}: DFM's position table swaps the axes of one that is not square",
                 hint="set both to the larger, a multiple of patch_spatial"),
        "The table is built height first where its helper takes width first, so positions are mixed up in silence.", "NVIDIA DFM model/common/dit_embeddings.py", DFM_DIT,
    ),
    Rule(
        "MOD110", "mock-data-do-not-fit", ERROR,
        together(
            excludes(lambda v: v.is_mock and (v["dataset.patch_spatial"], v["dataset.patch_temporal"]) != (v["model.patch_spatial"], 1),
                     at=lambda v: "dataset.patch_spatial" if v["dataset.patch_spatial"] != v["model.patch_spatial"] else "dataset.patch_temporal",
                     message="the random data are cut into other patches than the model takes", hint="set dataset.patch_spatial to model.patch_spatial, and patch_temporal to 1"),
            same("dataset.context_embeddings_dim", "model.crossattn_emb_size", when=lambda v: v.is_mock, what="the width of a text"),
            _mock_whole_patches,
        ),
        "Accepted at start; shapes do not match in the first iteration.", "NVIDIA DFM data/dit/dit_mock_datamodule.py", DFM_DIT,
    ),
    Rule(
        "MOD111", "activation-impossible", ERROR,
        together(
            excludes(lambda v: v["model.bias_activation_fusion"] and not v["model.gated_linear_unit"] and not v["model.add_bias_linear"], at="model.bias_activation_fusion",
                     message="bias_activation_fusion fuses a bias that the MLP does not have", hint="set it to false, or model.add_bias_linear to true"),
            excludes(lambda v: v["model.bias_activation_fusion"] and v["model.use_te_activation_func"], at="model.use_te_activation_func",
                     message="bias_activation_fusion and use_te_activation_func exclude each other", hint="use one of the two"),
            excludes(lambda v: v["model.activation_func_fp8_input_store"], at="model.activation_func_fp8_input_store",
                     message="activation_func_fp8_input_store is for SwiGLU only, and DiT's activation is GELU", hint="remove it"),
        ),
        "megatron-core raises a ValueError when the configuration is built.", _TC, DFM_DIT,
    ),
    Rule(
        "MOD112", "checkpoint-layout-changed", HINT,
        excludes(lambda v: any(v[key] for key in _LAYOUT), at=lambda v: next(key for key in _LAYOUT if v[key]),
                 message="this changes the parameters of every block: checkpoints of the published DiT no longer fit", hint="leave it out to stay compatible"),
        "Loading a checkpoint of the other kind fails after the model is built.", "NVIDIA DFM model/dit/dit_model_provider.py", DFM_DIT,
    ),
    Rule(
        "MOD113", "recompute-module-unsupported", ERROR, _modules,
        "megatron-core refuses modules of other models, and names it does not know; a module the network lacks is recomputed nowhere, in silence.", _TC, DFM,
    ),
    Rule(
        "MOD114", "recompute-excluded", ERROR,
        together(
            excludes(lambda v: v["model.distribute_saved_activations"] and v["model.recompute_granularity"] and v[SP], at="model.distribute_saved_activations",
                     message="distribute_saved_activations cuts what sequence_parallel has cut already", hint="use one of the two"),
            excludes(lambda v: v["model.moe_layer_recompute"], at="model.moe_layer_recompute",
                     message="moe_layer_recompute recomputes experts, and the DiT has none; it turns selective recomputation on", hint="remove it"),
        ),
        "megatron-core raises a ValueError, or turns on a recomputation that nobody asked for, in silence.", _TC, DFM,
    ),
    Rule(
        "MOD115", "vocabulary-without-text", ERROR,
        together(
            excludes(lambda v: v.network == "dit" and v["model.vocab_size"] is not None, at="model.vocab_size",
                     message=lambda v: f"model.vocab_size {v['model.vocab_size']}: the DiT has no vocabulary", hint="remove it"),
            excludes(lambda v: v.network != "dit" and v["model.vocab_size"] is not None and v["model.vocab_size"] < (v["tokenizer.vocab_size"] or 0), at="model.vocab_size",
                     message=lambda v: f"model.vocab_size {v['model.vocab_size']} is less than the tokenizer's {v['tokenizer.vocab_size']}", hint="remove it"),
        ),
        "A size below the tokenizer's stops the run; any other is padded and never used, in silence.", "Megatron-Bridge training/setup.py", DFM,
    ),
    Rule(
        "MOD116", "offloading-impossible", ERROR,
        excludes(lambda v: v["model.fine_grained_activation_offloading"], at="model.fine_grained_activation_offloading",
                 message="fine_grained_activation_offloading needs a handler that only megatron-core's GPT model sets up", hint="set it to false, or use recomputation"),
        "Refused with modules that do not fit; accepted with others, and then the first forward pass fails.", f"{_TC}; megatron-core models/gpt/gpt_model.py", DFM,
    ),
    Rule(
        "MOD117", "language-model-option", ERROR,
        together(
            excludes(lambda v: v["model.no_rope_freq"] is not None, at="model.no_rope_freq", message="model.no_rope_freq: the DiT has no rotary positions", hint="remove it"),
            excludes(lambda v: v["model.multi_latent_attention"], at="model.multi_latent_attention",
                     message="multi_latent_attention belongs to another network; the DiT's attention ignores it", hint="remove it"),
            excludes(lambda v: v["model.experimental_attention_variant"] or v["model.linear_attention_type"],
                     at=lambda v: "model.experimental_attention_variant" if v["model.experimental_attention_variant"] else "model.linear_attention_type",
                     message="the DiT builds its own attention; experimental variants are of language models", hint="remove it"),
        ),
        "Refused when the configuration is built, or accepted and never used, in silence.", _TC, DFM_DIT,
    ),
    Rule(
        "MOD118", "normalization-without-effect", WARNING,
        excludes(lambda v: v.is_users("model.normalization") and v["model.normalization"] != "LayerNorm", at="model.normalization",
                 message=lambda v: f"model.normalization {v['model.normalization']} has no effect: DiT's blocks have their own LayerNorm and q/k RMSNorm", hint="remove it"),
        "Any word is accepted, and nothing changes, in silence.", "NVIDIA DFM model/dit/dit_layer_spec.py", DFM_DIT,
    ),
    Rule(
        "MOD119", "dropout-impossible", ERROR,
        together(*(
            excludes(lambda v, key=key: v[key] is not None and not 0 <= v[key] < 1, at=key, message=lambda v, key=key: f"{key} {v[key]} must be at least 0 and below 1",  # type: ignore[misc]
                     hint="0 for none, as the DiT has")
            for key in ("model.hidden_dropout", "model.attention_dropout")
        )),
        "Accepted at start; torch refuses it in the first iteration, or drops everything.", "torch.nn.functional.dropout", DFM,
    ),
    Rule(
        "MOD120", "meta-initialisation", ERROR,
        requires("model.init_model_with_meta_device", ("ddp.use_megatron_fsdp", True), because="without FSDP nothing gives the parameters their values"),
        "Accepted at start; the parameters stay without storage.", "Megatron-Bridge models/model_provider.py", DFM_DIT,
    ),
    Rule(
        "SMP101", "sampler-range-empty", ERROR,
        excludes(lambda v: v["diffusion.sigma_min"] >= v["diffusion.sigma_max"], at="diffusion.sigma_min",
                 message=lambda v: f"diffusion.sigma_min {v['diffusion.sigma_min']} is not below diffusion.sigma_max {v['diffusion.sigma_max']}", hint="EDM's values are 0.002 and 80"),
        "The noise levels of the sampler would not fall.", "Karras et al. 2022, equation 5", OURS,
    ),
    Rule(
        "SMP102", "condition-always-dropped", ERROR,
        together(*(
            excludes(lambda v, key=key: v[key] >= 1, at=key, message=lambda v, key=key: f"{key} {v[key]} must be below 1", hint=hint)  # type: ignore[misc]
            for key, hint in (("diffusion.condition_dropout", "DFM drops 0.2 of the conditions"), ("diffusion.ema_decay", "0.9999 is usual"))
        )),
        "The network would never see a text, or the averaged weights never change.", "dfmspec/trainer/optim/ema.py", OURS,
    ),
)  # fmt: skip
