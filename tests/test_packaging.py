"""What pip installs: a wheel and an sdist that build, pass twine, and work in a clean environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.long


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, which is built of the sdist, as it would be from an index."""
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "dfmspec"
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


def test_twine_takes_both(built: Path) -> None:
    files = sorted(built.iterdir())

    assert [file.name.split("-")[-1] for file in files] == ["any.whl", "0.1.0.tar.gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built)


def test_a_clean_environment_validates_plans_and_looks_up(built: Path) -> None:
    clean = built.parent / "clean"
    venv.create(clean, with_pip=True)
    (wheel,) = built.glob("*.whl")
    run(clean / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=built)
    program = clean / "bin" / "dfmspec"
    spec = built.parent / "s.yaml"
    spec.write_text("cluster: {nproc_per_node: 8}\ndata: {source: mock}\n")

    # All that a light installation is for, with the files that come with it.
    assert "no findings" in run(program, "validate", spec, cwd=built).stderr
    assert "torchrun --nproc-per-node 8" in run(program, "plan", spec, cwd=built).stdout
    assert "## Fires on" in run(program, "rule", "PAR101", cwd=built).stdout
    assert '"examples"' in run(program, "rule", "PAR101", "--format", "json", cwd=built).stdout
    run(program, "schema", "findings", cwd=built)
    run(program, "init", "new.yaml", "--cpu", cwd=built.parent)
    refused = subprocess.run([program, "run", spec], cwd=built, capture_output=True, text=True, check=False)
    assert refused.returncode == 4
    assert "Traceback" not in refused.stderr
