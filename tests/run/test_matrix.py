"""`dfmspec run` of a matrix: all cells, one after the other, each a run of its own; and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import TINY, dfmspec


def test_a_matrix_is_validated_planned_and_run_cell_by_cell(dataset: Path, tmp_path: Path) -> None:
    words = [*TINY, f"dataset.path={dataset}", "dataset.num_workers=0", "cluster.nproc_per_node=1"]
    spec = tmp_path / "s.yaml"

    # Every cell is checked, under the overrides of all.
    spec.write_text("matrix:\n  train.train_iters: [1, 0]\n  optimizer.lr: [1.0e-4, 2.0e-4]\n")
    bad = dfmspec("validate", "s.yaml", *words, cwd=tmp_path)
    assert bad.returncode == 1
    assert bad.stdout.count("error:") == 1  # two cells have it, at one place
    assert "s.yaml:2:26" in bad.stdout

    # Planned: a line or a folder each; one alone by its name or number.
    spec.write_text("matrix:\n  train.train_iters: [1, 2]\n")
    listed = dfmspec("plan", "s.yaml", *words, cwd=tmp_path)
    assert "2 cells" in listed.stdout
    assert "train_iters-2" in listed.stdout
    assert dfmspec("plan", "s.yaml", "-o", "plans", *words, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == ["train_iters-1", "train_iters-2"]
    shown = dfmspec("plan", "s.yaml", "--cell", "2", "--why", "train.train_iters", *words, cwd=tmp_path)
    assert shown.stdout.startswith("train.train_iters = 2  matrix: s.yaml:2:26")
    several = dfmspec("plan", "s.yaml", "--why", "train.train_iters", *words, cwd=tmp_path)
    assert (several.returncode, several.stderr.count("train_iters-")) == (2, 2)
    assert dfmspec("run", "s.yaml", "--cell", "3", *words, cwd=tmp_path).returncode == 2

    # Run: each a run of its own, and again nothing is left to do.
    first = dfmspec("run", "s.yaml", *words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folders = first.stdout.split()
    manifests = [json.loads((Path(folder) / "manifest.json").read_text()) for folder in folders]
    assert [manifest["name"] for manifest in manifests] == ["s-train_iters-1", "s-train_iters-2"]
    assert {manifest["group"] for manifest in manifests} == {"s"}
    assert [manifest["overrides"][0] for manifest in manifests] == ["train.train_iters=1", "train.train_iters=2"]
    assert {manifest["verdict"] for manifest in manifests} == {"succeeded"}
    again = dfmspec("run", "s.yaml", *words, cwd=tmp_path)
    assert (again.returncode, again.stdout.split()) == (0, folders)
    table = dfmspec("runs", cwd=tmp_path).stdout.splitlines()
    assert table[1].split() == ["s:", "2", "succeeded"]
    assert all(line.startswith("  s-train_iters-") for line in table[2:])


def test_the_rest_of_a_matrix_waits_for_a_cell_that_fails_unless_it_is_to_keep_going(
    dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text("matrix:\n  optimizer.lr: [1.0e+38, 1.0e-4]\n")
    words = [*TINY, f"dataset.path={dataset}", "dataset.num_workers=0", "cluster.nproc_per_node=1"]
    words += ["train.train_iters=3", "scheduler.lr_warmup_iters=0"]

    stopped = dfmspec("run", "s.yaml", *words, cwd=tmp_path)
    assert stopped.returncode == 1
    assert "1 cell was not started" in stopped.stderr
    assert len(stopped.stdout.split()) == 1

    went_on = dfmspec("run", "s.yaml", "--keep-going", *words, cwd=tmp_path)
    assert went_on.returncode == 1
    assert len(went_on.stdout.split()) == 2
    assert "Cell 2 of 2" in went_on.stderr
