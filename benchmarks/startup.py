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
SPEC = "specs/butterfly_tiny_cpu.yaml"
SCHEMA = "schemas/targets/megatron_core-0.16.1.schema.json"
RUNS = 15


def main() -> int:
    runs = RUNS
    if len(sys.argv) > 1:
        runs = int(sys.argv[1])

    # The commands, of this environment.
    folder = Path(sys.executable).parent
    dfmspec = str(folder / "dfmspec")
    peer = folder / "check-jsonschema"
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "dfmspec --version": [dfmspec, "--version"],
        "dfmspec validate": [dfmspec, "validate", SPEC],
        "dfmspec plan": [dfmspec, "plan", SPEC],
    }
    if peer.exists():
        commands["check-jsonschema"] = [str(peer), "--schemafile", SCHEMA, SPEC]

    # In turns; the first round warms the file cache.
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            times[name].append(time.perf_counter() - began)
    for name, seconds in times.items():
        kept = [1000 * second for second in seconds[1:]]
        median = statistics.median(kept)
        print(f"{name:20} min {min(kept):6.0f} ms   median {median:6.0f} ms   max {max(kept):6.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
