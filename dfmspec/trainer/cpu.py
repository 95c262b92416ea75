"""megatron-core without CUDA: over gloo on the CPU, or on the meta device, where tensors have shapes and no values.

megatron-core writes `device="cuda"` and `torch.cuda.*` into its buffers, its schedules and its optimizer. Here a
`TorchFunctionMode` sends those tensors elsewhere, and the few `torch.cuda` functions it calls get an answer. Only
`setup` (for cluster.device cpu) and `deep` (meta) know of this module, and it refuses to load for a CUDA run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Elsewhere(TorchFunctionMode):
    """Every tensor that is asked for on a CUDA device is made on another one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The device that is asked for.
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = self.device
        if func is torch.Tensor.cuda:
            return args[0] if self.device.type == "cpu" else args[0].to(self.device)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], self.device, *args[2:])
        result = func(*args, **kwargs)

        # The optimizers sort parameters by type names such as 'torch.cuda.FloatTensor'.
        if func is torch.Tensor.type and len(args) == 1 and isinstance(result, str):
            result = result.replace("torch.meta.", "torch.")
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@cache
def install(device: str) -> None:
    """Let megatron-core run on `cpu`, or be built on `meta`, in this process; once is enough.

    Raises:
        RuntimeError: for any other device.
    """
    if device not in ("cpu", "meta"):
        raise RuntimeError(f"dfmspec.trainer.cpu is for runs without CUDA, not for {device}")
    elsewhere = torch.device(device)
    _Elsewhere(elsewhere).__enter__()

    # What megatron-core asks of torch.cuda, and tells it.
    cuda = torch.cuda
    cuda.current_device = lambda: elsewhere
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda device=None: (0, 0)
    for silent in ("synchronize", "set_device", "manual_seed", "empty_cache"):
        setattr(cuda, silent, lambda *args, **kwargs: None)

    # Random state: the CPU's.
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.random.get_rng_state = cuda.get_rng_state

    import megatron.core.tensor_parallel.random as tensor_parallel_random

    def set_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    tensor_parallel_random._set_cuda_rng_state = set_rng_state
