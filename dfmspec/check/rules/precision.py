"""PRE: number formats, and what their scaling needs."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from dfmspec.check.rules.base import CP, DFM, DFM_DIT, ERROR, FFN, HIDDEN, HINT, LAYERS, OURS, PP, SP, TP, WARNING, Rule, View, excludes, path, shown, together
from dfmspec.diagnostics import Finding
from dfmspec.spec.limits import FLASH_HEADS, FP8_ALIGNMENT
from dfmspec.targets.dfm.bridge import PRECISIONS

M = "mixed_precision."
RECIPE = f"{M}recipe"


def _recipe(view: View) -> Iterator[Finding]:
    name = view[RECIPE]
    if name is not None and name not in PRECISIONS:
        close = get_close_matches(name, PRECISIONS, n=1, cutoff=0.5)
        yield Finding(path(RECIPE), f"mixed_precision {name} is not one of Megatron-Bridge's recipes", f"did you mean {close[0]}?" if close else f"one of: {', '.join(PRECISIONS)}")


def _not_bf16(view: View) -> Iterator[Finding]:
    if view[RECIPE] is None:
        yield Finding(path(RECIPE), "mixed_precision null leaves the number formats to what the recipe put into model, ddp and optimizer", "remove it to have bf16_mixed")
    elif view[RECIPE] in PRECISIONS and (not view[f"{M}bf16"] or view[f"{M}params_dtype"] != "torch.bfloat16"):
        key = next((key for key in (f"{M}bf16", f"{M}params_dtype", RECIPE) if view.is_users(key)), RECIPE)
        yield Finding(path(key), "DFM's DiT casts its embedders and noise levels to bf16 whatever the precision", "use bf16_mixed, or one of the bf16_with_ recipes")


def _fp8_layers(view: View) -> Iterator[Finding]:
    most = view[LAYERS] // view[PP]
    if not (view[f"{M}fp8"] and view[f"{M}first_last_layers_bf16"]):
        return
    if view[f"{M}fp8_recipe"] == "delayed":
        yield Finding(path(f"{M}first_last_layers_bf16"), "delayed scaling cannot leave the first and last layers in bf16", "set it to false, or use another fp8_recipe")
    for end in ("start", "end"):
        key = f"{M}num_layers_at_{end}_in_bf16"
        if not 0 <= view[key] <= most:
            yield Finding(path(key), f"{key} {view[key]} is not between 0 and the {most} layers of a stage", f"0 to {most}")


def _mxfp8(view: View) -> Iterator[Finding]:
    gather, reuse = view[f"{M}fp8_param_gather"], view[f"{M}reuse_grad_buf_for_mxfp8_param_ag"]
    key = next((key for key in (f"{M}reuse_grad_buf_for_mxfp8_param_ag", f"{M}fp8_param_gather", RECIPE) if view.is_users(key)), RECIPE)
    if gather and view[f"{M}fp8_recipe"] == "mxfp8" and not reuse:
        yield Finding(path(key), "mxfp8 with fp8_param_gather needs reuse_grad_buf_for_mxfp8_param_ag", f"set {M}reuse_grad_buf_for_mxfp8_param_ag to true")
    if reuse and not gather:
        yield Finding(path(key), "reuse_grad_buf_for_mxfp8_param_ag needs fp8_param_gather", f"set {M}fp8_param_gather to true")
    if reuse:
        off = [key for key in ("ddp.overlap_param_gather", "ddp.overlap_grad_reduce") if not _overlap(view, key)]
        if off:
            yield Finding(path(key), f"mxfp8 parameters need {' and '.join(off)}; without, gradients become NaN", f"set {' and '.join(off)} to true")


def _overlap(view: View, key: str) -> bool:
    """The flag as comm_overlap leaves it."""
    name = key.split(".")[1]
    section = view.section("comm_overlap")
    chosen = view[f"comm_overlap.{name}"]
    return bool(view[key]) if not section or not view["ddp.use_distributed_optimizer"] else bool(chosen if chosen is not None else view.data_parallel_size > 1)


def _alignment(view: View) -> Iterator[Finding]:
    if not view[f"{M}fp8"]:
        return
    step, tp = 32 if view[f"{M}fp8_recipe"] == "mxfp8" else 16, view[TP]
    for words, width in ((HIDDEN, view[HIDDEN]), (f"{FFN} / TP {tp}", view[FFN] // tp), (f"3 x hidden_size / TP {tp}", 3 * view[HIDDEN] // tp),
                         ("model.crossattn_emb_size", view["model.crossattn_emb_size"])):  # fmt: skip
        if width % step:
            yield Finding(path(words.split(" ")[0] if words.startswith("model.") else HIDDEN), f"fp8 matrix products need widths in multiples of {step}, and {words} is {width}", f"a multiple of {step}, or no fp8")
            return


def _shared_tokens(view: View) -> Iterator[Finding]:
    step, tp, cp = 32 if view[f"{M}fp8_recipe"] == "mxfp8" else 16, view[TP] if view[SP] else 1, view[CP]
    if view[f"{M}fp8"] and tp * cp > 1 and 64 % (tp * cp) == 0 and 64 // (tp * cp) % step:
        words = f"TP {tp} x CP {cp}" if tp > 1 and cp > 1 else f"CP {cp}" if cp > 1 else f"TP {tp}"
        most = 64 // step
        yield Finding(path(CP if cp > 1 else TP), f"fp8 matrix products need tokens in multiples of {step}, and a sample's 64 over {words} are {64 // (tp * cp)}", f"at most {most}, or no fp8", WARNING)


def _own_alignment(view: View) -> Iterator[Finding]:
    if not view[f"{M}fp8"]:
        return
    tp, cp, length, packs = view[TP], view[CP], view["model.seq_length"], view["train.micro_batch_size"]
    tokens = "a pack's length" + (f" x train.micro_batch_size {packs}" if packs > 1 else "") + (f" / CP {cp}" if cp > 1 else "")
    width = view["model.kv_channels"] * view["model.num_attention_heads"]
    for key, words, side in ((HIDDEN, HIDDEN, view[HIDDEN]), (FFN, f"{FFN} / TP {tp}", view[FFN] // tp),
                             ("model.kv_channels", f"kv_channels x heads / TP {tp}", width // tp),
                             ("model.crossattn_emb_size", "model.crossattn_emb_size", view["model.crossattn_emb_size"]),
                             ("dataset.task_encoder_seq_length", tokens, length * packs // cp)):  # fmt: skip
        if side % FP8_ALIGNMENT:
            yield Finding(path(key), f"FP8 matrix products need sides in multiples of {FP8_ALIGNMENT}, and {words.removesuffix(' / TP 1')} is {side}", f"{key} in multiples of {FP8_ALIGNMENT * cp}, or no {M}fp8" if key.startswith("dataset") else f"sizes that TP divides into multiples of {FP8_ALIGNMENT}, or no {M}fp8")


def _own_kernels(view: View) -> Iterator[Finding]:
    key, gpu, head = "model.attention_backend", view["cluster.gpu"], view["model.kv_channels"]
    off = next((f"{name} is {shown(view[name])}" for name, value in (("cluster.device", "cpu"), ("model.transformer_impl", "local"), (f"{M}bf16", False)) if view[name] == value), None)
    if view[key] == "flash" and off:
        yield Finding(path(key), f"FlashAttention 4 is for Transformer Engine's layers in bf16 on a GPU, and {off}", "set it to auto", WARNING)
    elif view[key] == "flash" and gpu in _SINCE and _SINCE[gpu] < 90:
        yield Finding(path(key), f"FlashAttention 4 needs compute capability 9.0, and {gpu} has {_SINCE[gpu] / 10}", "set it to auto")
    elif view[key] == "flash" and head not in FLASH_HEADS:
        yield Finding(path(key), f"FlashAttention 4's gradients were compared with plain attention at heads of {', '.join(map(str, FLASH_HEADS))} channels, and a head has {head}", "set it to auto")
    if view[f"{M}fp8"] and gpu in _SINCE and _SINCE[gpu] < 89:
        yield Finding(path(f"{M}fp8"), f"FP8 matrix products need compute capability 8.9, and {gpu} has {_SINCE[gpu] / 10}", f"remove {M}fp8")


_SINCE = {"a100": 80, "h100": 90, "h200": 90, "b200": 100, "b300": 103, "gb200": 100, "gb300": 103}


def _hardware(view: View) -> Iterator[Finding]:
    gpu = view["cluster.gpu"]
    if gpu is None:
        return
    recipe = view[f"{M}fp8_recipe"] if view[f"{M}fp8"] else None
    needs = 100 if recipe == "mxfp8" or view[f"{M}fp4"] else 90 if recipe == "blockwise" else 89 if recipe else 0
    if _SINCE[gpu] < needs:
        what = "fp4" if view[f"{M}fp4"] else f"fp8 recipe {recipe}"
        works = [name for name, capability in _SINCE.items() if capability >= needs]
        yield Finding(path(RECIPE), f"{what} needs compute capability {needs / 10}, and {gpu} has {_SINCE[gpu] / 10}", f"a GPU of: {', '.join(works)}")


_TC = "megatron-core transformer/transformer_config.py, __post_init__"
_MP = "Megatron-Bridge training/mixed_precision.py"

RULES = (
    Rule(
        "PRE101", "transformer-engine-on-cpu", ERROR,
        excludes(lambda v: v["cluster.device"] == "cpu" and v["model.transformer_impl"] == "transformer_engine", at="model.transformer_impl",
                 message="Transformer Engine has no CPU kernels", hint="remove model.transformer_impl to have it derived"),
        "The import fails on every rank.", "Transformer Engine", OURS,
    ),
    Rule("PRE102", "precision-recipe-unknown", ERROR, _recipe, "Every rank stops with a ValueError before the configuration is checked.", f"{_MP}, get_mixed_precision_config", DFM),
    Rule(
        "PRE103", "precision-not-bf16", ERROR, _not_bf16,
        "Accepted at start; types do not match in the first iteration, or the network trains in another precision than the file says, in silence.",
        "NVIDIA DFM model/common/dit_embeddings.py, model/dit/dit_model.py, edm/edm_pipeline.py", DFM,
    ),
    Rule(
        "PRE104", "two-precisions", ERROR,
        together(
            excludes(lambda v: v[f"{M}bf16"] and v[f"{M}fp16"], at=lambda v: f"{M}fp16" if v.is_users(f"{M}fp16") else f"{M}bf16",
                     message="bf16 and fp16 are both on", hint="use bf16; DiT needs it"),
            excludes(lambda v: v[f"{M}fp8"] and v[f"{M}fp4"], at=lambda v: f"{M}fp8" if v.is_users(f"{M}fp8") else f"{M}fp4",
                     message="fp8 and fp4 are both on", hint="use one of the two"),
        ),
        "Megatron refuses two formats at once.", f"{_MP}; {_TC}", DFM,
    ),
    Rule(
        "PRE105", "fp8-parameters-without-fp8", ERROR,
        excludes(lambda v: v[f"{M}fp8_param_gather"] and not v[f"{M}fp8"], at=f"{M}fp8_param_gather", message="fp8_param_gather gathers fp8 parameters, and fp8 is off",
                 hint=f"set {M}fp8 to hybrid, or fp8_param_gather to false"),
        "megatron-core raises a ValueError when the configuration is built.", _TC, DFM,
    ),
    Rule("PRE106", "fp8-layers-impossible", ERROR, _fp8_layers, "megatron-core raises a ValueError when the configuration is built.", _TC, DFM),
    Rule("PRE107", "mxfp8-incomplete", ERROR, _mxfp8, "Refused at start: without the overlaps, mxfp8 parameters give NaN.", f"{_MP}, finalize; megatron-core DistributedDataParallelConfig", DFM),
    Rule(
        "PRE108", "fp8-sizes-not-aligned", ERROR, together(_alignment, _shared_tokens),
        "Accepted at start; Transformer Engine refuses the first matrix product whose size does not fit.", "megatron-core fp8_utils.py", DFM_DIT,
    ),
    Rule(
        "PRE114", "fp8-sizes-of-the-trainer", ERROR, _own_alignment,
        "cuBLAS refuses the first product with a side that is no multiple of 16. Texts are padded to it; a pack is not.", "cuBLAS, Using the cublasLt API: FP8; dfmspec/trainer/ops/fp8.py", OURS,
    ),
    Rule(
        "PRE115", "fp8-without-bf16", ERROR,
        excludes(lambda v: v[f"{M}fp8"] and (v["cluster.device"] == "cpu" or not v[f"{M}bf16"]), at=f"{M}fp8",
                 message=lambda v: "FP8 matrix products are for GPUs, and cluster.device is cpu" if v["cluster.device"] == "cpu" else "FP8 matrix products take bf16 activations, and bf16 is off",
                 hint=f"remove {M}fp8"),
        "The first product fails.", "dfmspec/trainer/ops/fp8.py", OURS,
    ),
    Rule(
        "PRE116", "kernels-without-their-gpu", ERROR, _own_kernels,
        "The first call of the kernel fails; where it is never called, the key does nothing, in silence.", "flash-attn-4; NVIDIA's compute capabilities", OURS,
    ),
    Rule("PRE109", "precision-unsupported-by-gpu", ERROR, _hardware, "Accepted at start; Transformer Engine refuses it in the first iteration.", "NVIDIA's compute capabilities", DFM),
    Rule(
        "PRE110", "fp8-recompute-impossible", ERROR,
        excludes(lambda v: v[f"{M}fp8"] and v[f"{M}fp8_recipe"] == "delayed" and v["model.recompute_granularity"] == "selective"
                 and {"layernorm", "moe_act"} & {*(v["model.recompute_modules"] or ())},
                 at="model.recompute_modules", message="delayed scaling cannot recompute layernorm or moe_act", hint="use another fp8_recipe, or other modules"),
        "megatron-core raises a ValueError when the configuration is built.", _TC, DFM,
    ),
    Rule(
        "PRE111", "custom-recipe-without-factory", ERROR,
        together(*(
            excludes(lambda v, n=n: v[f"{M}{n}"] and v[f"{M}{n}_recipe"] == "custom" and not v[f"model.{n}_quantizer_factory"], at=f"{M}{n}_recipe",  # type: ignore[misc]
                     message=f"{n}_recipe custom needs model.{n}_quantizer_factory", hint="name the factory, or use a recipe that exists")
            for n in ("fp8", "fp4")
        )),
        "megatron-core raises a ValueError when the configuration is built.", _TC, DFM,
    ),
    Rule(
        "PRE112", "fp8-untested-on-dit", HINT,
        excludes(lambda v: v[f"{M}fp8"] or v[f"{M}fp4"], at=lambda v: next((k for k in (RECIPE, f"{M}fp8", f"{M}fp4") if v.is_users(k)), RECIPE),
                 message="no fp8 or fp4 configuration of DFM's DiT is published: its numbers are unknown", hint="compare a short run with bf16_mixed first"),
        "adaLN and the embedders stay in bf16; whether the loss follows bf16 is for a trial to show.", "NVIDIA DFM examples", DFM_DIT,
    ),
    Rule(
        "PRE113", "fp8-word-unknown", ERROR,
        together(
            excludes(lambda v: v[f"{M}fp8"] not in (None, "hybrid", "e4m3"), at=f"{M}fp8", message=lambda v: f"{M}fp8 {v[f'{M}fp8']} is not a format that Megatron takes", hint="hybrid or e4m3"),
            excludes(lambda v: v[f"{M}fp4"] not in (None, "e2m1"), at=f"{M}fp4", message=lambda v: f"{M}fp4 {v[f'{M}fp4']} is not a format that Megatron takes", hint="e2m1"),
            excludes(lambda v: v[f"{M}fp8"] and v[f"{M}fp8_recipe"] not in ("tensorwise", "delayed", "mxfp8", "blockwise", "custom"), at=f"{M}fp8_recipe",
                     message=lambda v: f"{M}fp8_recipe {v[f'{M}fp8_recipe']} is not known", hint="tensorwise, delayed, mxfp8, blockwise or custom"),
        ),
        "Any word is accepted at start; Transformer Engine fails in the first iteration.", "megatron-core enums.py and fp8_utils.py", DFM,
    ),
)  # fmt: skip
