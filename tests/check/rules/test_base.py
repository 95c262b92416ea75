"""What stops a rule: a value that is unknown, or null."""

from __future__ import annotations

import pytest

from dfmspec.check.rules.base import ITERS, SAMPLES, UnknownValue, View, must_divide, requires
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec


@pytest.fixture
def view() -> View:
    """A run without a length."""
    return View(resolve_spec(load_spec(None, ["target=dfm", "train.train_iters=null"])))


def test_a_null_stops_the_rule_that_asks_for_a_value(view: View) -> None:
    with pytest.raises(UnknownValue):
        view[SAMPLES]


def test_a_rule_that_asks_for_null_too_is_given_it(view: View) -> None:
    assert view.or_null(SAMPLES) is None


def test_a_broken_value_stops_a_rule_however_it_asks() -> None:
    view = View(resolve_spec(load_spec(None, ["target=dfm", "train.train_samples=many"])))

    with pytest.raises(UnknownValue):
        view.or_null(SAMPLES)


@pytest.mark.parametrize("keys", [(ITERS, "train.global_batch_size"), ("train.global_batch_size", ITERS)])
def test_nothing_is_divided_by_a_null_or_divides_one(view: View, keys: tuple[str, str]) -> None:
    with pytest.raises(UnknownValue):
        list(must_divide(*keys, words="")(view))


def test_a_switch_that_needs_a_value_is_told_of_a_null(view: View) -> None:
    findings = list(requires("checkpoint.save_interval", (SAMPLES, 8), because="it is so")(view))

    assert [finding.message for finding in findings] == [
        "checkpoint.save_interval needs train.train_samples 8, but it is null: it is so"
    ]
