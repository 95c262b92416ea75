"""How a checkpoint's folder is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmspec.spec.iterations import folder_of, iteration_folders, iteration_in, iterations, split_iteration


@pytest.mark.parametrize("iteration", [1, 500, 9_999_999, 12_345_678])
def test_a_name_is_read_as_it_is_written(iteration: int) -> None:
    assert iteration_in(folder_of(iteration)) == iteration


@pytest.mark.parametrize(
    "name",
    ["iter_0000500.tmp-1a2b3c4d", "iter_0000500.damaged-1a2b3c4d", "iter_", "iter_5x", "iter_-5", "iter_٥", "step_5"],
)
def test_any_other_name_is_no_checkpoint(name: str) -> None:
    assert iteration_in(name) is None


def test_numbers_sort_as_numbers(tmp_path: Path) -> None:
    for name in ("iter_9999999", "iter_10000000", "iter_0000500", "iter_20000000.tmp-1a2b3c4d"):
        (tmp_path / name).mkdir()

    assert [path.name for path in iteration_folders(tmp_path)] == ["iter_10000000", "iter_9999999", "iter_0000500"]
    assert iterations(tmp_path) == [500, 9_999_999, 10_000_000]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ckpts/iter_5000/", ("ckpts", 5000)),
        ("iter_7", (".", 7)),
        ("ckpts", ("ckpts", None)),
        ("a/iter_5.tmp-1", ("a/iter_5.tmp-1", None)),
    ],
)
def test_a_path_is_split_at_its_iteration(path: str, expected: tuple[str, int | None]) -> None:
    assert split_iteration(path) == expected
