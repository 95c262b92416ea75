"""One rank of a parity run: train a few iterations and write down everything that layouts must agree on.

usage: torchrun ... parity_worker.py EXPERIMENT.json OUT_DIR [--fault FAULT] [--from CHECKPOINT] [--save]

Each rank writes OUT_DIR/rank<r>.pt: losses, gradient norms before clipping, every parameter's gradient at the first
iterations and at every tenth with how it is cut, and the parameters at the end. `--from` sets out from a checkpoint,
`--save` leaves one in OUT_DIR. FAULT injects one of NVIDIA DFM's own faults.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch


def inject(fault: str | None) -> None:
    """Make this process commit a fault of the upstream (trainer.md 3.2, items 9 to 11)."""
    if fault == "missing_sequence_parallel_flag":
        from dfmspec.trainer.block import AdaLN

        original = AdaLN.__init__

        def without_flag(self: AdaLN, *args: object) -> None:
            original(self, *args)  # type: ignore[arg-type]
            self.down.weight.sequence_parallel = False  # type: ignore[assignment]

        AdaLN.__init__ = without_flag  # type: ignore[method-assign]
    elif fault == "unreduced_qk_norm":
        from dfmspec.trainer import model

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
    elif fault is not None:
        raise ValueError(fault)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--fault")
    parser.add_argument("--from", dest="start", type=Path)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="where the layout allows them, as a run does")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    from megatron.core import parallel_state

    from dfmspec.spec.experiment import Experiment
    from dfmspec.trainer import checkpoint, setup, step
    from dfmspec.trainer.model import global_name
    from dfmspec.trainer.streams import RankStreams

    config = json.loads(args.config.read_text())
    experiment = Experiment.model_validate(config)
    setup.initialize_distributed(experiment)
    inject(args.fault)
    trainer = setup.build_trainer(experiment)
    wake(trainer.chunks)
    trainer.optimizer.reload_model_params()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    done = checkpoint.stored_iteration(args.start) if args.start else 0
    packs = RankStreams(experiment, "train", rank=rank, size=size, consumed=done * experiment.train.global_batch_size)
    if args.start:
        checkpoint.load(trainer, packs, args.start)
    trainer.graphs = step.graphed(trainer) if args.graphs else None

    def named() -> list[tuple[str, torch.nn.Parameter]]:
        return [(global_name(chunk, name), weight) for chunk in trainer.chunks for name, weight in chunk.named_parameters()]

    record: dict = {"losses": [], "grad_norms": [], "gradients": []}
    for iteration in range(done + 1, experiment.train.train_iters + 1):
        for chunk in trainer.model:
            chunk.train()
            chunk.zero_grad_buffer()
        record["losses"].append(float(step.forward_backward(trainer, step.microbatches(experiment, packs), force_all_reduce=True)))
        if iteration <= done + 4 or iteration % 10 == 0:
            record["gradients"].append({name: weight.main_grad.clone() for name, weight in named()})
        trainer.ema.wait()
        record["grad_norms"].append(float(trainer.update()))
        trainer.scheduler.step(increment=1)
        trainer.ema.update(iteration)
    record["cut"] = {
        name: weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None for name, weight in named()
    }
    record["parameters"] = {name: weight.detach().clone() for name, weight in named()}
    record["copies"] = [  # every copy on this rank, VPP's included
        (name, weight.detach().clone()) for name, weight in named()
    ]
    record["tensor_rank"] = parallel_state.get_tensor_model_parallel_rank()
    torch.save(record, args.out_dir / f"rank{torch.distributed.get_rank()}.pt")
    if args.save:
        checkpoint.Writer(trainer, args.out_dir, config, "").save(packs.states(), experiment.train.train_iters).result()
    trainer.release_graphs()
    torch.distributed.destroy_process_group()


@torch.no_grad()
def wake(chunks: list) -> None:
    """Give the zero-initialised weights values, so that every gradient is alive from the first iteration."""
    from dfmspec.trainer.model import global_name
    from dfmspec.trainer.noise import counter_seed

    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if "adaln.up" in name or name.startswith("final_linear"):
                generator = torch.Generator().manual_seed(counter_seed("wake", global_name(chunk, name)))
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


if __name__ == "__main__":
    main()
