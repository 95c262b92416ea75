"""SIGKILL at random moments of a training that saves after every iteration, until it has finished; then compare.

    python benchmarks/kill_campaign.py [KILLS] [SEED] [PROCESSES]

For each life: start, wait a random time after the first sign of it, kill the whole process tree. Counted: kills while a
save was under way (an aside folder was left), checkpoints that were ever not whole, losses that differ from those of
the run that nothing stopped, and checkpoints that were committed and then lost. The last three must be 0.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dfmspec.record import checkpoints  # noqa: E402
from tests.trainer.training import SHORT, kill_tree, losses, start, train  # noqa: E402

ITERATIONS = 40
WORDS = [
    "--mock",
    "data.num_streams=2",
    "train.global_batch_size=2",
    "checkpoint.save_interval=1",
    "checkpoint.most_recent_k=3",
    f"train.train_iters={ITERATIONS}",
]
DEFAULTS = ["50", "0", "0"]
"""Kills, seed, processes."""


def main() -> int:
    given = sys.argv[1:]
    kills, seed, processes = (int(word) for word in [*given, *DEFAULTS[len(given) :]])
    rng = random.Random(seed)
    base = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    began = time.monotonic()

    # The run that nothing stops.
    train(base / "whole", *WORDS, processes=processes)
    expected = losses(base / "whole")

    # Runs, each killed until it has finished, or until there were enough kills.
    count = {"kills": 0, "in a save": 0, "not whole": 0, "lost": 0, "different": 0, "runs": 0}
    while count["kills"] < kills:
        count["runs"] += 1
        run_dir = base / f"run{count['runs']}"
        run_dir.mkdir()
        finished = False
        while not finished and count["kills"] < kills:
            finished = one_life(run_dir, processes, rng, count)
        if not finished:
            train(run_dir, *WORDS, processes=processes)
        count["different"] += sum(values != expected[iteration] for iteration, values in losses(run_dir).items())
        seconds = time.monotonic() - began
        print(f"{count['kills']} kills in {seconds:.0f} s: {count}", flush=True)

    if count["not whole"] + count["lost"] + count["different"] > 0:
        print("FAILED")
        return 1
    print("every committed checkpoint survived and every loss is bitwise that of the run that was not stopped")
    return 0


def one_life(run_dir: Path, processes: int, rng: random.Random, count: dict[str, int]) -> bool:
    """Start, kill at a random moment, look at what is left; whether the run finished before."""
    folder = run_dir / "checkpoints"
    size = _size(run_dir)
    before = {path.name for path in checkpoints.committed(folder)}

    # Until it writes its first event, and a random time more.
    process = start(run_dir, *SHORT, *WORDS, processes=processes, DFMSPEC_RUN_DIR=str(run_dir))
    while process.poll() is None and _size(run_dir) == size:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 1.5))
    if process.poll() is not None:
        out, err = process.communicate()
        assert process.returncode == 0, (out[-1500:], err[-1500:])
        return True
    kill_tree(process)
    count["kills"] += 1

    # What is left.
    count["in a save"] += bool(list(folder.glob("*.tmp-*")))
    left = checkpoints.committed(folder)
    count["not whole"] += sum(checkpoints.problem(path) is not None for path in left)
    newest = max((checkpoints.iteration_of(path) for path in left), default=0)
    count["lost"] += any(int(name[5:]) > newest for name in before)
    return False


def _size(run_dir: Path) -> int:
    events = run_dir / "events.jsonl"
    if not events.exists():
        return 0
    return events.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
