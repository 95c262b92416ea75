"""Each test process begins with another GPU, so that tests of one or two do not all meet on the machine's first."""

from __future__ import annotations

import os

import torch


def _rotated(devices: list[str], worker: str) -> list[str]:
    first = 2 * int(worker.removeprefix("gw") or 0) % len(devices)
    return devices[first:] + devices[:first]


torch.set_num_threads(1)  # thousands of small sums take longer the more threads share them
if count := torch.cuda.device_count():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = (
        "1"  # a pool of compilers in every process of every test takes longer than their few kernels
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
        _rotated(visible.split(","), os.environ.get("PYTEST_XDIST_WORKER", ""))
    )
