"""YAML text becomes data with places; what is ambiguous or double is said."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dfmspec.bounded import SPEC_BYTES
from dfmspec.read.document import MAX_VALUES, Budget, parse_document, read_document


def codes(text: str | bytes) -> list[str]:
    raw = text.encode() if isinstance(text, str) else text
    return [problem.code for problem in parse_document(raw, "spec.yaml").problems]


def test_every_key_and_value_has_its_place() -> None:
    document = parse_document(b"model:\n  num_layers: 28\n", "spec.yaml")

    assert document.data == {"model": {"num_layers": 28}}
    assert str(document.keys["model", "num_layers"]) == "spec.yaml:2:3"
    assert str(document.values["model", "num_layers"]) == "spec.yaml:2:15"
    assert str(document.span(("model", "absent"))) == "spec.yaml:1:1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("on", "on"),
        ("010", 10),
        ("1:30", "1:30"),
        ("0x1F", 31),
        ("null", None),
        ("true", True),
        ("'1'", "1"),
        (".5", 0.5),
        ("1_000", "1_000"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = parse_document(f"a: {text}".encode(), "spec.yaml").data["a"]

    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["on", "yes", "n", "010", "1:30", "1_000", "12:30:45"])
def test_a_scalar_that_yaml_1_1_reads_otherwise_is_flagged(text: str) -> None:
    assert codes(f"a: {text}") == ["SPC103"]


@pytest.mark.parametrize("text", ["1e-4", "0.5", "true", "dit_xl", "'on'", "/a/path", "null", "12"])
def test_ordinary_scalars_are_silent(text: str) -> None:
    assert codes(f"a: {text}") == []


def test_a_duplicate_key_names_the_first() -> None:
    document = parse_document(b"train:\n  lr: 1\n  lr: 2\n", "spec.yaml")

    (problem,) = document.problems
    assert problem.code == "SPC102"
    assert "first is at line 2" in problem.message
    assert problem.span.line == 3


@pytest.mark.parametrize(
    "raw",
    [
        b"a: [1, 2",
        b"a: b: c",
        b"\x89PNG\r\n\x1a\n\x00",
        b"a: \xff",
        b"- 1\n- 2\n",
        b"just text",
        b"a:\n\t- b",
        b"<<<<<<< HEAD\na: 1\n",
        b"a: !!python/object:os.system {}",
        b"a: &x [*x]",
        b"{" * 500,
        b"? [a]\n: 1",
    ],
)
def test_a_broken_file_is_a_finding_and_never_an_exception(raw: bytes) -> None:
    document = parse_document(raw, "spec.yaml")

    assert document.problems
    assert all(problem.message and problem.hint for problem in document.problems)


@pytest.mark.parametrize("raw", [b"", b"# nothing\n", b"---\n"])
def test_a_file_without_content_is_a_spec_of_defaults(raw: bytes) -> None:
    document = parse_document(raw, "spec.yaml")

    assert document.data == {}
    assert not document.problems


def test_a_merge_key_gives_what_is_not_set_and_each_value_keeps_its_place() -> None:
    document = parse_document(b"base: &b {x: 1, y: 2}\nuser:\n  <<: *b\n  y: 3\n", "spec.yaml")

    assert document.data["user"] == {"x": 1, "y": 3}
    assert not document.problems
    assert document.keys["user", "y"].line == 4
    assert document.keys["user", "x"].line == 1


def tower(levels: int, level: Callable[[int], str]) -> bytes:
    """Lines of which each names the one before."""
    return "\n".join(["m0: &m0 {x: 1}", *map(level, range(1, levels))]).encode()


def test_what_json_writes_is_read_as_it_was_meant() -> None:
    """JSON has two escapes for a character beyond 16 bits."""
    draw = random.Random(35)

    def word() -> str:
        return "".join(chr(draw.choice((draw.randint(0x20, 0x7E), draw.randint(0x10000, 0x1FFFF)))) for _ in range(9))

    for _ in range(200):
        data = {word(): {word(): word()}, "list": [word(), word()]}
        document = parse_document(json.dumps(data, indent=draw.choice((None, 2))).encode(), "spec.json")

        assert document.data == data
        assert document.problems == ()


def test_what_follows_an_escaped_pair_keeps_its_place() -> None:
    text = json.dumps({"name": "a \U0001f98b", "model": {"num_layers": 28}})
    document = parse_document(text.encode(), "spec.json")

    assert document.values["model", "num_layers"].column == text.index("28") + 1


@pytest.mark.parametrize("text", [r'a: "\ud83e"', r'a: "\udd8b\ud83e"', r'{"b": "\ud83e\udd8b", "a": "\ud83e"}'])
def test_half_a_pair_is_told_with_what_to_write_instead(text: str) -> None:
    (problem,) = parse_document(text.encode(), "spec.yaml").problems

    assert problem.code == "SPC101"
    assert r"\U0001F98B" in problem.hint


@pytest.mark.parametrize(
    "raw",
    [
        tower(25, lambda n: f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}"),
        tower(25, lambda n: f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}], k{n}: 1}}"),
        tower(25, lambda n: f"m{n}: &m{n} [*m{n - 1}, *m{n - 1}, *m{n - 1}]"),
        tower(25, lambda n: f"m{n}: &m{n} {{a: *m{n - 1}, b: *m{n - 1}}}"),
        f"a: &a {'x' * 500_000}\nb: [{'*a, ' * 1000}]".encode(),
        f"a: [{'1, ' * MAX_VALUES}]".encode(),
    ],
    ids=["merges", "merges with keys", "lists", "mappings", "a long text", "a long list"],
)
def test_what_grows_is_visited_so_often_and_no_more_and_one_finding_says_where(raw: bytes) -> None:
    budget = Budget()
    document = parse_document(raw, "spec.yaml", budget)

    (problem,) = document.problems
    assert document.data is None
    assert f"more than {MAX_VALUES} values" in problem.message
    assert problem.span.line >= 1
    assert problem.hint
    assert budget.values <= MAX_VALUES + 500_000 // 64 + 1


def test_a_merge_key_counts_as_what_it_stands_for() -> None:
    plain = Budget()
    merged = Budget()
    parse_document(b"a: {x: 1, y: 2}\nb: {x: 1, y: 2}\n", "spec.yaml", plain)
    parse_document(b"a: &a {x: 1, y: 2}\nb: {<<: *a}\n", "spec.yaml", merged)

    assert merged.values >= plain.values


@pytest.mark.parametrize("link", ["{{<<: *m{0}}}", "[*m{0}]", "{{a: *m{0}}}"])
def test_a_long_chain_of_names_is_a_finding(link: str) -> None:
    document = parse_document(tower(5000, lambda n: f"m{n}: &m{n} {link.format(n - 1)}"), "spec.yaml")

    assert document.data is None
    assert "nest" in document.problems[-1].message


@pytest.mark.parametrize("sign", ["[", "{a: ", "- ", "? "], ids=["brackets", "braces", "dashes", "keys"])
@pytest.mark.parametrize("levels", [50, 2000, 200_000])
def test_deep_nesting_is_a_finding(sign: str, levels: int) -> None:
    assert codes(sign * levels) == ["SPC101"]


def test_a_file_of_more_bytes_than_a_spec_has_is_a_finding_that_says_how_many(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("#" * (SPEC_BYTES + 1))
    (problem,) = read_document(file).problems
    file.write_text("#" * SPEC_BYTES)

    assert str(SPEC_BYTES) in problem.message
    assert problem.span.file == str(file)
    assert read_document(file).problems == ()


def test_of_several_merges_the_first_that_has_a_key_gives_it_and_what_is_set_stays() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lines = ["m0: &m0 {a: 0, b: 0}"]
        expected: list[dict[str, int]] = [{"a": 0, "b": 0}]
        for level in range(1, 6):
            bases = [rng.randrange(level) for _ in range(rng.randrange(1, 4))]
            own = dict.fromkeys(rng.sample("abcdef", rng.randrange(3)), level)
            merged = ", ".join(f"*m{base}" for base in bases)
            entries = "".join(f", {key}: {level}" for key in own)
            lines.append(f"m{level}: &m{level} {{<<: [{merged}]{entries}}}")

            # The last to be laid wins.
            values: dict[str, int] = {}
            for base in reversed(bases):
                values |= expected[base]
            expected.append(values | own)
        text = "\n".join(lines)
        read = parse_document(text.encode(), "spec.yaml").data
        assert read == {f"m{level}": values for level, values in enumerate(expected)}, text
