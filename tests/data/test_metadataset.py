"""What a metadataset names is followed once, in the order of its file, and no further than a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmspec.data import metadataset
from dfmspec.data.metadataset import MOST, Gap, Leaf, everything, leaves, names_itself, read

HEAD = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n"


def blend(file: Path, *names: str) -> Path:
    """A metadataset whose training split blends some datasets."""
    entries = "".join(f"      - {{weight: 1, path: {name}}}\n" for name in names)
    file.write_text(f"{HEAD}  train:\n    blend:\n{entries}")
    return file


@pytest.fixture
def diamond(tmp_path: Path) -> Path:
    """Thirty metadatasets each of which names the next twice; the last names a folder."""
    for number in range(30):
        blend(tmp_path / f"{number}.yaml", f"{number + 1}.yaml", f"{number + 1}.yaml")
    blend(tmp_path / "30.yaml", "shards")
    return tmp_path / "0.yaml"


@pytest.mark.parametrize("energon", [6, 7])
def test_a_diamond_is_followed_once(diamond: Path, energon: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(metadataset, "read", lambda file, **options: reads.append(file) or read(file, **options))
    found = leaves(diamond, "train", energon=energon)

    assert found == [Leaf(diamond.parent / "shards", "train")]
    assert len(reads) == 31


def test_everything_of_a_diamond_is_there_once(diamond: Path) -> None:
    assert len(everything(diamond, energon=7)) == 32
    assert not names_itself(diamond, energon=7)


def test_a_long_chain_is_followed_to_its_end(tmp_path: Path) -> None:
    for number in range(1500):
        blend(tmp_path / f"{number}.yaml", f"{number + 1}.yaml")

    assert leaves(tmp_path / "0.yaml", "train", energon=7) == [Leaf(tmp_path / "1500.yaml", "train")]


def test_datasets_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    blend(tmp_path / "inner.yaml", "b", "c")
    file = blend(tmp_path / "outer.yaml", "a", "inner.yaml", "d", "b")

    assert [leaf.folder.name for leaf in leaves(file, "train", energon=7)] == ["a", "b", "c", "d"]
    assert leaves(file, "val", energon=7) == [Gap(file, "val", ("train",))]


def test_a_metadataset_that_names_itself_is_said_to_and_ends(tmp_path: Path) -> None:
    blend(tmp_path / "inner.yaml", "outer.yaml", "shards")
    file = blend(tmp_path / "outer.yaml", "inner.yaml")

    assert names_itself(file, energon=7)
    assert leaves(file, "train", energon=7) == [Leaf(tmp_path / "shards", "train")]


def test_of_more_datasets_than_are_looked_at_the_first_are(tmp_path: Path) -> None:
    file = tmp_path / "many.yaml"
    file.write_text("splits: {train: {datasets: [" + "".join(f"{{path: '{n}'}}, " for n in range(MOST + 5)) + "]}}")

    assert len(everything(file, energon=7)) == MOST


@pytest.mark.parametrize("energon", [6, 7])
@pytest.mark.parametrize(
    "text",
    [
        "#" * 2**19,
        "splits: {a0: &a0 [1, 1], " + ", ".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30)) + "}",
        "splits: " + "- " * 3000,
        "splits: [" + "1, " * 2000,
        "a: 1\n---\nb: 2",
        "? [a]\n: 1",
    ],
    ids=["long", "tower", "deep", "open", "two", "list as key"],
)
def test_a_metadataset_that_is_none_or_too_large_has_a_fault_and_no_references(
    tmp_path: Path, text: str, energon: int
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    splits, faults = read(file, energon=energon)

    assert not any(splits.values())
    assert faults


def test_energon_7_takes_an_alias_and_a_date_for_texts(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("splits: {train: {datasets: [{path: &p 2024-01-01}, {path: *p}]}}")
    splits, _ = read(file, energon=7)

    assert [reference.path.name for reference in splits["train"]] == ["2024-01-01", "*p"]
