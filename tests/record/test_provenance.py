"""The state of a repository, and what is not committed in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dfmspec import __version__
from dfmspec.record import provenance
from dfmspec.record.provenance import git_state, own_code, patch_of


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=ada", "-c", "user.email=ada@example.org", "-c", "protocol.file.allow=always")
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "s.yaml").write_text("name: one\n")
    git(folder, "add", "s.yaml")
    git(folder, "commit", "-qm", "first")
    return folder


def test_a_clean_repository(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://example.org/x.git")

    assert git_state(repository) == {
        "commit": git(repository, "rev-parse", "HEAD"),
        "branch": "main",
        "remote": "https://example.org/x.git",
        "dirty": False,
        "changed": [],
        "untracked": [],
        "submodules": {},
    }


def test_what_differs_and_what_git_does_not_know(repository: Path) -> None:
    (repository / "s.yaml").write_text("name: two\n")
    (repository / "new.py").write_text("")
    (repository / "runs/x").mkdir(parents=True)
    (repository / "runs/x/log").write_text("")
    state = git_state(repository, but=repository / "runs") or {}

    assert (state["dirty"], state["changed"], state["untracked"]) == (True, ["s.yaml"], ["new.py"])


def test_the_runs_alone_make_nothing_dirty(repository: Path) -> None:
    (repository / "runs").mkdir()
    (repository / "runs/log").write_text("")

    assert (git_state(repository, but=repository / "runs") or {})["dirty"] is False
    assert (git_state(repository) or {})["dirty"] is True


def test_submodules_and_a_detached_head(repository: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    git(inner, "commit", "-q", "--allow-empty", "-m", "inner")
    git(repository, "submodule", "--quiet", "add", str(inner), "3rdparty/inner")
    git(repository, "commit", "-qm", "second")
    git(repository, "checkout", "-q", "--detach")
    state = git_state(repository) or {}

    assert state["branch"] is None
    assert state["submodules"] == {"3rdparty/inner": git(inner, "rev-parse", "HEAD")}


def test_a_patch_brings_back_what_was_not_committed(repository: Path, tmp_path: Path) -> None:
    (repository / "s.yaml").write_text("name: \udcff two\n", errors="surrogateescape")
    (repository / "b").write_bytes(bytes(range(256)))
    git(repository, "add", "b")
    (repository / "inner").mkdir()
    patch = patch_of(repository / "inner") or ""
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(repository), str(other))
    file = tmp_path / "p"
    file.write_text(patch, errors="surrogateescape")
    git(other, "apply", str(file))

    assert (other / "s.yaml").read_bytes() == (repository / "s.yaml").read_bytes()
    assert (other / "b").read_bytes() == bytes(range(256))


def test_outside_a_repository_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) is None
    assert patch_of(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(__file__).parent) is None


def test_what_takes_too_long_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_said", lambda folder, *words: "abc\n" if words[0] == "rev-parse" else None)
    state = git_state(Path()) or {}

    assert state["commit"] == "abc"
    assert [state[key] for key in ("dirty", "changed", "untracked", "submodules")] == [None] * 4


def test_our_own_code_is_that_of_its_checkout_and_not_of_what_is_around_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = repository / ".venv/dfmspec/record"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))

    assert own_code() == {"version": __version__}
