"""Hydra, by which NVIDIA DFM's script reads a command line: `key=value`, `+key=value`, `++key=value`, `~key`.

A model, without Hydra: its grammar of overrides and of their values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dfmspec.targets.dfm import Refused
from dfmspec.targets.dfm.omegaconf import Tree, merge

_KEY = re.compile(r"(\+\+|\+|~)?([A-Za-z_][\w-]*(?:\.[\w-]+)*)(?:=(.*))?$", re.DOTALL)


def override(tree: Tree, text: str) -> None:
    """Change a tree as an override of the command line says.

    Raises:
        Refused: it is no override; or the key is there that it adds, or is missing that it changes.
    """
    match = _KEY.fullmatch(text)
    if match is None or (match[3] is None and match[1] != "~"):
        raise Refused(f"{text!r} is no override")
    prefix = match[1] or ""
    *sections, name = match[2].split(".")

    # A plain override and ~ need the key, + needs that there is none, ++ takes both.
    node = _section(tree, sections, makes=prefix in ("+", "++"))
    is_there = node is not None and name in node
    is_allowed = prefix == "++" or is_there != (prefix == "+")
    if node is None or not is_allowed:
        words = "there is" if is_there else "there is no"
        raise Refused(f"{text!r}: {words} such key")

    if prefix == "~":
        del node[name]
        return
    value = value_of(match[3])
    is_section = isinstance(node.get(name), dict)
    if is_section and isinstance(value, dict):
        merge(node[name], value)
    elif is_section and isinstance(value, list):
        raise Refused(f"{text!r}: a list cannot replace a section")
    else:
        node[name] = value


def _section(tree: Tree, names: Sequence[str], *, makes: bool) -> Tree | None:
    """The mapping under some names, each made where it is missing if `makes`; None: there is none."""
    node: Any = tree
    for name in names:
        if not isinstance(node, dict):
            return None
        if makes and name not in node:
            node[name] = {}
        node = node.get(name)
    return node if isinstance(node, dict) else None


def value_of(text: str) -> Any:
    """The value of an override, as Hydra reads it.

    Raises:
        Refused: its grammar has no such value.
    """
    return _Value(text).parsed()


_QUOTES = ("'", '"')
_ENDS_A_WORD = "=,{}[]()#~'\""
"""Characters that no bare word may hold, unless a backslash stands before them."""


class _Value:
    """A parser of Hydra's values: quoted text, lists, mappings, and words. `at`: the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def parsed(self) -> Any:
        value = self._element(end="")
        if self.at < len(self.text):
            raise Refused(f"{self.text!r}: {self.text[self.at]!r} is not expected")
        return value

    def _here(self) -> str:
        """The next character; empty at the end."""
        return self.text[self.at : self.at + 1]

    def _advance(self) -> None:
        """Go over a character, and over the blanks after it."""
        self.at += 1
        self._skip_blanks()

    def _skip_blanks(self) -> None:
        while self._here() in (" ", "\t"):
            self.at += 1

    def _element(self, end: str) -> Any:
        """A value of any kind; `end`: the characters that end it where it is a word."""
        self._skip_blanks()
        first = self._here()
        if first == "[":
            return self._list()
        if first == "{":
            return self._mapping()
        if first in _QUOTES:
            return self._quoted(first)
        return self._word(end)

    def _list(self) -> list[Any]:
        items: list[Any] = []
        self._advance()
        while self._here() != "]":
            items.append(self._element(end=",]"))
            self._separator("]")
        self._advance()
        return items

    def _mapping(self) -> dict[Any, Any]:
        items: dict[Any, Any] = {}
        self._advance()
        while self._here() != "}":
            key = self._element(end=":")
            if self._here() != ":":
                raise Refused(f"{self.text!r}: a mapping needs key: value")
            self.at += 1
            items[key] = self._element(end=",}")
            self._separator("}")
        self._advance()
        return items

    def _separator(self, close: str) -> None:
        """Go over a comma, or stop before the closing bracket."""
        self._skip_blanks()
        if self._here() == ",":
            self._advance()
        elif self._here() != close:
            raise Refused(f"{self.text!r} is not closed")

    def _quoted(self, quote: str) -> str:
        # A backslash takes the next character with it.
        end = self.at + 1
        while end < len(self.text) and self.text[end] != quote:
            end += 2 if self.text[end] == "\\" else 1
        if end >= len(self.text):
            raise Refused(f"{self.text!r}: a quote is not closed")

        value = self.text[self.at + 1 : end].replace(f"\\{quote}", quote)
        self.at = end
        self._advance()
        return value

    def _word(self, end: str) -> Any:
        stop = self.at
        while stop < len(self.text) and self.text[stop] not in end:
            if self.text.startswith("${", stop):
                stop = self._after_interpolation(stop)
            elif self.text[stop] in _ENDS_A_WORD:
                break
            elif self.text[stop] == "\\":
                stop += 2
            else:
                stop += 1
        word = self.text[self.at : stop].strip()
        self.at = stop
        without_backslashes = re.sub(r"\\(.)", r"\1", word)
        return _typed(without_backslashes)

    def _after_interpolation(self, start: int) -> int:
        """Where the text goes on after an interpolation, whose own characters are no grammar."""
        close = self.text.find("}", start)
        if close < 0:
            raise Refused(f"{self.text!r}: an interpolation is not closed")
        return close + 1


_CONSTANTS = {"null": None, "true": True, "false": False}


def _typed(word: str) -> Any:
    """A bare word as null, a boolean, a whole number, a float, or else itself."""
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    if re.fullmatch(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", word):
        return int(word)
    if re.fullmatch(
        r"[-+]?((\d+(_\d+)*\.\d*|\.\d+)([eE][-+]?\d+)?|\d+(_\d+)*[eE][-+]?\d+|inf|nan)",
        word,
        re.IGNORECASE,
    ):
        return float(word)
    return word
