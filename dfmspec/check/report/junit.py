"""JUnit XML: a test suite a file, a failed test an error or warning; a file without findings is one test that passed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as Xml

from dfmspec.diagnostics import Diagnostic, Severity, shown


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """Hints pass, with their text as output."""
    by_file: dict[str, list[Diagnostic]] = defaultdict(list)
    for file in texts:
        by_file[file] = []
    for finding in shown(findings):
        by_file[finding.span.file].append(finding)
    root = Xml.Element("testsuites", name="dfmspec")
    for file, found in by_file.items():
        failures = sum(finding.severity > Severity.HINT for finding in found)
        suite = Xml.SubElement(root, "testsuite", name=_text(file), tests=str(max(1, len(found))), failures=str(failures), errors="0")
        if not found:
            Xml.SubElement(suite, "testcase", name="valid", classname=_text(file))
        for finding in found:
            case = Xml.SubElement(suite, "testcase", name=f"{finding.code} {finding.name}", classname=_text(file), line=str(finding.span.line))
            kind = "failure" if finding.severity > Severity.HINT else "system-out"
            inner = Xml.SubElement(case, kind, {"type": finding.severity.label, "message": _text(finding.message)} if kind == "failure" else {})
            inner.text = _text(f"{finding.span}: {finding.message}\n{finding.hint}")
    Xml.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(root, encoding="unicode")


def _text(text: str) -> str:
    """Without the characters that XML does not have."""
    return "".join(character if character >= " " or character in "\t\n" else "\N{REPLACEMENT CHARACTER}" for character in text)
