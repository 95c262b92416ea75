"""A checkpoint of NVIDIA DFM's DiT as Megatron-Bridge writes it, of weights alone: DFM trains on from it, and samples.

Named as `checkpoint.pretrained_checkpoint` of DFM's script it is loaded as for fine-tuning: without the optimizer's
state, which it has not, and from iteration 0.

Source: megatron/bridge/training/checkpointing.py and dfm/src/megatron/model/ at the revisions that NVIDIA DFM has and
pins.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save

from dfmspec.errors import CheckpointError
from dfmspec.record.bridge_checkpoints import LATEST_TRAIN_STATE, TRAIN_STATE
from dfmspec.record.bridge_config import SHARED_FIELDS
from dfmspec.record.checkpoints import COMMON
from dfmspec.spec.checkpoints import RUN_CONFIG
from dfmspec.spec.experiment import Experiment
from dfmspec.spec.iterations import folder_of
from dfmspec.spec.model import Model
from dfmspec.trainer.network.bridge_weights import of_one_process
from dfmspec.trainer.network.embeddings import axis_sizes, sinusoid

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LORA_RANK = 256
"""Of adaLN, written into DFM's code."""
_PROVIDER = "dfm.src.megatron.model.dit.dit_model_provider.DiTModelProvider"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""What megatron-core asks of a checkpoint before it names its tensors."""


def write_bridge_checkpoint(
    folder: Path, weights: Mapping[str, Tensor], experiment: Experiment, iteration: int
) -> None:
    """Write a folder of checkpoints that holds one, of these weights in bf16, as DFM keeps them.

    Args:
        folder: the folder; it must not exist.
        weights: under the names of DFM's state dict, whole.
        experiment: what they are of.
        iteration: at which.

    Raises:
        CheckpointError: DFM has no such network.
        OSError: it cannot be written.
    """
    model = experiment.model
    if model.adaln_lora_rank != _LORA_RANK:
        raise CheckpointError(
            f"model.adaln_lora_rank is {model.adaln_lora_rank}, and NVIDIA DFM's DiT has {_LORA_RANK}; "
            "--names dfm writes a file of any rank"
        )
    path = folder / folder_of(iteration)
    path.mkdir(parents=True)
    _write_shards(path, weights, model)
    torch.save({"checkpoint_version": 3.0, "iteration": iteration, "content_metadata": _CONTENT}, path / COMMON)
    (path / RUN_CONFIG).write_text(yaml.safe_dump(_run_config(experiment)), encoding="utf-8")
    (path / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    torch.save(_train_state(iteration), path / TRAIN_STATE)
    shutil.copyfile(path / TRAIN_STATE, folder / LATEST_TRAIN_STATE)


def _write_shards(path: Path, weights: Mapping[str, Tensor], model: Model) -> None:
    """Write the tensors, with the layers of a kind in one."""
    content: dict[str, Any] = {}
    layers: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        in_bf16 = weight.bfloat16()
        match = _LAYER.fullmatch(name)
        if match is None:
            content[f"module.{name}"] = in_bf16
        else:
            layers.setdefault(f"module.decoder.layers.{match[2]}", []).append(in_bf16)
    for name, parts in layers.items():
        content[name] = torch.stack(parts)
        if ".linear_" in name:
            content |= _no_extra_state(name.removesuffix(".weight"), len(parts))
    content["module.pos_embedder.pos_embedding.weight"] = position_table(model).bfloat16()
    planner = DefaultSavePlanner(flatten_state_dict=False)
    with of_one_process():
        save(content, storage_writer=FileSystemWriter(path), planner=planner, no_dist=True)


def _no_extra_state(linear: str, layers: int) -> dict[str, list[Tensor]]:
    """What Transformer Engine keeps of a linear layer beside its weight where nothing is in FP8, layer by layer."""
    return {
        f"{linear}._extra_state/shard_{layer}_{layers}": [torch.empty(0, dtype=torch.uint8)] for layer in range(layers)
    }


def position_table(model: Model) -> Tensor:
    """DFM's table of positions, which its checkpoints have, [T H W, D] in fp32: time, width, height.

    DFM looks position (t, h, w) up in row t H W + h W + w. Diffusers, which computes the table, takes H for the length
    of a row: only where H is W does each row hold the position that it is used for.
    """
    frames, height, width = axis_sizes(
        model.max_frames, model.max_img_h, model.max_img_w, model.patch_temporal, model.patch_spatial
    )
    quarter = model.hidden_size // 4
    three_eighths = 3 * model.hidden_size // 8
    of_time = sinusoid(torch.arange(frames), quarter)
    of_first = sinusoid(torch.arange(height), three_eighths)
    of_second = sinusoid(torch.arange(width), three_eighths)
    shape = (frames, width, height, -1)
    parts = (
        of_time[:, None, None].expand(shape),
        of_first[None, None, :].expand(shape),
        of_second[None, :, None].expand(shape),
    )
    return torch.cat(parts, dim=-1).flatten(0, 2)


def _run_config(experiment: Experiment) -> dict[str, Any]:
    """What DFM builds its network from, and what it asks of a checkpoint before it loads it."""
    model = {name: getattr(experiment.model, name) for name in SHARED_FIELDS}
    model |= {
        "_target_": _PROVIDER,
        "sigma_data": experiment.diffusion.sigma_data,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    checkpoint = {"save_optim": False, "save_rng": False, "fully_parallel_save": True}
    return {"model": model, "checkpoint": checkpoint}


def _train_state(iteration: int) -> dict[str, Tensor]:
    """Megatron-Bridge's state of a training, of which a fine-tuning reads the step alone."""
    counts = {
        "step": iteration,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    state = {name: torch.tensor(count, dtype=torch.int32) for name, count in counts.items()}
    state["floating_point_operations_so_far"] = torch.tensor(0.0, dtype=torch.float64)
    for phase in ("do_train", "do_valid", "do_test"):
        state[phase] = torch.tensor(False)
    return state
