"""Paths of this machine, and addresses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dfmspec.entry import run_paths
from dfmspec.spec.paths import absolute, is_relative, scheme


@pytest.mark.parametrize("address", ["msc://profile/butterflies", "s3://b/x", "file:///a", "hf://datasets/a/../b"])
def test_an_address_stays_as_it_is(address: str) -> None:
    assert absolute(address) == address
    assert run_paths(address, "run") == address
    assert not is_relative(address)


@pytest.mark.parametrize("place", ["data/x", "./a", "a:b", "folder/s3://x", "~/data"])
def test_a_path_is_made_absolute(place: str) -> None:
    assert scheme(place) is None
    assert absolute(place) == os.path.abspath(Path(place).expanduser())
