"""How dense the code is: syntax a line, and the forms that the house rules (CONTRIBUTING.md) keep rare.

`python tools/density.py [--check] [FOLDER...]`; --check fails when a limit is not kept. Rates are per 1,000 lines; a
line is one that is neither blank nor of brackets alone.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXEMPT = ("trainer/ops/kernels", "trainer/edm.py", "trainer/noise.py")
"""Dense because Triton is, or because the paper is: counted apart, without limits."""

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BRACKETS = set("()[]{},: ")


@dataclass(frozen=True)
class Limit:
    """A rate, and what it may be."""

    name: str
    most: float | None = None
    least: float | None = None

    def holds(self, rate: float) -> bool:
        """Whether a rate is within the limit."""
        if self.most is not None:
            return rate <= self.most
        return self.least is None or rate >= self.least


LIMITS = (
    Limit("lines"),
    Limit(">120", most=0),
    Limit("nodes a line", most=7.5),
    Limit("x if c else y", most=16),
    Limit("nested comprehensions", most=0.5),
    Limit("walrus", most=1.5),
    Limit("a, b = x, y", most=2),
    Limit("own-line comments", least=15),
    Limit("longest function", most=60),
)


@dataclass
class Count:
    """What was counted in some files."""

    lines: int = 0
    too_long: int = 0
    nodes: int = 0
    conditionals: int = 0
    nested: int = 0
    walruses: int = 0
    tuples: int = 0
    comments: int = 0
    longest: int = 0

    def add(self, text: str) -> None:
        """Count a file."""
        # Lines.
        own = [line for line in text.splitlines() if not set(line) <= _BRACKETS]
        self.lines += len(own)
        self.too_long += sum(len(line) > 120 for line in own)
        self.comments += _own_line_comments(text)

        # Syntax.
        tree = ast.parse(text)
        self.nested += _nested_comprehensions(tree)
        for node in ast.walk(tree):
            self.nodes += 1
            self.conditionals += isinstance(node, ast.IfExp)
            self.walruses += isinstance(node, ast.NamedExpr)
            self.tuples += _packs_a_tuple(node)
            if isinstance(node, _FUNCTIONS):
                last = node.end_lineno or 0
                self.longest = max(self.longest, last - node.lineno + 1)

    def rates(self) -> tuple[float, ...]:
        """One number for each of LIMITS."""
        thousands = max(self.lines, 1) / 1000
        counted = (self.conditionals, self.nested, self.walruses, self.tuples, self.comments)
        a_line = self.nodes / max(self.lines, 1)
        return (self.lines, self.too_long, a_line, *(number / thousands for number in counted), self.longest)


def _own_line_comments(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and token.line.lstrip().startswith("#") for token in tokens)


def _packs_a_tuple(node: ast.AST) -> bool:
    """Whether several values are given to several names in one statement."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def _nested_comprehensions(tree: ast.AST) -> int:
    """Comprehensions with several `for`, and those inside another one."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, _COMPREHENSIONS):
            inner = (child for child in ast.walk(node) if child is not node)
            holds_another = any(isinstance(child, _COMPREHENSIONS) for child in inner)
            found += len(node.generators) > 1 or holds_another
    return found


def is_exempt(path: Path) -> bool:
    """Whether a file is counted apart."""
    return any(part in path.as_posix() for part in EXEMPT)


def python_files(folder: Path) -> Iterator[Path]:
    """The Python files of a folder that the limits hold for."""
    for path in sorted(folder.rglob("*.py")):
        if not is_exempt(path):
            yield path


def counted(paths: Sequence[Path]) -> Count:
    """The sum over some files."""
    count = Count()
    for path in paths:
        count.add(path.read_text())
    return count


def main() -> int:
    """Print a row for each folder, and one for all of the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a limit is not kept")
    parser.add_argument("folders", nargs="*", type=Path)
    args = parser.parse_args()
    package = ROOT / "dfmspec"

    # One row a folder, then the whole, then what is exempt.
    folders = args.folders or sorted(path for path in package.iterdir() if path.is_dir() and path.name[0] != "_")
    rows = [(folder.name, counted(list(python_files(folder)))) for folder in folders]
    whole = counted(list(python_files(package)))
    if not args.folders:
        exempt = [path for path in sorted(package.rglob("*.py")) if is_exempt(path)]
        rows += [("dfmspec", whole), ("(exempt)", counted(exempt))]
    show(rows)

    # What is not kept.
    broken = [limit for limit, rate in zip(LIMITS, whole.rates(), strict=True) if not limit.holds(rate)]
    for limit in broken:
        wanted = f"at least {limit.least}" if limit.most is None else f"at most {limit.most}"
        print(f"density: {limit.name} must be {wanted}")
    return 1 if args.check and broken else 0


def show(rows: Sequence[tuple[str, Count]]) -> None:
    """Print a table: a line for each count, a column for each limit."""
    headings = [f"{limit.name:>13.13}" for limit in LIMITS]
    print(" ".join([" " * 10, *headings]))
    for name, count in rows:
        cells = [f"{rate:13.4g}" for rate in count.rates()]
        print(" ".join([f"{name:10}", *cells]))


if __name__ == "__main__":
    sys.exit(main())
