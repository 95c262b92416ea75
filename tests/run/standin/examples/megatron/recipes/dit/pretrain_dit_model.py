"""Trains nothing: the flags, lines, files and faults of NVIDIA DFM's script, over gloo on the CPU.

STANDIN_FAULT: words with commas between; STANDIN_SECONDS: of an iteration.
"""

import argparse
import os
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from megatron.bridge.training.utils.sig_utils import DistributedSignalHandler

FAULTS = os.environ.get("STANDIN_FAULT", "").split(",")
SECONDS = float(os.environ.get("STANDIN_SECONDS", "0.05"))


def print_rank_0(line):
    """As upstream's."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def print_rank_last(line):
    """As upstream's."""
    if dist.get_rank() == dist.get_world_size() - 1:
        print(line, flush=True)


def filled(value):
    """A value with OmegaConf's resolver of variables filled in."""
    if not isinstance(value, str):
        return value
    for name in ("DFMSPEC_RUN_DIR", "DFMSPEC_SPEC_DIR"):
        value = value.replace(f"${{oc.env:{name}}}", os.environ.get(name, ""))
    return value


def load(folder, step):
    """The iteration that is gone on from, as upstream finds it."""
    state = Path(folder or "/nowhere", "latest_train_state.pt")
    if step is None and (not state.exists() or "fresh" in FAULTS):
        print_rank_0(f"WARNING: could not find the metadata file {state}")
        print_rank_0("    will not load any checkpoints and will start from random")
        return None
    iteration = step or int(torch.load(state, weights_only=True)["step"])
    print_rank_0(f" loading distributed checkpoint from {folder} at iteration {iteration}")
    return iteration


def save(folder, iteration):
    """A checkpoint's files, in upstream's order."""
    if not folder:
        return
    print_rank_0(f"saving checkpoint at iteration {iteration:7d} to {folder} in torch_dist format")
    path = Path(folder, f"iter_{iteration:07d}")
    if dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    if "slow_save" in FAULTS:
        time.sleep(3)
    writer = dcp.FileSystemWriter(path, single_file_per_rank=False)
    dcp.save({"weight": torch.full((64, 8), float(iteration)), "moment": torch.ones(1000)}, storage_writer=writer)
    if dist.get_rank() == 0:
        torch.save({"iteration": iteration, "checkpoint_version": 3.0}, path / "common.pt")
        (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        state = {"step": torch.tensor(iteration, dtype=torch.int32), "do_train": torch.tensor(True)}
        torch.save(state, path / "train_state.pt")
        shutil.copy(path / "train_state.pt", Path(folder, "latest_train_state.pt"))
        Path(folder, "latest_checkpointed_iteration.txt").write_text(str(iteration))
        (path / "run_config.yaml").write_text("model: {}\n")
        if "truncated" in FAULTS:
            shard = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
            os.truncate(shard, shard.stat().st_size // 2)
    print_rank_0(f"  successfully saved checkpoint from iteration {iteration:7d} to {folder} [ t 1/1, p 1/1 ]")
    dist.barrier()


def any_of(flag):
    """Whether any rank has it."""
    tensor = torch.tensor([float(flag)])
    dist.all_reduce(tensor)
    return tensor.item() > 0


def barrier_and_log(words):
    """As upstream's."""
    dist.barrier()
    print_rank_0(f"[{words}] datetime: {datetime.now():%Y-%m-%d %H:%M:%S} ")


def main():
    """Go through the iterations of a configuration."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mock", action="store_true")
    parser.add_argument("--config-file")
    parser.add_argument("--dataset-path")
    args, _ = parser.parse_known_args()
    print(args)
    config = yaml.safe_load(Path(args.config_file).read_text())
    train = config["train"]
    checkpoint = {key: filled(value) for key, value in config["checkpoint"].items()}
    handler = DistributedSignalHandler()
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    start = load(checkpoint.get("load"), checkpoint.get("ckpt_step"))
    if start is None and checkpoint.get("exit_on_missing_checkpoint"):
        print_rank_0(">> '--exit-on-missing-checkpoint' set ... exiting. <<")
        dist.barrier()
        sys.exit()
    start = start or 0
    folder = checkpoint.get("save")
    interval = config["logger"]["log_interval"]
    print_rank_0(f"Starting training loop at iteration {start}")
    for iteration in range(start + 1, train["train_iters"] + 1):
        time.sleep(SECONDS)
        dist.barrier()
        if "crash" in FAULTS and iteration == 5 and rank == 1:
            raise ValueError("the stand-in's rank 1 has had enough")
        if iteration % interval == 0:
            print_rank_0(f"Step Time : {SECONDS:.2f}s GPU utilization: 1.0MODEL_TFLOP/s/GPU")
            loss = 1 / iteration
            is_nan = "nan" in FAULTS and iteration == 4
            line = f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {iteration:8d}/{train['train_iters']:8d} |"
            line += f" consumed samples: {iteration * train['global_batch_size']:12d} |"
            line += f" elapsed time per iteration (ms): {1000 * SECONDS:.1f} | learning rate: {1e-4:.6E} |"
            line += f" global batch size: {train['global_batch_size']:5d} |"
            line += "" if is_nan else f" lm loss: {loss:.6E} |"
            line += f" loss scale: {1.0:.1f} | grad norm: {0.5:.3f} |"
            line += f" number of skipped iterations: {0:3d} | number of nan iterations: {int(is_nan):3d} |"
            print_rank_last(line)
        if train.get("exit_signal_handler") and any_of(handler.received):
            save(folder, iteration)
            barrier_and_log("exiting program after receiving SIGTERM.")
            return
        if folder and iteration % config["checkpoint"]["save_interval"] == 0:
            save(folder, iteration)
    barrier_and_log("after training is done")
    if folder:
        save(folder, train["train_iters"])
    if train["eval_iters"]:
        for split in ("validation", "test"):
            at = train["train_iters"]
            print_rank_last(
                f" validation loss at iteration {at} on {split} set | lm loss value: 1.0E+00 | lm loss PPL: 2.7E+00 | "
            )
    while "hang" in FAULTS:
        time.sleep(1)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
