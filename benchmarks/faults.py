"""Faults injected into runs of `dfmspec run`, each continued by the same command; then the record is compared.

    python benchmarks/faults.py [--kills N] [--corruptions N] [--seed S] [--seconds BOX]

A small network trains on the CPU and saves after every iteration. Kills: SIGKILL to the tree, a rank, torchrun or the
supervisor, or a signal that asks to stop, at a random moment from the start on; two starts at once; as root, a disk
that is full or read-only for a while. Corruptions, of a run that was killed: a flipped bit in any file that a run has,
files cut short, lost and swapped folders, a changed configuration.

Counted, and all of them must be 0: committed iterations that were lost, losses that are not those of the run that
nothing disturbed, fresh starts without a word, processes left behind, verdicts that are not true, exceptions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dfmspec.record import checkpoints  # noqa: E402
from dfmspec.record.events import read_events  # noqa: E402
from dfmspec.record.run_dir import RunDir  # noqa: E402
from tests.conftest import environment  # noqa: E402

ITERATIONS = 30
SPEC = f"""\
recipe: dit_tiny
cluster: {{device: cpu, nproc_per_node: 1}}
model: {{num_layers: 1, hidden_size: 32, adaln_lora_rank: 8, num_attention_heads: 1}}
train: {{train_iters: {ITERATIONS}, global_batch_size: 2, eval_iters: 0}}
checkpoint: {{save_interval: 1, most_recent_k: 4}}
dataset: {{task_encoder_seq_length: 64, packing_buffer_size: 8}}
data: {{source: mock}}
run: {{num_samples: 0}}
logger: {{log_interval: 1}}
"""
LONGEST_START = 8.0
"""Seconds from the first process to the first iterations, more or less: kills fall before, in and after them."""
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class Tally:
    """What came of the faults so far."""

    faults: Counter[str] = field(default_factory=Counter)
    """Each kind, how often."""
    bad: Counter[str] = field(default_factory=Counter)
    """What must not be, how often."""
    refused: int = 0
    """Runs that were not continued, with a message that says why."""

    def found(self, what: str, where: Path, said: str) -> None:
        """Something that must not be."""
        self.bad[what] += 1
        print(f"** {what}: {where}\n{said[-1500:]}", flush=True)

    def __str__(self) -> str:
        kinds = dict(sorted(self.faults.items()))
        return f"{self.faults.total()} faults {kinds}, {self.refused} refused aloud, bad: {dict(self.bad) or 'none'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--corruptions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more after so many seconds")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    base = Path(tempfile.mkdtemp(prefix="faults-"))
    deadline = time.monotonic() + given.seconds
    print(f"seed {given.seed}, in {base}", flush=True)

    # The run that nothing disturbs, and one that was killed, as corruptions find it.
    expected = losses(only_run(undisturbed(base / "whole")))
    killed = interrupted(base / "killed", rng)
    tally = Tally()
    left = Counter({"kill": given.kills, "corruption": given.corruptions})
    number = 0
    while left.total() > 0 and time.monotonic() < deadline:
        number += 1
        kind = rng.choice(sorted(left.elements()))
        left[kind] -= 1
        place = base / f"{number:04d}"
        if kind == "kill":
            one_kill(place, rng, expected, tally)
        else:
            one_corruption(killed, place, rng, expected, tally)
        if number % 10 == 0:
            print(tally, flush=True)
    print(tally)
    if tally.bad:
        return 1
    shutil.rmtree(base)
    return 0


# Runs.


def start(place: Path) -> subprocess.Popen[str]:
    """The command, in a folder that has the spec."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "d.yaml").write_text(SPEC)
    return subprocess.Popen(
        [sys.executable, "-m", "dfmspec", "run", "d.yaml"],
        cwd=place,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def undisturbed(place: Path) -> Path:
    """A run from its beginning to its end."""
    process = start(place)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return place


def interrupted(place: Path, rng: random.Random) -> Path:
    """A run whose tree was killed between its first iterations and its last."""
    process = start(place)
    while not [run for run in runs(place) if len(losses(run)) > ITERATIONS // 2]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for member in family(process):
        member.kill()
    process.communicate()
    return place


def runs(place: Path) -> list[RunDir]:
    """The run directories of a folder."""
    return [RunDir(path) for path in sorted(place.glob("runs/d/2*")) if path.is_dir()]


def only_run(place: Path) -> RunDir:
    (run,) = runs(place)
    return run


def losses(run: RunDir) -> dict[int, set[float]]:
    """Every loss that was ever measured of an iteration."""
    found: dict[int, set[float]] = {}
    for event in read_events(run.events):
        if event["type"] == "iteration":
            found.setdefault(event["iteration"], set()).add(event["loss"])
    return found


def count_starts(run: RunDir) -> int:
    """How often a run was started."""
    return sum(event["type"] == "started" for event in read_events(run.events))


def of_the_last_attempt(run: RunDir) -> dict[int, float]:
    """The loss of each iteration since the run was last started: what was written before may have been damaged."""
    found: dict[int, float] = {}
    for event in read_events(run.events):
        if event["type"] == "started":
            found = {}
        elif event["type"] == "iteration":
            found[event["iteration"]] = event["loss"]
    return found


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """A process and all that it has started, it first."""
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.Error:
        return []


def left_behind(place: Path, seconds: float = 40) -> list[psutil.Process]:
    """Processes of runs in a folder that are still there after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                of_a_run = process.environ().get("DFMSPEC_RUN_DIR", "")
                if of_a_run.startswith(f"{place}/") and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def newest_whole(run: RunDir) -> int:
    """The newest iteration whose checkpoint can be used; 0: there is none."""
    whole = [path for path in checkpoints.committed(run.checkpoints) if checkpoints.problem(path) is None]
    return max(map(checkpoints.iteration_of, whole), default=0)


# Kills.


def one_kill(place: Path, rng: random.Random, expected: dict[int, set[float]], tally: Tally) -> None:
    """Kill, and continue by the same command until the run has finished."""
    mounted = on_a_small_disk(place)
    try:
        kill_and_continue(place, rng, expected, tally)
    finally:
        if mounted:
            subprocess.run(["umount", place], check=False)


def kill_and_continue(place: Path, rng: random.Random, expected: dict[int, set[float]], tally: Tally) -> None:
    """Start, kill, continue and judge."""
    process = start(place)
    processes = [process]
    kind = rng.choice(KILLS)
    tally.faults[kind] += 1
    if kind == "two starts":
        processes.append(start(place))
    elif kind in DISKS:
        time.sleep(rng.uniform(0, LONGEST_START))
        with DISKS[kind](place):
            process.wait()
    else:
        time.sleep(rng.uniform(0, LONGEST_START))
        strike(kind, process, rng)
    for each in processes:
        _, said = each.communicate()
        if each.returncode == 70 or "Traceback" in said:
            tally.found("exception", place, said)
    for survivor in left_behind(place):
        tally.found("process left", place, str(survivor))
        survivor.kill()
    before = max((newest_whole(run) for run in runs(place)), default=0)
    judge(place, before, expected, tally, may_refuse=False)


def on_a_small_disk(place: Path) -> bool:
    """Let a folder be a disk of its own, where this process may; whether it is."""
    place.mkdir()
    if os.geteuid() != 0:
        return False
    return subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", place], check=False).returncode == 0


@contextmanager
def full(place: Path) -> Iterator[None]:
    """No room for as long as the block lasts."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    yield
    filler.unlink()


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Checkpoints can be read and not written for as long as the block lasts."""
    folders = [run.checkpoints for run in runs(place) if run.checkpoints.is_dir()]
    for folder in folders:
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    yield
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True)


DISK = "size=16m"
DISKS = {"disk full": full, "disk read-only": read_only}
KILLS = ["tree", "rank", "torchrun", "supervisor", "signal", "tree's signal", "two starts"]
if os.geteuid() == 0:
    KILLS += DISKS


def strike(kind: str, process: subprocess.Popen[str], rng: random.Random) -> None:
    """End processes of a run, or ask them to."""
    members = family(process)
    victims = {
        "tree": members,
        "rank": [member for member in members if is_rank(member)],
        "torchrun": members[1:2],
        "supervisor": members[:1],
        "signal": members[:1],
        "tree's signal": members,
    }[kind]
    number = signal.SIGKILL
    if "signal" in kind:
        number = rng.choice(STOPPING)
    rng.shuffle(victims)
    for victim in victims:
        try:
            victim.send_signal(number)
        except psutil.Error:
            continue


def is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ()
    except psutil.Error:
        return False


def judge(
    place: Path,
    before: int,
    expected: dict[int, set[float]],
    tally: Tally,
    *,
    may_refuse: bool,
) -> None:
    """Give the same command again, and compare what came of it.

    before: the newest iteration that was whole.
    may_refuse: something is missing, so that a message will do.
    """
    known = runs(place)
    started_before = sum(map(count_starts, known))
    process = start(place)
    _, said = process.communicate()
    if process.returncode == 70 or "Traceback" in said:
        tally.found("exception", place, said)
        return
    if process.returncode != 0:
        if not may_refuse or str(place) not in said:
            tally.found("not continued", place, said)
        tally.refused += 1
        return

    # Nothing was lost, and nothing begun anew.
    if known and len(runs(place)) > len(known):
        tally.found("begun anew", place, said)
        return
    run = only_run(place)
    starts = [event["iteration"] for event in read_events(run.events) if event["type"] == "started"]
    is_told = "passed over" in said or "is gone" in said
    if len(starts) > started_before and starts[-1] < before and not is_told:
        tally.found("lost in silence", place, said)

    # The numbers are those of the run that nothing disturbed, and the verdict is what is on the disk.
    if any({loss} != expected[iteration] for iteration, loss in of_the_last_attempt(run).items()):
        tally.found("other numbers", place, said)
    manifest: dict[str, Any] = json.loads(run.manifest.read_text())
    if manifest["verdict"] != "succeeded" or newest_whole(run) != ITERATIONS:
        tally.found("verdict not true", place, said)
    if not tally.bad:
        for left in place.iterdir():
            shutil.rmtree(left, ignore_errors=True)


# Corruptions.


def one_corruption(
    killed: Path, place: Path, rng: random.Random, expected: dict[int, set[float]], tally: Tally
) -> None:
    """Damage a copy of the run that was killed, and continue it by the same command."""
    shutil.copytree(killed, place, symlinks=True)
    run = only_run(place)
    move_paths(run, killed, place)
    kind, damage = rng.choice(CORRUPTIONS)
    tally.faults[kind] += 1
    damage(run, rng)
    judge(place, newest_whole(run), expected, tally, may_refuse=True)


def move_paths(run: RunDir, old: Path, new: Path) -> None:
    """The copy is to be the run itself, in another place."""
    for file in (run.events, run.manifest, run.path / "config.yaml"):
        file.write_text(file.read_text().replace(str(old), str(new)))


def flip_a_bit(run: RunDir, rng: random.Random) -> None:
    """In a file by its kind first: shards would take most of the bits."""
    files: dict[str, list[Path]] = {}
    for file in sorted(run.path.rglob("*")):
        if file.is_file() and not file.is_symlink() and file.stat().st_size:
            files.setdefault(file.suffix or file.name, []).append(file)
    file = rng.choice(files[rng.choice(sorted(files))])
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut_a_file(run: RunDir, rng: random.Random) -> None:
    files = [file for file in sorted(run.path.rglob("*")) if file.is_file() and not file.is_symlink()]
    file = rng.choice(files)
    os.truncate(file, rng.randrange(file.stat().st_size + 1))


def lose_a_file(run: RunDir, rng: random.Random) -> None:
    rng.choice([file for file in sorted(run.path.rglob("*")) if file.is_file()]).unlink()


def lose_a_folder(run: RunDir, rng: random.Random) -> None:
    folders = [folder for folder in sorted(run.path.rglob("*")) if folder.is_dir()]
    shutil.rmtree(rng.choice(folders))


def swap_folders(run: RunDir, rng: random.Random) -> None:
    first, second = rng.sample(checkpoints.committed(run.checkpoints), 2)
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def rename_checkpoints(run: RunDir, rng: random.Random) -> None:
    for path in checkpoints.committed(run.checkpoints)[: rng.randrange(1, 5)]:
        path.rename(path.with_name(f"old_{path.name}"))


def stray_names(run: RunDir, rng: random.Random) -> None:
    for name in ("²", "20261130", "9" * 20, "-1", "01"):
        (run.attempts / name).mkdir()


def change_the_config(run: RunDir, rng: random.Random) -> None:
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("\n  lr: ", "\n  lr: 3"))


CORRUPTIONS: list[tuple[str, Callable[[RunDir, random.Random], None]]] = [
    ("flipped bit", flip_a_bit),
    ("flipped bit", flip_a_bit),
    ("file cut", cut_a_file),
    ("file lost", lose_a_file),
    ("folder lost", lose_a_folder),
    ("folders swapped", swap_folders),
    ("checkpoints renamed", rename_checkpoints),
    ("stray names", stray_names),
    ("configuration changed", change_the_config),
]


if __name__ == "__main__":
    sys.exit(main())
