"""YAML text becomes data with places; what is ambiguous or double is said."""

from __future__ import annotations

import json
import random

import pytest

from dfmspec.read.document import parse_document


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


def test_aliases_of_aliases_end() -> None:
    bomb = b"a0: &a0 [x, x]\n" + b"".join(
        b"a%d: &a%d [*a%d, *a%d, *a%d, *a%d]\n" % (i, i, *[i - 1] * 4) for i in range(1, 20)
    )

    assert any("through aliases" in problem.message for problem in parse_document(bomb, "spec.yaml").problems)


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
