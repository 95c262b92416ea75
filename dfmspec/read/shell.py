"""The little of a shell that launch scripts need: variables and arrays that a script sets itself, filled in.

Nothing is run. What only a shell could know - a command's output, a variable of its environment, one that is set under
a condition - stays as it is written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

Value = str | list[str] | None
"""Of a variable: its text; an array's words; None where only a shell could say."""

_ASSIGNMENT = re.compile(
    r"\s*(?:(?:export|readonly|local|declare(?:\s+-\w+)*)\s+)?"
    r"(?P<name>[A-Za-z_]\w*)(?P<add>\+?)=(?P<value>.*)",
    re.DOTALL,
)
_PIECE = re.compile(
    r"'[^']*'|\\.|(?P<quote>\")"
    r"|\$(?:(?P<plain>[A-Za-z_]\w*)|\{(?P<name>[A-Za-z_]\w*)(?P<array>\[[@*]\])?"
    r"(?:(?P<unless>:?-)(?P<default>[^}]*))?\})",
    re.DOTALL,
)
"""What matters in a line: a text in single quotes, a character that is escaped, a double quote, a variable."""
_OPENS = ("if", "for", "while", "until", "case", "select")
_CLOSES = ("fi", "done", "esac")


def commands_of(text: str) -> list[str]:
    """The commands of a script, a line each, with the variables filled in that the script has set before."""
    known: dict[str, Value] = {}
    found = []
    depth = 0
    for line in _statements(text.replace("\\\n", " ")):
        words = re.split(r"[\s;]+", line)
        depth += sum((word in _OPENS) - (word in _CLOSES) for word in words)
        assigned = _assigned(line, known)
        if assigned is None:
            found.append(_filled_in(line, known))
            continue

        # What is set under a condition may be another when the script runs.
        name, value = assigned
        known[name] = None if depth else value
        if line.lstrip().startswith("export "):
            found.append(_filled_in(line, known))
    return found


def _statements(text: str) -> Iterator[str]:
    """The lines of a script; an array, or a text in quotes, that takes several is one."""
    begun = ""
    for line in text.splitlines():
        begun = f"{begun}\n{line}" if begun else line
        if not _is_open(begun):
            yield begun
            begun = ""
    if begun:
        yield from begun.splitlines()


def _is_open(statement: str) -> bool:
    """Whether a statement goes on in the next line."""
    if statement.lstrip().startswith("#"):
        return False
    match = _ASSIGNMENT.fullmatch(statement)
    if match and match["value"].startswith("("):
        plain = re.sub(r"(?m)'[^']*'|\"[^\"]*\"|(?:^|\s)#.*$", "", match["value"])
        return plain.count("(") > plain.count(")")
    return _words(statement) is None


def _words(text: str) -> list[str] | None:
    """The words of a text, without comments; None where a quote is not closed."""
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return None


def _assigned(statement: str, known: dict[str, Value]) -> tuple[str, Value] | None:
    """The variable that a statement sets, and to what; None: it is another statement."""
    match = _ASSIGNMENT.fullmatch(statement)
    if match is None:
        return None
    name = match["name"]
    written = match["value"]
    is_array = written.startswith("(")
    filled_in = _filled_in(written[1 : written.rfind(")")] if is_array else written, known, splits=is_array)
    words = _words(filled_in)

    # Behind one word there is a command, for which alone the variable is set.
    if not is_array and words is not None and len(words) > 1:
        return None
    if words is None or re.search(r"\$|`", filled_in):
        return name, None
    value = words if is_array else "".join(words)
    if match["add"]:
        before = known.get(name, [] if is_array else "")
        if isinstance(before, str) and isinstance(value, str):
            return name, before + value
        if isinstance(before, list) and isinstance(value, list):
            return name, [*before, *value]
        return name, None
    return name, value


def _filled_in(text: str, known: dict[str, Value], *, splits: bool = True) -> str:
    """A text with the variables that are known; those in single quotes are no variables.

    Args:
        text: a line of a script, or a part of one.
        known: the variables.
        splits: whether a value without quotes around it may be several words; in `NAME=$OTHER` it is one.
    """
    in_quotes = False
    pieces = []
    end = 0
    for match in _PIECE.finditer(text):
        pieces += [text[end : match.start()], _piece(match, known, in_quotes=in_quotes, splits=splits)]
        end = match.end()
        in_quotes ^= match["quote"] is not None
    return "".join(pieces) + text[end:]


def _value(match: re.Match[str], known: dict[str, Value]) -> Value:
    """The value of a variable of a line; its default, where it has none, or an empty one and the sign for that."""
    name = match["plain"] or match["name"]
    default: str | None = match["default"]
    if name not in known:
        return default
    value = known[name]
    is_empty = value in ("", [])
    return default if is_empty and match["unless"] == ":-" else value


def _piece(match: re.Match[str], known: dict[str, Value], *, in_quotes: bool, splits: bool) -> str:
    """What stands for one piece of a line."""
    value = _value(match, known)
    if value is None:
        return match[0]
    words = [value] if isinstance(value, str) else value
    if match["array"] is None:
        words = words[:1]
    joined = " ".join(words)
    if splits and not in_quotes:
        return shlex.join(joined.split())

    # The words of an array stay apart, also in quotes; all else is one word.
    if splits and match["array"]:
        return f'"{shlex.join(words)}"'
    return re.sub(r'(["\\`$])', r"\\\1", joined) if in_quotes else shlex.quote(joined)
