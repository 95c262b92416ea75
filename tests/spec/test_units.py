"""Numbers with a unit: what a text means for a field, and what it does not."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmspec.spec.units import SLURM_TIME, UNITS, has_some_unit, in_words, pattern_of, with_unit
from dfmspec.targets import TARGETS, catalogue, minutes_of


@pytest.mark.parametrize(
    ("unit", "text", "number"),
    [
        ("count", "20k", 20_000),
        ("count", "1.5k", 1500),
        ("count", "2M", 2_000_000),
        ("count", "1G", 1_000_000_000),
        ("count", "0.5k", 500),
        ("minutes", "30m", 30),
        ("minutes", "1h30m", 90),
        ("minutes", "90s", 1.5),
        ("seconds", "3m", 180),
        ("seconds", "2d", 172_800),
        ("bytes", "512GiB", 512 * 2**30),
        ("bytes", "80GB", 80 * 10**9),
        (SLURM_TIME, "4h", "4:00:00"),
        (SLURM_TIME, "90m", "1:30:00"),
        (SLURM_TIME, "2d12h", "2-12:00:00"),
    ],
)
def test_a_text_is_a_number_in_the_unit_of_its_key(unit: str, text: str, number: float | str) -> None:
    found = with_unit(text, {"x-unit": unit} if unit != "count" else {})

    assert found == number
    assert type(found) is type(number)


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("count", "4h"),
        ("count", "30m"),
        ("count", "512GiB"),
        ("count", "20K"),
        ("count", "1k2"),
        ("count", "1k500M"),
        ("minutes", "20k"),
        ("minutes", "30M"),
        ("minutes", "30m1h"),
        ("minutes", "1h1h"),
        ("bytes", "512Gi"),
        ("count", "k"),
        ("count", "-1k"),
        ("count", "1_000k"),
        ("count", "20 k"),
    ],
)
def test_another_unit_is_no_number(unit: str, text: str) -> None:
    assert with_unit(text, {"x-unit": unit}) is None


@given(st.integers(0, 10**6), st.sampled_from(sorted({*UNITS.values(), "bytes", "count"})), st.data())
def test_whatever_an_editor_accepts_is_read(number: int, unit: str, data: st.DataObject) -> None:
    text = data.draw(st.from_regex(pattern_of(unit), fullmatch=True).filter(lambda text: len(text) < 40))
    parts = re.findall(r"[A-Za-z]+", text)
    ordered = sorted(set(parts), key="dhms".find) == parts if len(parts) > 1 else True

    assert has_some_unit(text)
    assert (with_unit(text, {"x-unit": unit}) is not None) == ordered


@given(st.integers(0, 10**5))
def test_slurm_reads_a_time_as_it_was_meant(minutes: int) -> None:
    text = with_unit(f"{minutes}m", {"x-unit": SLURM_TIME})

    assert Fraction(minutes_of(str(text)) or 0) == minutes


def test_every_key_with_a_unit_is_one_of_a_target_and_says_so_in_its_catalogue() -> None:
    for key, unit in UNITS.items():
        fields = [catalogue(target).field(key) for target in TARGETS]
        found = [field for field in fields if field is not None]

        assert found, key
        assert all(field["x-unit"] == unit and in_words(field) for field in found)
