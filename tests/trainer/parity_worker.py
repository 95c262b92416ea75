"""One rank of some parity runs, one after another: train a few iterations, write down all that layouts must agree on.

usage: torchrun ... parity_worker.py JOBS.json    (`parity.Job`s of as many ranks; one with a fault comes alone)

Each rank writes FOLDER/rank<r>.pt: losses, gradient norms before clipping, how every parameter is cut, every copy of it
at the end, and, on the first replica alone, its gradients in the first four iterations and in every tenth.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from dfmspec.processes import die_with_parent


def inject(fault: str) -> None:
    """Make this process commit a fault of the upstream."""
    if fault == "missing_sequence_parallel_flag":
        from dfmspec.trainer.network.block import AdaLN

        original = AdaLN.__init__

        def without_flag(self: AdaLN, *args: object) -> None:
            original(self, *args)  # type: ignore[arg-type]
            self.down.weight.sequence_parallel = False  # type: ignore[assignment]

        AdaLN.__init__ = without_flag  # type: ignore[method-assign]
    elif fault == "unreduced_qk_norm":
        from dfmspec.trainer.network import model

        original_config = model.transformer_config

        def without_reduction(experiment: object) -> object:
            config = original_config(experiment)  # type: ignore[arg-type]
            config.qk_layernorm = False
            return config

        from dfmspec.trainer import setup

        setup.transformer_config = without_reduction  # type: ignore[assignment]
    elif fault == "summing_final_gather":
        from megatron.core import tensor_parallel

        original_gather = tensor_parallel.gather_from_sequence_parallel_region
        tensor_parallel.gather_from_sequence_parallel_region = lambda x, tensor_parallel_output_grad: original_gather(
            x, tensor_parallel_output_grad=True
        )
    elif fault:
        raise ValueError(fault)


def main() -> None:
    die_with_parent()
    logging.disable(logging.WARNING)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        inject(job["fault"])
        work(job)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


def work(job: dict[str, Any]) -> None:
    """One run, in its own layout."""
    from megatron.core import parallel_state

    from dfmspec.record.checkpoints import iteration_of
    from dfmspec.record.progress import Identity
    from dfmspec.spec.experiment import Experiment
    from dfmspec.trainer import setup, step
    from dfmspec.trainer.checkpoint import writer as checkpoint
    from dfmspec.trainer.data.microbatch import microbatches
    from dfmspec.trainer.data.streams import RankStreams
    from dfmspec.trainer.network.model import global_name

    experiment, folder = Experiment.model_validate(job["experiment"]), Path(job["folder"])
    setup.initialize_distributed(experiment)
    trainer = setup.build_trainer(experiment)
    wake(trainer.chunks)
    trainer.optimizer.reload_model_params()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    done = iteration_of(Path(job["start"])) if job["start"] else 0
    packs = RankStreams(experiment, "train", rank=rank, size=size, consumed=done * experiment.train.global_batch_size)
    if job["start"]:
        checkpoint.load(trainer, packs, Path(job["start"]))
    trainer.graphs = step.graphed(trainer) if job["graphs"] else None

    def named() -> list[tuple[str, torch.nn.Parameter]]:
        return [
            (global_name(chunk, name), weight) for chunk in trainer.chunks for name, weight in chunk.named_parameters()
        ]

    record: dict[str, Any] = {"losses": [], "grad_norms": [], "gradients": []}
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    for iteration in range(done + 1, experiment.train.train_iters + 1):
        for chunk in trainer.model:
            chunk.train()
            chunk.zero_grad_buffer()
        record["losses"].append(
            float(step.forward_backward(trainer, microbatches(experiment, packs), force_all_reduce=True)[0])
        )
        if first and (iteration <= done + 4 or iteration % 10 == 0):
            record["gradients"].append({name: weight.main_grad.to("cpu", copy=True) for name, weight in named()})
        trainer.ema.wait()
        record["grad_norms"].append(float(trainer.update()))
        trainer.scheduler.step(increment=1)
        trainer.ema.update(iteration)
    record["cut"] = {
        name: weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        for name, weight in named()
    }
    record["copies"] = [
        (name, weight.detach().to("cpu", copy=True)) for name, weight in named()
    ]  # a name more than once with VPP
    record["tensor_rank"] = parallel_state.get_tensor_model_parallel_rank()
    torch.save(record, folder / f"rank{torch.distributed.get_rank()}.pt")
    if job["save"]:
        writer = checkpoint.Writer(trainer, folder, Identity(job["experiment"], None))
        writer.save(packs.states(), experiment.train.train_iters).result()
    trainer.release_graphs()
    parallel_state.destroy_model_parallel()
    (folder / f"done{torch.distributed.get_rank()}").touch()


def asleep(name: str) -> bool:
    """Whether a weight is zero as it is initialised, and keeps blocks, or the whole network, from being seen."""
    return "adaln.up" in name or name.startswith("final_linear")


@torch.no_grad()
def wake(chunks: list) -> None:
    """Give the zero-initialised weights values, so that every gradient is alive from the first iteration."""
    from dfmspec.trainer.network.model import global_name
    from dfmspec.trainer.noise import counter_seed

    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if asleep(name):
                generator = torch.Generator().manual_seed(counter_seed("wake", global_name(chunk, name)))
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


if __name__ == "__main__":
    main()
