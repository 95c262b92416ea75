"""MOD, PRE, SMP: the network's geometry, its precision, the sampler."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.diagnostics import Finding, Severity
from dfmspec.layout import nearest_multiples
from dfmspec.rules.base import DFM, OURS, Rule, View, excludes, must_divide, path

HIDDEN, HEADS = "model.hidden_size", "model.num_attention_heads"


def _position_width(view: View) -> Iterator[Finding]:
    hidden = view[HIDDEN]
    if hidden % 16:
        yield Finding(
            path(HIDDEN), f"{HIDDEN} {hidden} is not a multiple of 16: 3-D sin-cos positions take 1/4 for time and 3/8 for each side, in pairs",
            f"{HIDDEN} {' or '.join(map(str, nearest_multiples(hidden, 16)))}",
        )  # fmt: skip


def _recompute(view: View) -> Iterator[Finding]:
    granularity, method, layers = (view[f"model.recompute_{name}"] for name in ("granularity", "method", "num_layers"))
    if granularity == "full" and (method is None or layers is None):
        missing = " and ".join(f"recompute_{name}" for name, value in (("method", method), ("num_layers", layers)) if value is None)
        yield Finding(
            path("model.recompute_granularity"), f"recompute_granularity full needs {missing}",
            "for example model.recompute_method=uniform model.recompute_num_layers=1",
        )  # fmt: skip
    elif granularity is None and (method or layers):
        yield Finding(
            path("model.recompute_method" if method else "model.recompute_num_layers"),
            "recompute_method and recompute_num_layers do nothing without recompute_granularity",
            "set model.recompute_granularity=full, or remove them", Severity.WARNING,
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


RULES = (
    Rule(
        "MOD101", "hidden-not-divisible-by-heads", Severity.ERROR,
        must_divide(HEADS, HIDDEN, words="a head is an equal share of the width"),
        "Attention would be narrower than the model, in silence.",
        ("model.hidden_size=1152", "model.num_attention_heads=15"), ("model.num_attention_heads=9",),
    ),
    Rule(
        "MOD102", "hidden-size-not-multiple-of-16", Severity.ERROR, _position_width,
        "The position embedding is split over three axes, and each into sines and cosines.",
        ("model.hidden_size=1160", "model.num_attention_heads=10"), ("model.hidden_size=1280", "model.num_attention_heads=10"),
    ),
    Rule(
        "MOD103", "recompute-incomplete", Severity.ERROR, _recompute,
        "megatron-core raises a ValueError when the configuration is built.",
        ("model.recompute_granularity=full",),
        ("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"),
    ),
    Rule(
        "MOD104", "picture-does-not-fit", Severity.ERROR, _embedded_fits,
        "The first batch would stop the run.",
        ("data.source=embedded", "data.resolution=512", "dataset.task_encoder_seq_length=512"), ("data.source=embedded",), OURS,
    ),
    Rule(
        "MOD105", "fixed-by-dfm", Severity.ERROR,
        excludes(lambda v: (v["model.patch_spatial"], v["model.patch_temporal"]) != (2, 1), at="model.patch_spatial",
                 message="DFM's task encoder always cuts patches of 2x2x1, whatever the model says", hint="set patch_spatial 2 and patch_temporal 1"),
        "Shapes do not match in the first iteration.",
        ("model.patch_spatial=4",), ("model.patch_spatial=2",), DFM,
    ),
    Rule(
        "PRE101", "transformer-engine-on-cpu", Severity.ERROR,
        excludes(lambda v: v["cluster.device"] == "cpu" and v["model.transformer_impl"] == "transformer_engine", at="model.transformer_impl",
                 message="Transformer Engine has no CPU kernels", hint="remove model.transformer_impl to have it derived"),
        "The import fails on every rank.",
        ("cluster.device=cpu", "model.transformer_impl=transformer_engine"), ("cluster.device=cpu",), OURS,
    ),
    Rule(
        "SMP101", "sampler-range-empty", Severity.ERROR,
        excludes(lambda v: v["diffusion.sigma_min"] >= v["diffusion.sigma_max"], at="diffusion.sigma_min",
                 message="diffusion.sigma_min is not below diffusion.sigma_max", hint="EDM's values are 0.002 and 80"),
        "The noise levels of the sampler would not fall.",
        ("diffusion.sigma_min=80",), ("diffusion.sigma_min=0.01",), OURS,
    ),
    Rule(
        "SMP102", "condition-always-dropped", Severity.ERROR,
        excludes(lambda v: v["diffusion.condition_dropout"] >= 1 or v["diffusion.ema_decay"] >= 1, at="diffusion.condition_dropout",
                 message="condition_dropout and ema_decay are shares below 1", hint="DFM drops 0.2 of the conditions; ema_decay 0.9999"),
        "The network would never see a text, or the averaged weights never change.",
        ("diffusion.condition_dropout=1.0",), ("diffusion.condition_dropout=0.1",), OURS,
    ),
)  # fmt: skip
