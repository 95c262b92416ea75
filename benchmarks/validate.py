"""Validation beside a peer in one run: cold start, many specs in one call, memory. The peer checks the schema alone.

    python benchmarks/validate.py [RUNS] [--large]

The peer is check-jsonschema with our schema on our files; --large adds a call with 10,000 specs.
"""

from __future__ import annotations

import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "specs" / "butterfly_tiny_cpu.yaml"
SCHEMA = ROOT / "schemas" / "targets" / "megatron_core-0.16.1.schema.json"
BIN = Path(sys.executable).parent
OURS = [str(BIN / "dfmspec"), "validate"]
PEER = [str(BIN / "check-jsonschema"), "--schemafile", str(SCHEMA)]
RUNS = 15


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, largest resident set in bytes) of one process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status):
        words = " ".join(command)[:200]
        raise SystemExit(f"{words} failed")
    return seconds, usage.ru_maxrss * 1024


def compared(title: str, commands: dict[str, list[str]], runs: int) -> None:
    """Interleaved runs; the first round only warms the file cache."""
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            results[name].append(timed(command))

    print(f"\n{title}")
    medians = {}
    for name, found in results.items():
        kept = found[1:]
        milliseconds = [1000 * second for second, _ in kept]
        medians[name] = statistics.median(milliseconds)
        memory = max(size for _, size in kept) / 2**20
        print(
            f"  {name:34} min {min(milliseconds):7.0f} ms   median {medians[name]:7.0f} ms   "
            f"max {max(milliseconds):7.0f} ms   {memory:5.0f} MiB"
        )
    first, *_, last = medians
    ratio = medians[first] / medians[last]
    print(f"  ratio of the medians, {first} / {last}: {ratio:.2f}")


def one_spec(runs: int) -> None:
    """A process for one spec: the cold start."""
    commands = {
        "dfmspec": [*OURS, "--check", "spec", str(SPEC)],
        "dfmspec --check spec,paths": [*OURS, "--check", "spec,paths", str(SPEC)],
        "python -c pass": [sys.executable, "-c", "pass"],
        "check-jsonschema": [*PEER, str(SPEC)],
    }
    compared("one spec, cold", commands, runs)


def many_specs(count: int, folder: Path, runs: int) -> None:
    """A process for `count` copies of a spec in a folder."""
    for number in range(count):
        shutil.copyfile(SPEC, folder / f"{number:05}.yaml")
    files = sorted(map(str, folder.glob("*.yaml")))
    ours = [*OURS, "--check", "spec"]
    commands = {
        "dfmspec": [*ours, str(folder)],
        "dfmspec --jobs 2": [*ours, "-j", "2", str(folder)],
        "check-jsonschema": [*PEER, *files],
    }
    compared(f"{count} specs in one call", commands, runs)


def main() -> int:
    runs = next((int(word) for word in sys.argv[1:] if word.isdigit()), RUNS)
    # As pip does when it installs a package.
    compileall.compile_dir(ROOT / "dfmspec", quiet=1)
    one_spec(runs)
    folder = Path(tempfile.mkdtemp())
    try:
        many_specs(1000, folder, max(3, runs // 4))
        if "--large" in sys.argv:
            many_specs(10_000, folder, 1)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
