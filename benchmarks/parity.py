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
    for layout, fault in [*((name, "") for name in parity.LAYOUTS if name != "one"), *parity.FAULTS]:
        d = parity.compare(reference, parity.run(layout, base / f"{layout}{fault}", fault))
        name = f"{layout}, {fault}" if fault else layout
        print(f"| {name} | {d.loss:.1e} | {d.grad_norm:.1e} | {d.gradient:.1e} | {d.replicas:.1e} | {'yes' if d.agrees() else 'no'} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
