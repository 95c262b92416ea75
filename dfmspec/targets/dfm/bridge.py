"""Megatron-Bridge as DFM 7cb7634 pins it: its named precisions, and the classes of sections that recipes leave out."""

from __future__ import annotations

from typing import Any

# Parts of the named precisions: a format of the weights, and a recipe of FP8 over it.

_BF16: dict[str, Any] = {
    "bf16": True,
    "params_dtype": "torch.bfloat16",
    "pipeline_dtype": "torch.bfloat16",
}
_FP16: dict[str, Any] = {
    "fp16": True,
    "params_dtype": "torch.float16",
    "pipeline_dtype": "torch.float16",
}
_DELAYED = {
    "fp8": "hybrid",
    "fp8_recipe": "delayed",
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
    "fp8_param_gather": True,
}
_MXFP8 = {
    "fp8": "e4m3",
    "fp8_recipe": "mxfp8",
    "fp8_param_gather": True,
    "reuse_grad_buf_for_mxfp8_param_ag": True,
}
_BLOCKWISE = {
    "fp8": "hybrid",
    "fp8_recipe": "blockwise",
}


def _current(layers: int, recipe: str = "tensorwise") -> dict[str, Any]:
    """Current scaling of FP8, with so many layers at each end in bf16."""
    return {
        "fp8": "hybrid",
        "fp8_recipe": recipe,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": layers,
        "num_layers_at_end_in_bf16": layers,
        "fp8_param_gather": True,
    }


PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16_mixed": _BF16,
    "fp16_mixed": _FP16,
    "bf16_with_fp8_delayed_scaling_mixed": _BF16 | _DELAYED,
    "fp16_with_fp8_delayed_scaling_mixed": _FP16 | _DELAYED,
    "bf16_with_mxfp8_mixed": _BF16 | _MXFP8,
    "fp16_with_mxfp8_mixed": _FP16 | _MXFP8,
    "bf16_with_fp8_current_scaling_mixed": _BF16 | _current(1),
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": _BF16 | _current(2),
    "nanov2_bf16_with_fp8_current_scaling_mixed": _BF16 | _current(2, "blockwise"),
    "fp16_with_fp8_current_scaling_mixed": _FP16 | _current(1),
    "bf16_with_fp8_subchannel_scaling_mixed": _BF16 | _BLOCKWISE,
    "fp16_with_fp8_subchannel_scaling_mixed": _FP16 | _BLOCKWISE,
    "bf16_with_nvfp4_mixed": _BF16 | {"fp4": "e2m1"},
}
"""Megatron-Bridge's named precisions, where they differ from BRIDGE_PRECISION."""

BRIDGE_PRECISION: dict[str, Any] = {
    # Formats.
    "fp32": False,
    "fp16": False,
    "bf16": False,
    "params_dtype": None,
    "pipeline_dtype": None,
    "autocast_dtype": None,
    "autocast_enabled": False,
    "grad_reduce_in_fp32": True,
    # FP8 and FP4.
    "fp8": None,
    "fp8_recipe": "tensorwise",
    "first_last_layers_bf16": False,
    "fp8_margin": 0,
    "fp8_amax_history_len": 1,
    "fp8_amax_compute_algo": "most_recent",
    "fp8_wgrad": True,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "fp8_param": None,
    "fp8_param_gather": False,
    "fp4": None,
    "fp4_recipe": "nvfp4",
    # The scale of the loss under fp16.
    "loss_scale": None,
    "initial_loss_scale": 4294967296.0,
    "min_loss_scale": 1.0,
    "loss_scale_window": 1000.0,
    "hysteresis": 2,
    # More of FP8: which layers stay in bf16, and MXFP8's buffer.
    "num_layers_at_start_in_bf16": 0,
    "num_layers_at_end_in_bf16": 0,
    "reuse_grad_buf_for_mxfp8_param_ag": False,
}
"""Megatron-Bridge's MixedPrecisionConfig: its fields and their defaults."""

_CONFIG = "megatron.bridge.training.config"
CLASSES = {
    "comm_overlap": "megatron.bridge.training.comm_overlap.CommOverlapConfig",
    "ft": f"{_CONFIG}.FaultToleranceConfig",
    "straggler": f"{_CONFIG}.StragglerDetectionConfig",
    "nvrx_straggler": f"{_CONFIG}.NVRxStragglerDetectionConfig",
    "tensor_inspect": f"{_CONFIG}.TensorInspectConfig",
    "inprocess_restart": f"{_CONFIG}.InProcessRestartConfig",
}
"""Sections that the recipe leaves out: without the class's path, upstream keeps a plain mapping and fails on it."""
