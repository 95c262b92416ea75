"""Specs that were made to cost time or memory: seconds, on the clock and of the processor, and memory of `validate`.

    python benchmarks/hostile.py [NAME...]

Each is a few bytes to a few MB; none may need more than seconds, whatever stands in it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
VALIDATE = [str(Path(sys.executable).parent / "dfmspec"), "validate", "spec.yaml"]
LIMIT = 60
"""Seconds after which one is given up."""

WRITE = "--write"
"""Argument with which the files of one are written: NAME FOLDER."""

Files = dict[str, str]
"""Name -> text; spec.yaml is the one that is checked."""


def ordinary() -> Files:
    """For comparison."""
    return {"spec.yaml": (ROOT / "specs" / "butterfly_tiny_cpu.yaml").read_text()}


def merge_tower(levels: int = 25) -> Files:
    """Mappings that merge the one before twice."""
    lines = ["m0: &m0 {x: 1}"]
    lines += [f"m{level}: &m{level} {{<<: [*m{level - 1}, *m{level - 1}]}}" for level in range(1, levels)]
    return {"spec.yaml": "\n".join(lines)}


def alias_tower(levels: int = 25) -> Files:
    """Lists that hold the one before three times."""
    lines = ["a0: &a0 [x, x, x]"]
    lines += [f"a{level}: &a{level} [*a{level - 1}, *a{level - 1}, *a{level - 1}]" for level in range(1, levels)]
    return {"spec.yaml": "\n".join(lines)}


def text_tower() -> Files:
    """A long text, named often."""
    return {"spec.yaml": f"a: &a '{'x' * 500_000}'\nb: [{'*a, ' * 40_000}]"}


def diamond_of_files(levels: int = 25) -> Files:
    """Files that lie over the next one twice."""
    files = {f"{level}.yaml": f"extends: [{level + 1}.yaml, {level + 1}.yaml]" for level in range(levels)}
    files[f"{levels}.yaml"] = "rng: {seed: 1}"
    files["spec.yaml"] = "extends: [0.yaml, 0.yaml]"
    return files


def chain_of_files(count: int = 5000) -> Files:
    """Files that lie over the next one."""
    files = {f"{number}.yaml": f"extends: {number + 1}.yaml" for number in range(count)}
    files["spec.yaml"] = "extends: 0.yaml"
    return files


def missing_files() -> Files:
    """Names of files that are not there."""
    names = ", ".join(f"x{number}.yaml" for number in range(40_000))
    return {"spec.yaml": f"extends: [{names}]"}


def unknown_keys(count: int, *, random_names: bool = False) -> Files:
    """Keys that no target has."""
    rng = random.Random(0)
    lines = ["model:"]
    for number in range(count):
        name = f"num_layer{number}"
        if random_names:
            name = "".join(rng.choices("abcdefghijklmnop_", k=12)) + str(number)
        lines.append(f"  {name}: {number}")
    return {"spec.yaml": "\n".join(lines)}


def unknown_in_a_line(count: int = 5000) -> Files:
    """The same on one line."""
    entries = ", ".join(f"num_layer{number}: {number}" for number in range(count))
    return {"spec.yaml": f"model: {{{entries}}}"}


def unknown_sections(count: int = 30_000) -> Files:
    """Sections that no target has."""
    return {"spec.yaml": "\n".join(f"section{number}: {{}}" for number in range(count))}


def wrong_elements(count: int = 40_000) -> Files:
    """A list of the wrong type."""
    return {"spec.yaml": "train: {rampup_batch_size: [" + "'1', " * count + "]}"}


def keys_of_digits(count: int = 30_000) -> Files:
    """Names of environment variables that are numbers."""
    return {"spec.yaml": "launcher:\n  env:\n" + "\n".join(f"    '{number}': 3" for number in range(count))}


def variables(count: int = 30_000) -> Files:
    """Environment variables."""
    return {"spec.yaml": "launcher:\n  env:\n" + "\n".join(f"    A{number}: x" for number in range(count))}


def set_twice(count: int = 40_000) -> Files:
    """One key again and again."""
    return {"spec.yaml": "rng:\n" + "  seed: 1\n" * count}


def ambiguous(count: int = 20_000) -> Files:
    """Scalars of which each is suppressed by a comment of its own."""
    entries = (f"  # dfmspec: ignore[SPC103] x\n  A{number}: on" for number in range(count))
    return {"spec.yaml": "x:\n" + "\n".join(entries)}


def comments(count: int = 30_000) -> Files:
    """Comments that suppress one entry together."""
    return {"spec.yaml": "# dfmspec: ignore[SPC301] x\n" * count + "rng:\n  seed: 1\n"}


def deep(sign: str) -> Files:
    """Nesting."""
    return {"spec.yaml": sign * (900_000 // len(sign))}


def tag_directives(count: int = 60_000) -> Files:
    """Directives before the document."""
    return {"spec.yaml": "".join(f"%TAG !t{number}! x\n" for number in range(count)) + "--- {}\n"}


def long_list(count: int = 3_000_000) -> Files:
    """A list."""
    return {"spec.yaml": "a: [" + "1," * count + "]"}


HOSTILE: dict[str, Callable[[], Files]] = {
    "ordinary": ordinary,
    "merge keys, 25 levels": merge_tower,
    "lists of aliases, 25 levels": alias_tower,
    "a text of 500 kB named 40,000 times": text_tower,
    "diamond of extends, 25 levels": diamond_of_files,
    "chain of extends, 5,000 files": chain_of_files,
    "40,000 missing files": missing_files,
    "5,000 unknown keys": lambda: unknown_keys(5000),
    "5,000 unknown keys, random": lambda: unknown_keys(5000, random_names=True),
    "5,000 unknown keys in a line": unknown_in_a_line,
    "30,000 unknown keys": lambda: unknown_keys(30_000),
    "600,000 unknown keys": lambda: unknown_keys(600_000),
    "30,000 unknown sections": unknown_sections,
    "40,000 wrong elements": wrong_elements,
    "30,000 names of digits": keys_of_digits,
    "30,000 variables": variables,
    "40,000 times one key": set_twice,
    "20,000 suppressed scalars": ambiguous,
    "30,000 suppressions of one entry": comments,
    "brackets, 900,000 deep": lambda: deep("["),
    "dashes, 450,000 deep": lambda: deep("- "),
    "question marks, 450,000 deep": lambda: deep("? "),
    "60,000 directives": tag_directives,
    "a list of 3,000,000": long_list,
    "a list of 400,000": lambda: long_list(400_000),
}


class Measured(NamedTuple):
    """What one validation took."""

    size: int
    """Bytes of all files."""
    seconds: float
    processor: float
    """Seconds of the processor, which other programs change less."""
    memory: int
    """Largest resident set in bytes."""
    code: int | None
    """Exit code; None: it was given up."""


def measured(name: str) -> Measured:
    """One validation of a hostile spec."""
    with tempfile.TemporaryDirectory() as folder:
        # Another process makes the files: a child's resident set begins with that of its parent.
        subprocess.run([sys.executable, __file__, WRITE, name, folder], check=True)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = ["timeout", "-k", "1", str(LIMIT), *VALIDATE]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    code = os.waitstatus_to_exitcode(status)
    return Measured(
        size,
        seconds,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
        None if code in (124, 137) else code,
    )


def main() -> int:
    wanted = sys.argv[1:]
    if wanted[:1] == [WRITE]:
        _, name, folder = wanted
        for file, text in HOSTILE[name]().items():
            (Path(folder) / file).write_text(text)
        return 0
    for name in HOSTILE:
        if wanted and not any(word in name for word in wanted):
            continue
        found = measured(name)
        ended = f"over {LIMIT} s" if found.code is None else f"{found.seconds:6.2f} s"
        memory = found.memory / 2**20
        print(
            f"{name:36} {found.size:10,} bytes  {ended:>9}  processor {found.processor:5.2f} s  {memory:4.0f} MiB  "
            f"exit {found.code}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
