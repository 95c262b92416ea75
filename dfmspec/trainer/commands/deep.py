"""`validate --check deep`: Megatron's own objects for a plan, on the meta device.

One process stands for each pipeline stage in turn. The process group is torch's fake one, of the planned world size:
groups have their true ranks, and nothing is sent. What Megatron refuses is told in its own words.
`python -m dfmspec.trainer.commands.deep < config.json` prints JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from pydantic import ValidationError
from torch.testing._internal.distributed.fake_pg import FakeStore

from dfmspec.spec.experiment import Experiment
from dfmspec.trainer import cpu
from dfmspec.trainer.setup import build_trainer


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Build what a configuration describes, and say what Megatron refuses.

    Returns:
        {"refusals": [{"stage", "message", "place"}], "parameters": of the whole model, "notes": [...]}; without
        "parameters" when it is no configuration.
    """
    config, notes = _buildable(config)
    try:
        experiment = Experiment.model_validate(config)
    except ValidationError as error:
        return {"refusals": [_invalid(error)], "notes": notes}
    cpu.install("meta")
    cluster = experiment.cluster
    world = cluster.nnodes * cluster.nproc_per_node
    stages = experiment.model.pipeline_model_parallel_size
    ranks_of_stage = world // stages

    # One stage of each kind, until one is refused.
    refusals = []
    parameters = 0
    for stage, same in _distinct(stages):
        try:
            parameters += same * _build(experiment, rank=stage * ranks_of_stage, world=world)
        except Exception as error:  # whatever Megatron raises is what we want to know
            refusals.append(_refused(error, f"pipeline stage {stage} of {stages}"))
            break
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
    return {"refusals": refusals, "parameters": parameters, "notes": notes}


def _buildable(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration that can be built here, with notes of what was changed for it."""
    notes = []
    wants_te = config["model"]["transformer_impl"] == "transformer_engine"
    if wants_te and importlib.util.find_spec("transformer_engine") is None:
        config = {**config, "model": {**config["model"], "transformer_impl": "local"}}
        notes.append("Transformer Engine is not installed here: the model was built with the local back end")
    # For the CPU, Megatron draws weights there, beside the meta device.
    config = {**config, "cluster": {**config["cluster"], "device": "cuda"}}
    return config, notes


def _invalid(error: ValidationError) -> dict[str, str]:
    """The first thing that is wrong with a configuration."""
    first = error.errors()[0]
    return {
        "stage": "configuration",
        "message": first["msg"],
        "place": ".".join(map(str, first["loc"])),
    }


def _refused(error: Exception, stage: str) -> dict[str, str]:
    """What was raised while a stage was built, and where."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file = frame.filename.rpartition("site-packages/")[2]
    return {
        "stage": stage,
        "message": str(error) or f"{type(error).__name__} at: {frame.line}",
        "place": f"{file}:{frame.lineno}",
    }


def _distinct(stages: int) -> list[tuple[int, int]]:
    """(stage, how many are like it): the first, one of the middle, the last."""
    found = [(0, 1)]
    if stages > 2:
        found.append((1, stages - 2))
    if stages > 1:
        found.append((stages - 1, 1))
    return found


def _build(experiment: Experiment, rank: int, world: int) -> int:
    """Model, DDP, optimizer and schedule of one rank; its parameters, counted over its tensor-parallel group."""
    # Process groups.
    model = experiment.model
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        create_gloo_process_groups=False,
    )
    _stand_in_for_gloo()

    # What trains.
    tensor_parallel.model_parallel_cuda_manual_seed(experiment.rng.seed)
    trainer = build_trainer(experiment)

    # Its parameters, but for those that another stage counts.
    parameters = 0
    for chunk in trainer.chunks:
        for weight in chunk.parameters():
            if getattr(weight, "shared", False):
                continue
            is_cut = getattr(weight, "tensor_model_parallel", False)
            ranks = model.tensor_model_parallel_size if is_cut else 1
            parameters += weight.numel() * ranks
    return parameters


def _stand_in_for_gloo() -> None:
    """Let Megatron have its other groups where it asks for those of gloo, which a fake world does not have."""
    names = [name for name in vars(parallel_state) if name.endswith("_GLOO")]
    for name in names:
        group = getattr(parallel_state, name.removesuffix("_GLOO"))
        setattr(parallel_state, name, group)


def main() -> int:
    """Check the configuration on standard input; what was found is printed as JSON."""
    torch.set_num_threads(1)
    found = check(json.load(sys.stdin))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
