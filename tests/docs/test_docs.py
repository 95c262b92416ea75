"""The documentation is found, and says what is so: links, folders, specs, shown output, the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dfmspec.check.rules import check_spec
from dfmspec.diagnostics import Severity
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from tests.conftest import ROOT, dfmspec

DOCS = ROOT / "docs"
HOWTOS = sorted((DOCS / "howto").glob("*.md"))
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))
MEASUREMENTS = sorted(path for path in (DOCS / "measurements").glob("*.md") if path.name != "README.md")
TOP = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted(DOCS.rglob("*.md"))]
HISTORY = ("CONTRIBUTING.md", "CHANGELOG.md")
WRITTEN = [page for page in PAGES if page.parent.name not in ("rules", "keys") and page.name not in HISTORY]
"""By hand, and read by people who may not know what this project stands on."""

HOMES = {
    "https://github.com/NVIDIA-NeMo/DFM": re.compile(r"\bDFM\b"),
    "https://github.com/NVIDIA/Megatron-LM": re.compile(r"\bmegatron-core\b", re.IGNORECASE),
    "https://github.com/NVIDIA/Megatron-Energon": re.compile(r"\b(?:megatron-)?energon\b", re.IGNORECASE),
}
_LINK = re.compile(r"\[(?:[^\]\[]|!\[[^\]]*\])*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    """A page as tests are named after it."""
    return str(page.relative_to(ROOT))


def fenced(page: Path, language: str) -> list[str]:
    """The text of a page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks and words of code."""
    without_blocks = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", without_blocks)


def slugs(page: Path) -> set[str]:
    """What a link may name after #, for each heading."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for found in _LINK.finditer(prose(page)):
        link = found[1] or found[2]
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if link.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in slugs(target)):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_a_page_that_names_what_dfmspec_stands_on_links_to_it(page: Path) -> None:
    words, text = prose(page), page.read_text()
    missing = [home for home, word in HOMES.items() if word.search(words) and f"({home})" not in text]

    assert missing == []


def folders(package: Path) -> list[str]:
    """The folders of a package, each after its parent, from the package on."""
    found = [path.parent for path in package.rglob("__init__.py") if path.parent != package]
    return sorted(str(path.relative_to(package)) for path in found)


def drawn_folders() -> list[str]:
    """The folders in ARCHITECTURE.md's tree of dfmspec/."""
    tree = next(text for text in fenced(ROOT / "ARCHITECTURE.md", "") if text.startswith("dfmspec/\n"))
    above: list[str] = []
    drawn: list[str] = []
    for line in tree.splitlines()[1:]:
        indent, folder = re.fullmatch(r"( +)(\w+)/ .*", line).groups()  # type: ignore[union-attr]
        above = [*above[: len(indent) // 4 - 1], folder]
        drawn.append("/".join(above))
    return sorted(drawn)


def test_the_tree_of_the_architecture_names_exactly_the_folders_there_are() -> None:
    assert drawn_folders() == folders(ROOT / "dfmspec")


def test_the_architecture_has_the_order_of_imports_that_is_checked() -> None:
    contracts = (ROOT / "pyproject.toml").read_text()
    layers = re.findall(r'^  "([^"]*)",$', contracts.partition("layers = [")[2].partition("]")[0], re.MULTILINE)

    assert "\n".join(layers) + "\n" in fenced(ROOT / "ARCHITECTURE.md", "")


def test_the_architecture_fits_on_two_screens() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 105


@pytest.mark.parametrize("page", DECISIONS, ids=name)
def test_a_decision_has_context_decision_and_price_and_is_listed(page: Path) -> None:
    heading = page.read_text().splitlines()[0]
    number, title = re.fullmatch(r"# (\d+)\. (.*)", heading).groups()  # type: ignore[union-attr]
    parts = re.findall(r"^\*\*(\w+)\.\*\*", page.read_text(), re.MULTILINE)

    assert page.name.startswith(f"{int(number):04d}-")
    assert parts == ["Context", "Decision", "Price"]
    assert f"{number}. [{title}](docs/decisions/{page.name})" in (ROOT / "ARCHITECTURE.md").read_text()


@pytest.mark.parametrize("page", MEASUREMENTS, ids=name)
def test_a_page_of_measurements_says_on_what_and_how_it_was_measured(page: Path) -> None:
    head = re.findall(r"^\| (\w+) \| .+ \|$", page.read_text().split("\n\n")[1], re.MULTILINE)

    assert head == ["hardware", "versions", "command", "date"]


@pytest.mark.parametrize("page", HOWTOS, ids=name)
def test_every_whole_spec_of_a_how_to_is_valid(page: Path) -> None:
    for text in fenced(page, "yaml"):
        if text.startswith("spec_version"):
            resolved = resolve_spec(load_spec("spec.yaml", text=text))
            found = check_spec(resolved, levels=("spec",))
            assert [finding.code for finding in found if finding.severity > Severity.HINT] == []


def test_the_workflow_that_the_how_to_shows_is_the_example() -> None:
    assert (ROOT / "examples" / "ci" / "github.yml").read_text() in fenced(DOCS / "howto" / "ci.md", "yaml")


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "index.md"], ids=name)
def test_the_broken_spec_has_the_findings_that_are_shown(page: Path, tmp_path: Path) -> None:
    spec = next(text for text in fenced(page, "yaml") if "target: dfm" in text)
    shown = next(text for text in fenced(page, "text") if text.startswith("$ dfmspec validate"))
    command, *lines = shown.splitlines()
    (tmp_path / "spec.yaml").write_text(spec)
    said = dfmspec(*command.split()[2:], cwd=tmp_path).stdout
    findings = [finding for finding in said.split("\n\n") if ": hint: " not in finding]

    assert "\n".join(lines) == "\n\n".join(findings[:-1])
    assert findings[-1].startswith("2 errors, 1 warning")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_no_page_of_the_site_asks_for_anything_outside(site: Path) -> None:
    asking = re.compile(
        r"<(?:script|img|iframe|source|video|audio|object|embed)\b[^>]*\b(?:src|data)=[\"']?(?:https?:)?//"
        r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?(?:https?:)?//"
        r"|url\([\"']?(?:https?:)?//|@import [\"']?(?:https?:)?//"
    )
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    outside = [str(path.relative_to(site)) for path in files if asking.search(path.read_text())]

    assert len(files) > 280
    assert outside == []


def test_the_site_has_a_page_of_each_document(site: Path) -> None:
    documents = [page.relative_to(DOCS).with_suffix(".html") for page in PAGES if DOCS in page.parents]
    wanted = [site / (page.with_name("index.html") if page.stem == "README" else page) for page in documents]

    assert [str(page) for page in wanted if not page.is_file()] == []


def test_the_sites_settings_ask_for_nothing_of_others() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    assert settings["strict"] is True
    assert settings["theme"]["font"] is False
    assert settings["plugins"] == ["search"]
    assert settings["extra_css"] == ["stylesheets/site.css"]
    assert not {"extra_javascript", "repo_url"} & settings.keys()
