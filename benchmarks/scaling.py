"""How DiT-XL scales over the GPUs of this machine: replicas on W2, tensor and context parallelism on one long sample; memory.

usage: python benchmarks/scaling.py [--gpus N] [--only WORD] [--dry-run]    each row is a torchrun of benchmarks/train.py of its own
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

RECOMPUTE = ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"]


def layouts(most: int) -> Iterator[tuple[str, str, int, list[str]]]:
    """(workload, layout, GPUs, overrides) for up to `most` GPUs."""
    counts = [count for count in (1, 2, 4, 8) if count <= most]
    for gpus in counts:
        yield "W2", f"DP{gpus}", gpus, []
    for workload, memory in (("L32", []), ("L128", RECOMPUTE)):
        for gpus in counts:
            shared = ["train.global_batch_size=1", *memory]
            if gpus == 1:
                yield workload, "one", 1, shared
                continue
            yield workload, f"TP{gpus} SP", gpus, [*shared, f"model.tensor_model_parallel_size={gpus}", "model.sequence_parallel=true"]
            yield workload, f"CP{gpus}", gpus, [*shared, f"model.context_parallel_size={gpus}"]


def measured(workload: str, gpus: int, overrides: list[str]) -> dict[str, float] | None:
    """The row that benchmarks/train.py made; None when it could not be run."""
    steps = {"L32": "4", "L128": "2"}.get(workload, "6")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), str(Path(__file__).with_name("train.py")), workload,
            *overrides, "--steps", steps, "--rounds", "2", "--json", str(out), "--peers", "none",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if out.exists():
            row: dict[str, float] = json.loads(out.read_text())[-1]
            return row
        print("\n".join(result.stderr.strip().splitlines()[-3:]), file=sys.stderr)
        return None


def main() -> None:
    """A Markdown table."""
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--only", default="", help="rows whose workload or layout begin with it")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    first: dict[str, float] = {}
    print("| workload | layout | tokens/s | of one GPU's | ms | GiB of GPU 0 |\n|---|---|---|---|---|---|", flush=True)
    for workload, layout, gpus, overrides in layouts(args.gpus):
        if not (workload.startswith(args.only) or layout.startswith(args.only)):
            continue
        row = None if args.dry_run else measured(workload, gpus, overrides)
        if row is None:
            print(f"| {workload} | {layout} | {'' if args.dry_run else 'failed'} | | | | {' '.join(overrides) if args.dry_run else ''}", flush=True)
            continue
        rate = row["tokens_per_s"]
        if gpus == 1:
            first[workload] = rate
        ratio = f"{rate / first[workload]:.2f}" if workload in first else ""
        print(f"| {workload} | {layout} | {rate / 1e3:.1f} k | {ratio} | {row['ms']:.0f} | {row['peak_GiB']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
