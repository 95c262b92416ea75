"""Specs that were made to cost time or memory, at random: towers, diamonds, wide and deep ones, several in one file."""

from __future__ import annotations

import random
from collections.abc import Callable

Files = dict[str, str]
"""Name -> text; spec.yaml is the spec."""


def number(rng: random.Random, most: int) -> int:
    """From 1 to `most`, small and large ones alike."""
    return max(1, int(most ** rng.random()))


def merge_tower(rng: random.Random, name: str) -> str:
    """Mappings each of which merges those before, once or several times."""
    lines = [f"{name}0: &{name}0 {{x: 1, y: 2}}"]
    for level in range(1, number(rng, 40)):
        bases = ", ".join(f"*{name}{rng.choice([level - 1, rng.randrange(level)])}" for _ in range(number(rng, 6)))
        lines.append(f"{name}{level}: &{name}{level} {{<<: [{bases}], k{level}: 1}}")
    return "\n".join(lines)


def merge_chain(rng: random.Random, name: str) -> str:
    """Mappings each of which merges the one before, for long."""
    lines = [f"{name}0: &{name}0 {{x: 1}}"]
    lines += [f"{name}{n}: &{name}{n} {{<<: *{name}{n - 1}}}" for n in range(1, number(rng, 3000))]
    return "\n".join(lines)


def alias_tower(rng: random.Random, name: str) -> str:
    """Lists or mappings that hold the one before, several times."""
    lines = [f"{name}0: &{name}0 {'x' * number(rng, 5000)}"]
    for level in range(1, number(rng, 40)):
        inner = [f"*{name}{level - 1}" for _ in range(number(rng, 8))]
        is_list = rng.random() < 0.7
        held = ", ".join(inner) if is_list else ", ".join(f"k{n}: {alias}" for n, alias in enumerate(inner))
        lines.append(f"{name}{level}: &{name}{level} " + (f"[{held}]" if is_list else f"{{{held}}}"))
    return "\n".join(lines)


def wide(rng: random.Random, name: str) -> str:
    """Many entries of one kind."""
    count = number(rng, 5000)
    numbers = range(count)
    kinds: list[Callable[[], str]] = [
        lambda: f"{name}: [{'1, ' * count}]",
        lambda: f"{name}:\n" + "\n".join(f"  key_{n}: on" for n in numbers),
        lambda: f"{name}: {{" + ", ".join(f"num_layer{n}: {n}" for n in numbers) + "}",
        lambda: "\n".join(f"{name}_{n}: {{}}" for n in numbers),
        lambda: f"{name}:\n" + "  same: 1\n" * count,
        lambda: "# dfmspec: ignore[SPC103] x\n" * count + f"{name}: on",
    ]
    return rng.choice(kinds)()


def in_its_section(rng: random.Random, name: str) -> str:
    """Many entries where the schema has words for each; such a section stands once in a file."""
    numbers = range(number(rng, 5000))
    kinds: list[Callable[[], str]] = [
        lambda: "model:\n" + "\n".join(f"  num_layer{n}: {n}" for n in numbers),
        lambda: "launcher: {env: {" + ", ".join(f"'{n}': {n}" for n in numbers) + "}}",
        lambda: "launcher: {env: {" + ", ".join(f"'+{n}': x, '{n}': 1" for n in numbers) + "}}",
        lambda: "launcher: {setup: [" + ", ".join(f"{n}" for n in numbers) + "]}",
        lambda: "train: {rampup_batch_size: [" + "'1', " * len(numbers) + "]}",
        lambda: "model: {recompute_modules: [" + "core_attm, " * len(numbers) + "]}",
        lambda: "extends: [" + ", ".join(f"gone{n}.yaml" for n in numbers) + "]",
    ]
    return rng.choice(kinds)()


def deep(rng: random.Random, name: str) -> str:
    """Nesting, closed or not."""
    levels = number(rng, 5000)
    opening, closing = rng.choice([("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")])
    start = f"{name}: " if closing else f"{name}:\n"
    return start + opening * levels + "1" + rng.choice([closing, ""]) * levels


PARTS = (merge_tower, merge_chain, alias_tower, wide, deep)


def document(rng: random.Random) -> str:
    """One file: one kind, or several together."""
    parts = rng.choices(PARTS, k=rng.choice([1, 1, 2, 3]))
    texts = [part(rng, f"{'abcd'[place]}") for place, part in enumerate(parts)]
    if rng.random() < 0.5:
        texts.append(in_its_section(rng, ""))
    return "\n".join(texts) + "\n"


def several_files(rng: random.Random) -> Files:
    """Files that build on one another: diamonds, chains and circles, with something in the last."""
    count = number(rng, 150)
    files: Files = {}
    for place in range(count):
        nearest = [place + 1] * number(rng, 4)
        others = [
            rng.randrange(count) if rng.random() < 0.2 else min(count, place + 2) for _ in range(rng.randrange(2))
        ]
        names = ", ".join(f"{other}.yaml" for other in nearest + others)
        files[f"{place}.yaml"] = f"extends: [{names}]\n" + rng.choice(["", f"config_file: {place + 1}.yaml\n"])
    files[f"{count}.yaml"] = document(rng)
    files["spec.yaml"] = files.pop("0.yaml")
    return files


def hostile(rng: random.Random) -> Files:
    """A spec, with what it builds on."""
    if rng.random() < 0.3:
        return several_files(rng)
    return {"spec.yaml": document(rng)}
