"""The parity table: every layout, and every injected fault, against one process, in fp32 on the CPU over gloo.

python benchmarks/parity.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.trainer import parity


def main() -> int:
    base = Path(tempfile.mkdtemp(prefix="parity-"))
    reference = parity.run("one", base / "one")
    print("| layout | loss | gradient norm | worst gradient | replicas | agrees |\n|---|---|---|---|---|---|")
    layouts = [(layout, "") for layout in parity.LAYOUTS if layout != "one"]
    for layout, fault in [*layouts, *parity.FAULTS]:
        found = parity.run(layout, base / f"{layout}{fault}", fault)
        d = parity.compare(reference, found)
        name = f"{layout}, {fault}" if fault else layout
        agrees = "yes" if d.agrees() else "no"
        numbers = (d.loss, d.grad_norm, d.gradient, d.replicas)
        cells = " | ".join(f"{number:.1e}" for number in numbers)
        print(f"| {name} | {cells} | {agrees} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
