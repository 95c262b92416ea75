"""No code outside `targets/` asks for a target by name: what differs is an attribute or a function of its module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dfmspec.targets import TARGETS
from tests.conftest import ROOT

PACKAGE = ROOT / "dfmspec"
CODE = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "targets")
_WORDS_OF_OTHERS = {
    ("trainer/network/weights.py", "dfm"),
    ("trainer/commands/export.py", "dfm"),
    ("cli/export.py", "dfm"),
    ("spec/experiment.py", "megatron_core"),
}
"""Where a target's name is another thing's too: tensors under DFM's names; the default that is a field of the spec."""


def asked(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every text that is a target's name, but in docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in TARGETS and id(node) not in docstrings:
            yield node.lineno, str(node.value)


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_target_is_asked_for_by_name(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    found = [(line, word) for line, word in asked(ast.parse(path.read_text())) if (name, word) not in _WORDS_OF_OTHERS]

    assert found == []


def test_a_comparison_a_membership_and_a_match_would_be_found() -> None:
    code = 'x == "dfm"\nx in ("dfm_wan",)\nmatch x:\n    case "dfm_flux":\n        pass\nis_target("megatron_core")\n'

    assert {word for _, word in asked(ast.parse(code))} == {"dfm", "dfm_wan", "dfm_flux", "megatron_core"}
