"""plan --diff and --check: what a change changes, and when a checked-in plan is stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import dfmspec

SPEC = "name: run\ncluster: {nproc_per_node: 8}\ndata: {source: mock}\ntrain: {global_batch_size: 64, train_iters: 1000}\n"


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    return file


def test_differences_are_grouped_by_what_they_change(spec: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SPEC + "optimizer: {lr: 2.0e-4}\nlogger: {log_interval: 5}\nmodel: {tensor_model_parallel_size: 2}\n")
    lines = dfmspec("plan", other, "--diff", spec).stdout.splitlines()
    groups = {line.rstrip(":"): i for i, line in enumerate(lines) if not line.startswith(" ")}
    numbers, places, talk = groups.values()

    assert next(iter(groups)) == "changes the numbers" and len(groups) == 3
    assert numbers < lines.index("  optimizer.lr: 9e-05 -> 0.0002") < places < lines.index("  model.tensor_model_parallel_size: 1 -> 2") < talk
    assert lines.index("  logger.log_interval: 10 -> 5") > talk
    assert dfmspec("plan", spec, "--diff", spec).stdout == "no difference\n"


def test_variables_and_the_launcher_are_told_one_by_one(spec: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SPEC + "launcher: {kind: slurm, time_limit: '04:00:00', env: {NCCL_DEBUG: INFO}}\n")
    lines = dfmspec("plan", other, "--diff", spec).stdout.splitlines()

    assert lines[0] == "does not change the numbers:"
    assert '  env.NCCL_DEBUG: "(absent)" -> "INFO"' in lines and '  launcher.kind: "local" -> "slurm"' in lines and len(lines) == 4


def test_a_golden_plan_is_checked_and_a_stale_one_is_shown(spec: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    assert dfmspec("plan", spec, "-o", golden).returncode == 0
    assert dfmspec("plan", spec, "--check", golden).returncode == 0
    assert dfmspec("plan", golden.parent / "spec.yaml", "--diff", golden).stdout == "no difference\n"
    spec.write_text(SPEC.replace("1000", "2000"))
    stale = dfmspec("plan", spec, "--check", golden)

    assert stale.returncode == 3 and "train.train_iters: 1000 -> 2000" in stale.stdout and "is stale: config.yaml, node0.sh, plan.json" in stale.stderr
    assert dfmspec("plan", spec, "--check", tmp_path / "nowhere").returncode == 2
