"""Cold start of the command line: fresh processes, interleaved with a peer (check-jsonschema, when it is installed).

    python benchmarks/startup.py [RUNS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC, SCHEMA = "specs/butterfly_tiny_cpu.yaml", "schemas/targets/megatron_core-0.16.1.schema.json"


def main() -> int:
    runs, folder = int(sys.argv[1]) if len(sys.argv) > 1 else 15, Path(sys.executable).parent
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "dfmspec --version": [str(folder / "dfmspec"), "--version"],
        "dfmspec validate": [str(folder / "dfmspec"), "validate", SPEC],
        "dfmspec plan": [str(folder / "dfmspec"), "plan", SPEC],
    }
    if (folder / "check-jsonschema").exists():
        commands["check-jsonschema"] = [str(folder / "check-jsonschema"), "--schemafile", SCHEMA, SPEC]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs + 1):  # the first round warms the file cache
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            times[name].append(time.perf_counter() - began)
    for name, seconds in times.items():
        kept = seconds[1:]
        print(f"{name:20} min {min(kept) * 1000:6.0f} ms   median {statistics.median(kept) * 1000:6.0f} ms   max {max(kept) * 1000:6.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
