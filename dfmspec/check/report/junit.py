"""JUnit XML: a test suite a file, a failed test an error or warning.

A file without findings is one test that passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as Xml

from dfmspec.diagnostics import Diagnostic, Severity, not_suppressed


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """Hints pass, with their text as output."""
    by_file: dict[str, list[Diagnostic]] = {file: [] for file in texts}
    for finding in not_suppressed(findings):
        by_file.setdefault(finding.span.file, []).append(finding)

    root = Xml.Element("testsuites", name="dfmspec")
    for file, found in by_file.items():
        _add_suite(root, file, found)
    Xml.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(root, encoding="unicode")


def _add_suite(root: Xml.Element, file: str, found: Sequence[Diagnostic]) -> None:
    """A test suite with a test for each finding of a file."""
    failures = sum(finding.severity > Severity.HINT for finding in found)
    tests = max(1, len(found))
    name = _text(file)
    suite = Xml.SubElement(
        root,
        "testsuite",
        name=name,
        tests=str(tests),
        failures=str(failures),
        errors="0",
    )
    if not found:
        Xml.SubElement(suite, "testcase", name="valid", classname=name)
    for finding in found:
        _add_test(suite, name, finding)


def _add_test(suite: Xml.Element, classname: str, finding: Diagnostic) -> None:
    # A finding without a place is about the whole file.
    line = {"line": str(finding.span.line)} if finding.span.line else {}
    name = f"{finding.code} {finding.name}"
    case = Xml.SubElement(suite, "testcase", {"name": name, "classname": classname, **line})
    if finding.severity > Severity.HINT:
        attributes = {"type": finding.severity.label, "message": _text(finding.message)}
        inner = Xml.SubElement(case, "failure", attributes)
    else:
        inner = Xml.SubElement(case, "system-out")
    inner.text = _text(f"{finding.span}: {finding.message}\n{finding.hint}")


def _text(text: str) -> str:
    """A text without the characters that XML does not have."""
    return "".join(character if _is_xml(character) else "\N{REPLACEMENT CHARACTER}" for character in text)


def _is_xml(character: str) -> bool:
    return character >= " " or character in "\t\n"
