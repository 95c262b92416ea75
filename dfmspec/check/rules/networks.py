"""WAN, FLX: what NVIDIA DFM's other two networks need beyond the rules that all of its recipes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dfmspec.check.rules.base import (
    CP,
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

_BOTH = WAN + FLUX

_EVAL_ITERS = "train.eval_iters"
_PACKING = "dataset.packing_buffer_size"
_SEQ = "dataset.seq_length"
_TEXT_GIVEN = "dataset.context_seq_len"
_TEXT_TAKEN = "model.text_len"
_CHANNELS = "model.in_channels"
_ENABLE_GRAPH = "model.enable_cuda_graph"
_EXTERNAL_GRAPH = "model.external_cuda_graph"
_PRECISION = "mixed_precision.recipe"
_FP8_RECIPE = "mixed_precision.fp8_recipe"

_GRID = 1024
"""Positions in WAN's rotary table along each axis."""


class _Side(NamedTuple):
    """One axis of a random video."""

    size: str
    """The key of its length in latents."""
    patch: str
    """The key of how many of them a patch takes."""


_SIDES = (
    _Side("dataset.F_latents", "dataset.patch_temporal"),
    _Side("dataset.H_latents", "dataset.patch_spatial"),
    _Side("dataset.W_latents", "dataset.patch_spatial"),
)


def _mock_video(view: View) -> Iterator[Finding]:
    if not view.is_mock:
        return
    tokens = view["dataset.number_packed_samples"]
    for side in _SIDES:
        size = view[side.size]
        patch = view[side.patch]
        # Patches do not overlap, and nothing is padded to a whole one.
        if size % patch:
            message = f"{side.size} {size} is not a multiple of {side.patch} {patch}"
            near = _or(nearest_multiples(size, patch))
            yield Finding(path(side.size), message, f"{side.size} {near}")
            return
        # Each patch along the axis has a position of its own in the rotary table.
        patches = size // patch
        if patches > _GRID:
            message = f"{side.size} {size} makes more than {_GRID} patches, and the rotary table has {_GRID}"
            most = _GRID * patch
            yield Finding(path(side.size), message, f"{side.size} at most {most}")
        tokens *= patches

    # Context parallelism gives each rank two equal pieces; sequence parallelism cuts a piece over TP.
    shares = 1
    if view[CP] > 1:
        shares = 2 * view[CP]
    if view[SP]:
        shares *= view[TP]
    if tokens % shares:
        yield Finding(
            path("dataset.F_latents"),
            f"a random pack has {tokens} tokens, which TP and CP cannot share in {shares} equal parts",
            f"choose F_latents x H_latents x W_latents so that the patches are a multiple of {shares}",
        )


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _axes(view: View) -> Iterator[Finding]:
    key = "model.axes_dims_rope"
    head = view["model.kv_channels"]
    axes = view[key]
    # Rotation turns channels in pairs.
    if len(axes) != 3 or not all(_is_positive_and_even(axis) for axis in axes):
        yield Finding(
            path(key),
            f"{key} {axes}: text, rows and columns each rotate an even number of channels",
            f"three even numbers of sum {head}",
        )
        return
    # The axes share the channels of one head.
    total = sum(axes)
    if total != head:
        at = key if view.is_set_by_user(key) else HIDDEN
        yield Finding(
            path(at),
            f"{key} {axes} sum up to {total}, but a head has {head} channels (hidden_size / num_attention_heads)",
            f"three even numbers of sum {head}; or a hidden_size of {total} x num_attention_heads",
        )


def _is_positive_and_even(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % 2 == 0


def _mock_picture(view: View) -> Iterator[Finding]:
    if not view.is_mock:
        return
    # The VAE shrinks a side by its factor, and packing halves it once more.
    for key in ("dataset.image_H", "dataset.image_W"):
        unit = 2 * view["dataset.vae_scale_factor"]
        pixels = view[key]
        if pixels % unit:
            message = f"{key} {pixels}: latents are packed 2 x 2, so pixels come in multiples of {unit}"
            near = _or(nearest_multiples(pixels, unit))
            yield Finding(path(key), message, f"{key} {near}")
    # Packing turns the four pixels into channels.
    channels = view[_CHANNELS]
    of_vae = view["dataset.vae_channels"]
    if channels != 4 * of_vae:
        needed = 4 * of_vae
        message = f"{_CHANNELS} {channels} is not 4 x dataset.vae_channels {of_vae}: 2 x 2 latent pixels make a token"
        yield Finding(path(_CHANNELS), message, f"{_CHANNELS} {needed}")


def _evaluates_real_data(view: View) -> str:
    return (
        f"{_EVAL_ITERS} {view[_EVAL_ITERS]}: with real data, DFM hands validation a loader where an iterator is needed"
    )


def _pads_for_cp_alone(view: View) -> str:
    return (
        f"WAN pads a sample for CP {view[CP]} and not for TP: "
        f"the first pack whose tokens TP {view[TP]} does not divide stops the run"
    )


def _has_hidden_size_alone(view: View) -> bool:
    """Whether hidden_size differs from the recipe's, and nobody set the MLP's width to go with it."""
    of_recipe = recipe_value(view.target, view["recipe"], HIDDEN)
    return view[HIDDEN] != of_recipe and not view.is_set_by_user(FFN)


def _widths_apart(view: View) -> str:
    recipe = view["recipe"]
    return f"{HIDDEN} {view[HIDDEN]} with {FFN} {view[FFN]} of recipe {recipe}, which does not follow"


def _pack_ends(view: View) -> str:
    return f"packs end at {_SEQ}, whose default is {view[_SEQ]}; a longer sample is a pack of its own, however long"


def _stacks_pictures(view: View) -> str:
    return f"{MBS} {view[MBS]}: the pictures of a micro-batch are stacked, so all of them must have one size"


def _asks_for_graphs_twice(view: View) -> bool:
    by_name = view["model.cuda_graph_impl"] != "none"
    asked: list[bool] = [by_name, view[_ENABLE_GRAPH], view[_EXTERNAL_GRAPH]]
    return sum(asked) > 1


def _fp8_without_mxfp8(view: View) -> str:
    return f"FP8 recipe {view[_FP8_RECIPE]}: FLUX makes its own FP8 context, which knows mxfp8 alone"


_WM = "NVIDIA DFM model/wan/wan_model.py and wan_provider.py"
_FM = "NVIDIA DFM model/flux/flux_model.py and flux_provider.py"

RULES = (
    # What neither network can do.
    Rule(
        "WAN101",
        "pipeline-on-wan-or-flux",
        ERROR,
        together(
            must_be(PP, 1, "the network cannot build a part of itself"),
            must_be(VPP, None, "the network has one stage"),
        ),
        (
            "WAN fails when the model is built; FLUX builds all layers on every stage, "
            "and trains something else in silence."
        ),
        f"{_WM}; flux_provider.py, provide",
        targets=_BOTH,
    ),
    Rule(
        "WAN102",
        "evaluation-on-real-data",
        ERROR,
        excludes(
            lambda v: not v.is_mock and v[_EVAL_ITERS],
            at=_EVAL_ITERS,
            message=_evaluates_real_data,
            hint="leave it out, which is 0 here; sample from checkpoints instead",
        ),
        "A TypeError at the first evaluation, which may be hours into the run.",
        (
            "NVIDIA DFM data/wan/wan_energon_datamodule.py, flux_energon_datamodule.py; "
            "megatron-core rerun_state_machine.py, RerunDataIterator"
        ),
        targets=_BOTH,
    ),
    Rule(
        "WAN103",
        "dataset-path-missing",
        ERROR,
        excludes(
            lambda v: not v.is_mock and not v.or_null("dataset.path"),
            at="dataset.path",
            message="no dataset.path, and DFM has none of its own for this network",
            hint="set dataset.path, or data.source: mock for a trial",
        ),
        "The script stops as soon as it opens the data, after torchrun has started every process.",
        "NVIDIA DFM recipes/wan/wan.py, recipes/flux/flux.py",
        targets=_BOTH,
    ),
    # How WAN's packs and texts are cut.
    Rule(
        "WAN104",
        "sequence-parallel-on-wan",
        WARNING,
        excludes(
            lambda v: not v.is_mock and v[SP] and v[TP] > 1,
            at=SP,
            message=_pads_for_cp_alone,
            hint="sequence_parallel false, unless every sample of yours divides",
        ),
        "Accepted at start; an assertion in the first iteration whose pack does not divide.",
        "NVIDIA DFM data/wan/wan_taskencoder.py, encode_sample",
        targets=WAN,
    ),
    Rule(
        "WAN105",
        "mock-video-does-not-fit",
        ERROR,
        _mock_video,
        "Shapes do not fit in the first iteration.",
        "NVIDIA DFM data/wan/wan_mock_datamodule.py; model/wan/wan_model.py",
        targets=WAN,
    ),
    Rule(
        "WAN106",
        "text-does-not-fit-wan",
        ERROR,
        together(
            same(
                "dataset.context_embeddings_dim",
                "model.text_dim",
                when=lambda v: v.is_mock,
                what="the width of a text",
            ),
            excludes(
                lambda v: v.is_mock and v[_TEXT_GIVEN] > v[_TEXT_TAKEN],
                at=_TEXT_GIVEN,
                message=lambda v: f"{_TEXT_GIVEN} {v[_TEXT_GIVEN]} is more than {_TEXT_TAKEN} {v[_TEXT_TAKEN]}",
                hint=lambda v: f"at most {v[_TEXT_TAKEN]}",
            ),
        ),
        "The text projection fails in the first iteration, or the text is cropped in silence.",
        "NVIDIA DFM data/wan/wan_taskencoder.py; wan_provider.py",
        targets=WAN,
    ),
    Rule(
        "WAN107",
        "wan-is-packed",
        ERROR,
        must_be("model.qkv_format", "thd", "WAN's data come packed, and context parallelism knows no other form"),
        "Attention fails in the first iteration.",
        f"{_WM}, qkv_format",
        targets=WAN,
    ),
    # How wide the network is, and what its layers add up.
    Rule(
        "WAN108",
        "widths-set-apart",
        WARNING,
        excludes(
            _has_hidden_size_alone,
            at=HIDDEN,
            message=_widths_apart,
            hint=f"set {FFN} too; null is 4 x hidden_size",
        ),
        (
            "The widths are defaults of their own: "
            "another hidden_size alone makes a network of odd proportions in silence."
        ),
        f"{_WM}; flux_provider.py",
        targets=_BOTH,
    ),
    Rule(
        "WAN109",
        "norms-reduced-twice",
        ERROR,
        excludes(
            lambda v: v[TP] > 1 and v["model.qk_layernorm"] and v["model.layernorm_across_heads"],
            at="model.qk_layernorm",
            message=(
                "model.qk_layernorm adds up the q/k norms' gradients over TP, "
                "and with layernorm_across_heads each rank has the whole already"
            ),
            hint="leave model.qk_layernorm out",
        ),
        "Those gradients are TP times too large, in silence.",
        "NVIDIA DFM model/wan/wan_layer_spec.py; megatron-core finalize_model_grads.py",
        targets=WAN,
    ),
    Rule(
        "WAN110",
        "fused-bias-without-bias",
        ERROR,
        excludes(
            lambda v: v["model.bias_activation_fusion"] and not v["model.add_bias_linear"],
            at="model.add_bias_linear",
            message="model.bias_activation_fusion fuses a bias that model.add_bias_linear false takes away",
            hint="set model.bias_activation_fusion to false, or keep add_bias_linear",
        ),
        "megatron-core raises a ValueError when the configuration is finished.",
        "megatron-core TransformerConfig.__post_init__",
        targets=WAN,
    ),
    # What fits into memory.
    Rule(
        "WAN111",
        "pack-length-not-set",
        HINT,
        excludes(
            lambda v: not v.is_mock and not v.is_set_by_user(_SEQ),
            at=_SEQ,
            message=_pack_ends,
            hint=f"set {_SEQ} to what fits into memory",
        ),
        "A video is longer than the default: every pack holds one sample, of any length, in silence.",
        "NVIDIA DFM data/wan/wan_energon_datamodule.py, wan_taskencoder.py",
        targets=WAN,
    ),
    # How FLUX's data meet its network.
    Rule(
        "FLX101",
        "rotary-axes-do-not-fit",
        ERROR,
        _axes,
        (
            "With more channels than a head has, the first iteration fails; "
            "with fewer, the rest is not rotated, in silence."
        ),
        f"{_FM}; model/flux/layers.py",
        targets=FLUX,
    ),
    Rule(
        "FLX102",
        "mock-picture-does-not-fit",
        ERROR,
        _mock_picture,
        "Shapes do not fit in the first iteration.",
        "NVIDIA DFM data/flux/flux_mock_datamodule.py",
        targets=FLUX,
    ),
    Rule(
        "FLX103",
        "text-does-not-fit-flux",
        ERROR,
        together(
            same(
                "dataset.context_dim",
                "model.context_dim",
                when=lambda v: v.is_mock,
                what="the width of a T5 text",
            ),
            same(
                "dataset.pooled_prompt_dim",
                "model.vec_in_dim",
                when=lambda v: v.is_mock,
                what="the width of the pooled CLIP vector",
            ),
        ),
        "The text projections fail in the first iteration.",
        f"{_FM}; data/flux/flux_mock_datamodule.py",
        targets=FLUX,
    ),
    # What FLUX does not know.
    Rule(
        "FLX104",
        "context-parallel-on-flux",
        ERROR,
        must_be(CP, 1, "FLUX does not cut its sequence"),
        "Every rank of a context-parallel group attends to the whole sequence as if it were a part of it.",
        _FM,
        targets=FLUX,
    ),
    Rule(
        "FLX105",
        "packing-on-flux",
        ERROR,
        must_be(_PACKING, None, "FLUX's forward step reads one picture a row, no packs"),
        "The first iteration fails.",
        "NVIDIA DFM data/flux/flux_taskencoder.py, batch",
        targets=FLUX,
    ),
    Rule(
        "FLX106",
        "pictures-must-match",
        WARNING,
        excludes(
            lambda v: not v.is_mock and v[MBS] > 1,
            at=MBS,
            message=_stacks_pictures,
            hint=f"{MBS} 1, unless your data have one size",
        ),
        "Accepted at start; the first two pictures of different size stop the run.",
        "NVIDIA DFM data/flux/flux_taskencoder.py, batch",
        targets=FLUX,
    ),
    # What FLUX's layers take for granted.
    Rule(
        "FLX107",
        "biases-are-needed",
        ERROR,
        must_be("model.add_bias_linear", True, "FLUX's single blocks add their biases without asking"),
        "The first forward pass fails.",
        "NVIDIA DFM model/flux/flux_layer_spec.py",
        targets=FLUX,
    ),
    Rule(
        "FLX108",
        "patch-is-fixed",
        ERROR,
        must_be("model.patch_size", 1, "latents are packed 2 x 2 before they reach the network"),
        "The output has more channels than the target: shapes do not fit in the first iteration.",
        _FM,
        targets=FLUX,
    ),
    # Kernels.
    Rule(
        "FLX110",
        "cuda-graphs-asked-for-twice",
        ERROR,
        excludes(
            _asks_for_graphs_twice,
            at=lambda v: _ENABLE_GRAPH if v[_ENABLE_GRAPH] else _EXTERNAL_GRAPH,
            message=(
                "of cuda_graph_impl, enable_cuda_graph and external_cuda_graph, which mean the same, "
                "more than one is set"
            ),
            hint="model.cuda_graph_impl alone",
        ),
        "megatron-core asserts it when the configuration is finished.",
        "megatron-core TransformerConfig.__post_init__",
        targets=FLUX,
    ),
    Rule(
        "FLX109",
        "fp8-on-flux",
        ERROR,
        excludes(
            lambda v: v["mixed_precision.fp8"] and v[_FP8_RECIPE] != "mxfp8",
            at=lambda v: _PRECISION if v.is_set_by_user(_PRECISION) else _FP8_RECIPE,
            message=_fp8_without_mxfp8,
            hint="bf16_mixed, or bf16_with_mxfp8_mixed on Blackwell",
        ),
        "Refused in the first forward pass, by reading the code; not tried on a GPU.",
        "NVIDIA DFM model/flux/flux_model.py",
        targets=FLUX,
    ),
)
