"""`validate --check deep`: Megatron's own objects for a plan, on the meta device, one process standing for each pipeline stage.

The process group is torch's fake one, of the planned world size: groups have their true ranks, and nothing is sent.
What Megatron refuses is told in its own words. `python -m dfmspec.trainer.commands.deep < config.json` prints JSON.
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
    """{"refusals": [{"stage", "message", "place"}], "parameters": of the whole model, "notes": [...]}."""
    notes = []
    if config["model"]["transformer_impl"] == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        config = {**config, "model": {**config["model"], "transformer_impl": "local"}}
        notes.append("Transformer Engine is not installed here: the model was built with the local back end")
    config = {**config, "cluster": {**config["cluster"], "device": "cuda"}}  # for the CPU, Megatron draws weights there, beside the meta device
    try:
        experiment = Experiment.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        return {"refusals": [{"stage": "configuration", "message": first["msg"], "place": ".".join(map(str, first["loc"]))}], "notes": notes}
    cpu.install("meta")
    model, cluster = experiment.model, experiment.cluster
    world, stages = cluster.nnodes * int(cluster.nproc_per_node or 1), model.pipeline_model_parallel_size
    refusals, parameters = [], 0
    for stage, same in _distinct(stages):
        try:
            parameters += same * _build(experiment, rank=stage * (world // stages), world=world)
        except Exception as error:  # whatever Megatron raises is what we want to know
            frame = traceback.extract_tb(error.__traceback__)[-1]
            message = str(error) or f"{type(error).__name__} at: {frame.line}"
            place = f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
            refusals.append({"stage": f"pipeline stage {stage} of {stages}", "message": message, "place": place})
            break
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
    return {"refusals": refusals, "parameters": parameters, "notes": notes}


def _distinct(stages: int) -> list[tuple[int, int]]:
    """(stage, how many are like it): the first, one of the middle, the last."""
    return [(0, 1), *([(1, stages - 2)] if stages > 2 else []), *([(stages - 1, 1)] if stages > 1 else [])]


def _build(experiment: Experiment, rank: int, world: int) -> int:
    """Model, DDP, optimizer and schedule of one rank; its parameters, counted over its tensor-parallel group."""
    model = experiment.model
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        create_gloo_process_groups=False,
    )
    for name in [name for name in vars(parallel_state) if name.endswith("_GLOO")]:  # a fake world has no gloo; its groups serve as well
        setattr(parallel_state, name, getattr(parallel_state, name.removesuffix("_GLOO")))
    tensor_parallel.model_parallel_cuda_manual_seed(experiment.rng.seed)
    trainer = build_trainer(experiment)
    shared = [weight for chunk in trainer.chunks for weight in chunk.parameters() if not getattr(weight, "shared", False)]
    return sum(w.numel() * (model.tensor_model_parallel_size if getattr(w, "tensor_model_parallel", False) else 1) for w in shared)


def main() -> int:
    torch.set_num_threads(1)
    print(json.dumps(check(json.load(sys.stdin))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
