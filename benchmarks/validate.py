"""Validation beside a peer in the same run: cold start, many specs in one call, memory. The peer checks the schema alone.

    python benchmarks/validate.py [RUNS] [--large]

The peer is check-jsonschema with the same schema on the same files; --large adds a call with 10,000 specs.
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


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, largest resident set in bytes) of one process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)[:200]} failed")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def compared(title: str, commands: dict[str, list[str]], runs: int) -> None:
    """Interleaved runs; the first round only warms the file cache."""
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            results[name].append(timed(command))
    print(f"\n{title}")
    medians = {}
    for name, found in results.items():
        seconds = [second for second, _ in found[1:]]
        medians[name] = statistics.median(seconds)
        memory = max(size for _, size in found[1:]) / 2**20
        print(f"  {name:34} min {min(seconds) * 1000:7.0f} ms   median {medians[name] * 1000:7.0f} ms   max {max(seconds) * 1000:7.0f} ms   {memory:5.0f} MiB")
    first, *_, last = medians
    print(f"  ratio of the medians, {first} / {last}: {medians[first] / medians[last]:.2f}")


def main() -> int:
    runs = next((int(word) for word in sys.argv[1:] if word.isdigit()), 15)
    compileall.compile_dir(ROOT / "dfmspec", quiet=1)  # as pip does when it installs a package
    ours, peer = [str(BIN / "dfmspec"), "validate", "--check", "spec"], [str(BIN / "check-jsonschema"), "--schemafile", str(SCHEMA)]
    compared("one spec, cold", {"dfmspec": [*ours, str(SPEC)], "dfmspec --check spec,paths": [*ours[:-1], "spec,paths", str(SPEC)],
                                "python -c pass": [sys.executable, "-c", "pass"], "check-jsonschema": [*peer, str(SPEC)]}, runs)  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    try:
        for count in (1000, 10_000) if "--large" in sys.argv else (1000,):
            for number in range(count):
                shutil.copyfile(SPEC, folder / f"{number:05}.yaml")
            files = sorted(map(str, folder.glob("*.yaml")))
            commands = {"dfmspec": [*ours, str(folder)], "dfmspec --jobs 2": [*ours, "-j", "2", str(folder)], "check-jsonschema": [*peer, *files]}
            compared(f"{count} specs in one call", commands, max(3, runs // 4) if count == 1000 else 1)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
