"""WAN, FLX: what NVIDIA DFM's other two networks need beyond the rules that all of its recipes share."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import (
    CP,
    DFM,
    ERROR,
    FFN,
    FLUX,
    HIDDEN,
    HINT,
    MBS,
    PP,
    SP,
    TP,
    VPP,
    WAN,
    WARNING,
    Rule,
    View,
    excludes,
    must_be,
    path,
    same,
    together,
)
from dfmspec.diagnostics import Finding
from dfmspec.read.load import recipe_value
from dfmspec.targets.layout import nearest_multiples

_BOTH = DFM[1:]
_GRID = 1024
_PACKING, _SEQ = "dataset.packing_buffer_size", "dataset.seq_length"


def _mock_video(view: View) -> Iterator[Finding]:
    if not view.is_mock:
        return
    sizes = [(f"dataset.{side}_latents", f"dataset.patch_{kind}") for side, kind in (("F", "temporal"), ("H", "spatial"), ("W", "spatial"))]
    tokens = view["dataset.number_packed_samples"]
    for size, patch in sizes:
        if view[size] % view[patch]:
            near = " or ".join(map(str, nearest_multiples(view[size], view[patch])))
            yield Finding(path(size), f"{size} {view[size]} is not a multiple of {patch} {view[patch]}", f"{size} {near}")
            return
        if view[size] // view[patch] > _GRID:
            yield Finding(path(size), f"{size} {view[size]} makes more than {_GRID} patches, and the rotary table has {_GRID}", f"{size} at most {_GRID * view[patch]}")
        tokens *= view[size] // view[patch]
    shares = view[CP] * 2 if view[CP] > 1 else 1
    shares *= view[TP] if view[SP] else 1
    if tokens % shares:
        yield Finding(
            path("dataset.F_latents"), f"a random pack has {tokens} tokens, which TP and CP cannot share in {shares} equal parts",
            f"choose F_latents x H_latents x W_latents so that the patches are a multiple of {shares}",
        )  # fmt: skip


def _axes(view: View) -> Iterator[Finding]:
    key, head = "model.axes_dims_rope", view["model.kv_channels"]
    axes = view[key]
    if len(axes) != 3 or any(not isinstance(axis, int) or isinstance(axis, bool) or axis <= 0 or axis % 2 for axis in axes):
        yield Finding(path(key), f"{key} {axes}: text, rows and columns each rotate an even number of channels", f"three even numbers of sum {head}")
    elif sum(axes) != head:
        yield Finding(
            path(key if view.is_users(key) else HIDDEN), f"{key} {axes} sum up to {sum(axes)}, but a head has {head} channels (hidden_size / num_attention_heads)",
            f"three even numbers of sum {head}; or a hidden_size of {sum(axes)} x num_attention_heads",
        )  # fmt: skip


def _mock_picture(view: View) -> Iterator[Finding]:
    if not view.is_mock:
        return
    for key in ("dataset.image_H", "dataset.image_W"):
        unit = 2 * view["dataset.vae_scale_factor"]
        if view[key] % unit:
            yield Finding(path(key), f"{key} {view[key]}: latents are packed 2 x 2, so pixels come in multiples of {unit}", f"{key} {' or '.join(map(str, nearest_multiples(view[key], unit)))}")
    if view["model.in_channels"] != 4 * view["dataset.vae_channels"]:
        yield Finding(
            path("model.in_channels"), f"model.in_channels {view['model.in_channels']} is not 4 x dataset.vae_channels {view['dataset.vae_channels']}: 2 x 2 latent pixels make a token",
            f"model.in_channels {4 * view['dataset.vae_channels']}",
        )  # fmt: skip


_WM, _FM = "NVIDIA DFM model/wan/wan_model.py and wan_provider.py", "NVIDIA DFM model/flux/flux_model.py and flux_provider.py"

RULES = (
    Rule(
        "WAN101", "pipeline-on-wan-or-flux", ERROR,
        together(must_be(PP, 1, "the network cannot build a part of itself"), must_be(VPP, None, "the network has one stage")),
        "WAN fails when the model is built; FLUX builds all layers on every stage, and trains something else in silence.", f"{_WM}; flux_provider.py, provide", _BOTH,
    ),
    Rule(
        "WAN102", "evaluation-on-real-data", ERROR,
        excludes(lambda v: not v.is_mock and v["train.eval_iters"], at="train.eval_iters",
                 message=lambda v: f"train.eval_iters {v['train.eval_iters']}: with real data, DFM hands validation a loader where an iterator is needed",
                 hint="leave it out, which is 0 here; sample from checkpoints instead"),
        "A TypeError at the first evaluation, which may be hours into the run.",
        "NVIDIA DFM data/wan/wan_energon_datamodule.py, flux_energon_datamodule.py; megatron-core rerun_state_machine.py, RerunDataIterator", _BOTH,
    ),
    Rule(
        "WAN103", "dataset-path-missing", ERROR,
        excludes(lambda v: not v.is_mock and not v["dataset.path"], at="dataset.path", message="no dataset.path, and DFM has none of its own for this network",
                 hint="set dataset.path, or data.source: mock for a trial"),
        "The script stops as soon as it opens the data, after torchrun has started every process.", "NVIDIA DFM recipes/wan/wan.py, recipes/flux/flux.py", _BOTH,
    ),
    Rule(
        "WAN104", "sequence-parallel-on-wan", WARNING,
        excludes(lambda v: not v.is_mock and v[SP] and v[TP] > 1, at=SP,
                 message=lambda v: f"WAN pads a sample for CP {v[CP]} and not for TP: the first pack whose tokens TP {v[TP]} does not divide stops the run",
                 hint="sequence_parallel false, unless every sample of yours divides"),
        "Accepted at start; an assertion in the first iteration whose pack does not divide.", "NVIDIA DFM data/wan/wan_taskencoder.py, encode_sample", WAN,
    ),
    Rule(
        "WAN105", "mock-video-does-not-fit", ERROR, _mock_video, "Shapes do not fit in the first iteration.", "NVIDIA DFM data/wan/wan_mock_datamodule.py; model/wan/wan_model.py", WAN,
    ),
    Rule(
        "WAN106", "text-does-not-fit-wan", ERROR,
        together(same("dataset.context_embeddings_dim", "model.text_dim", when=lambda v: v.is_mock, what="the width of a text"),
                 excludes(lambda v: v.is_mock and v["dataset.context_seq_len"] > v["model.text_len"], at="dataset.context_seq_len",
                          message=lambda v: f"dataset.context_seq_len {v['dataset.context_seq_len']} is more than model.text_len {v['model.text_len']}", hint=lambda v: f"at most {v['model.text_len']}")),
        "The text projection fails in the first iteration, or the text is cropped in silence.", "NVIDIA DFM data/wan/wan_taskencoder.py; wan_provider.py", WAN,
    ),
    Rule(
        "WAN107", "wan-is-packed", ERROR, must_be("model.qkv_format", "thd", "WAN's data come packed, and context parallelism knows no other form"),
        "Attention fails in the first iteration.", f"{_WM}, qkv_format", WAN,
    ),
    Rule(
        "WAN108", "widths-set-apart", WARNING,
        excludes(lambda v: v[HIDDEN] != recipe_value(v.target, v["recipe"], HIDDEN) and not v.is_users(FFN), at=HIDDEN,
                 message=lambda v: f"{HIDDEN} {v[HIDDEN]} with {FFN} {v[FFN]} of recipe {v['recipe']}, which does not follow", hint=f"set {FFN} too; null is 4 x hidden_size"),
        "The widths are defaults of their own: another hidden_size alone makes a network of odd proportions in silence.", f"{_WM}; flux_provider.py", _BOTH,
    ),
    Rule(
        "WAN109", "norms-reduced-twice", ERROR,
        excludes(lambda v: v[TP] > 1 and v["model.qk_layernorm"] and v["model.layernorm_across_heads"], at="model.qk_layernorm",
                 message="model.qk_layernorm adds up the q/k norms' gradients over TP, and with layernorm_across_heads each rank has the whole already",
                 hint="leave model.qk_layernorm out"),
        "Those gradients are TP times too large, in silence.", "NVIDIA DFM model/wan/wan_layer_spec.py; megatron-core finalize_model_grads.py", WAN,
    ),
    Rule(
        "WAN110", "fused-bias-without-bias", ERROR,
        excludes(lambda v: v["model.bias_activation_fusion"] and not v["model.add_bias_linear"], at="model.add_bias_linear",
                 message="model.bias_activation_fusion fuses a bias that model.add_bias_linear false takes away", hint="set model.bias_activation_fusion to false, or keep add_bias_linear"),
        "megatron-core raises a ValueError when the configuration is finished.", "megatron-core TransformerConfig.__post_init__", WAN,
    ),
    Rule(
        "WAN111", "pack-length-not-set", HINT,
        excludes(lambda v: not v.is_mock and not v.is_users(_SEQ), at=_SEQ, message=lambda v: f"packs end at {_SEQ}, whose default is {v[_SEQ]}; a longer sample is a pack of its own, however long",
                 hint=f"set {_SEQ} to what fits into memory"),
        "A video is longer than the default: every pack holds one sample, of any length, in silence.", "NVIDIA DFM data/wan/wan_energon_datamodule.py, wan_taskencoder.py", WAN,
    ),
    Rule(
        "FLX101", "rotary-axes-do-not-fit", ERROR, _axes,
        "With more channels than a head has, the first iteration fails; with fewer, the rest is not rotated, in silence.", f"{_FM}; model/flux/layers.py", FLUX,
    ),
    Rule("FLX102", "mock-picture-does-not-fit", ERROR, _mock_picture, "Shapes do not fit in the first iteration.", "NVIDIA DFM data/flux/flux_mock_datamodule.py", FLUX),
    Rule(
        "FLX103", "text-does-not-fit-flux", ERROR,
        together(same("dataset.context_dim", "model.context_dim", when=lambda v: v.is_mock, what="the width of a T5 text"),
                 same("dataset.pooled_prompt_dim", "model.vec_in_dim", when=lambda v: v.is_mock, what="the width of the pooled CLIP vector")),
        "The text projections fail in the first iteration.", f"{_FM}; data/flux/flux_mock_datamodule.py", FLUX,
    ),
    Rule(
        "FLX104", "context-parallel-on-flux", ERROR, must_be(CP, 1, "FLUX does not cut its sequence"),
        "Every rank of a context-parallel group attends to the whole sequence as if it were a part of it.", _FM, FLUX,
    ),
    Rule(
        "FLX105", "packing-on-flux", ERROR, must_be(_PACKING, None, "FLUX's forward step reads one picture a row, no packs"),
        "The first iteration fails.", "NVIDIA DFM data/flux/flux_taskencoder.py, batch", FLUX,
    ),
    Rule(
        "FLX106", "pictures-must-match", WARNING,
        excludes(lambda v: not v.is_mock and v[MBS] > 1, at=MBS, message=lambda v: f"{MBS} {v[MBS]}: the pictures of a micro-batch are stacked, so all of them must have one size",
                 hint=f"{MBS} 1, unless your data have one size"),
        "Accepted at start; the first two pictures of different size stop the run.", "NVIDIA DFM data/flux/flux_taskencoder.py, batch", FLUX,
    ),
    Rule(
        "FLX107", "biases-are-needed", ERROR, must_be("model.add_bias_linear", True, "FLUX's single blocks add their biases without asking"),
        "The first forward pass fails.", "NVIDIA DFM model/flux/flux_layer_spec.py", FLUX,
    ),
    Rule(
        "FLX108", "patch-is-fixed", ERROR, must_be("model.patch_size", 1, "latents are packed 2 x 2 before they reach the network"),
        "The output has more channels than the target: shapes do not fit in the first iteration.", _FM, FLUX,
    ),
    Rule(
        "FLX110", "cuda-graphs-asked-for-twice", ERROR,
        excludes(lambda v: sum([v["model.cuda_graph_impl"] != "none", v["model.enable_cuda_graph"], v["model.external_cuda_graph"]]) > 1,
                 at=lambda v: "model.enable_cuda_graph" if v["model.enable_cuda_graph"] else "model.external_cuda_graph",
                 message="of cuda_graph_impl, enable_cuda_graph and external_cuda_graph, which mean the same, more than one is set", hint="model.cuda_graph_impl alone"),
        "megatron-core asserts it when the configuration is finished.", "megatron-core TransformerConfig.__post_init__", FLUX,
    ),
    Rule(
        "FLX109", "fp8-on-flux", ERROR,
        excludes(lambda v: v["mixed_precision.fp8"] and v["mixed_precision.fp8_recipe"] != "mxfp8",
                 at=lambda v: "mixed_precision.recipe" if v.is_users("mixed_precision.recipe") else "mixed_precision.fp8_recipe",
                 message=lambda v: f"FP8 recipe {v['mixed_precision.fp8_recipe']}: FLUX makes its own FP8 context, which knows mxfp8 alone", hint="bf16_mixed, or bf16_with_mxfp8_mixed on Blackwell"),
        "Refused in the first forward pass, by reading the code; not tried on a GPU.", "NVIDIA DFM model/flux/flux_model.py", FLUX,
    ),
)  # fmt: skip
