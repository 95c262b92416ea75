"""Names that stand for several, as Energon reads them."""

from __future__ import annotations

import random

import pytest
from braceexpand import braceexpand

from dfmspec.data.braces import expanded

PIECES = ["a", "b.tar", "part0/", "{1..3}", "{07..10}", "{4..1}", "{9..1..3}", "{a..c}", "{x,y}", "{x,{1..2}}", "{,z}"]
PIECES += ["{one}", "\\{", "\\,", "{-2..2}", "{08..011}", "{0..0}", "{a,b{c,d}}", "{c..a..2}"]


def test_patterns_stand_for_the_names_that_energon_reads() -> None:
    chance = random.Random(3)
    for _ in range(200):
        pattern = "".join(chance.choices(PIECES, k=chance.randint(1, 4)))
        assert expanded([pattern]) == list(braceexpand(pattern)), pattern


@pytest.mark.parametrize("pattern", ["a{b", "a}b", "{1..2}}"])
def test_a_pattern_whose_braces_do_not_match_stands_for_itself(pattern: str) -> None:
    assert expanded([pattern]) == [pattern]
