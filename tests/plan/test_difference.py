"""plan --diff and --check: what a change changes, and when a checked-in plan is stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfmspec.plan.difference import NUMBERS, PLACES, TALK, differences
from dfmspec.plan.plan import make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from tests.conftest import dfmspec

SPEC = (
    "name: run\ncluster: {nproc_per_node: 8}\ndata: {source: mock}\ntrain: {global_batch_size: 64, train_iters: 1000}\n"
)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    return file


def test_differences_are_grouped_by_what_they_change(spec: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(
        SPEC + "optimizer: {lr: 2.0e-4}\nlogger: {log_interval: 5}\nmodel: {tensor_model_parallel_size: 2}\n"
    )
    lines = dfmspec("plan", other, "--diff", spec).stdout.splitlines()
    groups = {line.rstrip(":"): i for i, line in enumerate(lines) if not line.startswith(" ")}
    numbers, places, talk = groups.values()

    assert next(iter(groups)) == "changes the numbers"
    assert len(groups) == 3
    assert (
        numbers
        < lines.index("  optimizer.lr: 9e-05 -> 0.0002")
        < places
        < lines.index("  model.tensor_model_parallel_size: 1 -> 2")
        < talk
    )
    assert lines.index("  logger.log_interval: 10 -> 5") > talk
    assert dfmspec("plan", spec, "--diff", spec).stdout == "no difference\n"


def test_variables_and_the_launcher_are_told_one_by_one(spec: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(SPEC + "launcher: {kind: slurm, time_limit: '04:00:00', env: {NCCL_DEBUG: INFO}}\n")
    lines = dfmspec("plan", other, "--diff", spec).stdout.splitlines()

    assert lines[0] == "does not change the numbers:"
    assert '  env.NCCL_DEBUG: "(absent)" -> "INFO"' in lines
    assert '  launcher.kind: "local" -> "slurm"' in lines
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("word", "target", "key", "group"),
    [
        ("run.resume=5000", "megatron_core", "run.resume", NUMBERS),
        ("run.output_dir=elsewhere", "megatron_core", "run.output_dir", TALK),
        ("dataset.num_workers=2", "megatron_core", "dataset.num_workers", TALK),
        ("dataset.num_workers=2", "dfm", "dataset.num_workers", NUMBERS),
        ("rerun_state_machine.error_injection_rate=5", "dfm", "rerun_state_machine.error_injection_rate", NUMBERS),
        ("launcher.env={NVIDIA_TF32_OVERRIDE: '0'}", "megatron_core", "env.NVIDIA_TF32_OVERRIDE", NUMBERS),
        ("launcher.env={NVTE_FLASH_ATTN: '0'}", "megatron_core", "env.NVTE_FLASH_ATTN", NUMBERS),
        ("launcher.env={NCCL_ALGO: Ring}", "megatron_core", "env.NCCL_ALGO", NUMBERS),
        ("launcher.env={CUBLAS_WORKSPACE_CONFIG: ':16:8'}", "megatron_core", "env.CUBLAS_WORKSPACE_CONFIG", PLACES),
        ("launcher.setup=[module load cuda]", "megatron_core", "launcher.setup", PLACES),
        ("dist.distributed_timeout_minutes=20", "megatron_core", "dist.distributed_timeout_minutes", TALK),
    ],
)
def test_no_key_that_changes_the_numbers_is_said_not_to(
    word: str, target: str, key: str, group: str, spec: Path
) -> None:
    one, other = (make_plan(resolve_spec(load_spec(spec, [f"target={target}", *words]))) for words in ((), (word,)))

    assert {found.key: found.group for found in differences(one, other)}[key] == group


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("plan.json", '"name": "run"', '"name": "walk"'),
        ("plan.json", '"resume": "auto"', '"resume": "never"'),
        ("plan.json", "{", "["),
        ("plan.json", "\n", "\r\n"),
        ("plan.json", '"spec_dir": null', '"spec_dir": ".."'),
        ("node0.sh", "\n", "\r\n"),
        ("config.yaml", "1000", "1001"),
        ("node0.sh", "exec", "echo"),
    ],
)
def test_an_edited_bundle_is_stale_however_it_was_edited(
    file: str, old: str, new: str, spec: Path, tmp_path: Path
) -> None:
    golden = tmp_path / "golden"
    assert dfmspec("plan", spec, "-o", golden).returncode == 0
    text = (golden / file).read_text()
    assert old in text
    (golden / file).write_bytes(text.replace(old, new).encode())

    for words in (["plan", spec, "--check", golden], ["run", golden]):
        done = dfmspec(*words, cwd=tmp_path)
        assert done.returncode == 3, (words, done.stderr)
        assert "Traceback" not in done.stderr, (words, done.stderr)


def test_a_plan_without_guards_is_not_run(spec: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    assert dfmspec("plan", spec, "-o", golden).returncode == 0
    guards = (golden / "guards.json").read_text()
    for left in (
        None,
        guards.replace('"code"', '"coda"'),
        guards.replace('"plan_id": "sha256:', '"plan_id": "sha256:0'),
    ):
        (golden / "guards.json").unlink()
        if left is not None:
            (golden / "guards.json").write_text(left)
        done = dfmspec("run", golden, cwd=tmp_path)

        assert done.returncode == 3
        assert "no guard" in done.stderr
        (golden / "guards.json").write_text(guards)


def test_plan_json_is_the_same_on_a_machine_that_has_the_data(spec: Path, tmp_path: Path, dataset: Path) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    words = [spec, "dataset.path=/data/of/nobody"]
    assert dfmspec("plan", *words, "-o", elsewhere).returncode == 0
    assert dfmspec("plan", spec, f"dataset.path={dataset}", "-o", there).returncode == 0
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (there, elsewhere)]
    guards = [json.loads((folder / "guards.json").read_text()) for folder in (there, elsewhere)]

    assert all("guards" not in plan and plan["format_version"] == 2 for plan in plans)
    assert [sorted(each["guards"]) for each in guards] == [["code", "dataset"], ["code"]]
    assert [each["plan_id"] for each in guards] == [plan["plan_id"] for plan in plans]


def test_a_bundle_of_the_first_format_is_as_fresh_as_it_was(spec: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    assert dfmspec("plan", spec, "-o", golden).returncode == 0
    stored = json.loads((golden / "plan.json").read_text())
    guards = json.loads((golden / "guards.json").read_text())["guards"]
    del stored["revision"]
    first = {**stored, "format_version": 1, "guards": guards}
    (golden / "plan.json").write_text(json.dumps(first, indent=2, sort_keys=True) + "\n")
    (golden / "guards.json").unlink()

    assert dfmspec("plan", spec, "--check", golden).returncode == 0
    edited = {**first, "launch": "sha256:0"}
    (golden / "plan.json").write_text(json.dumps(edited, indent=2, sort_keys=True) + "\n")
    assert dfmspec("plan", spec, "--check", golden).returncode == 3


def test_a_folder_that_is_no_bundle_is_said_to_be_none(spec: Path, tmp_path: Path) -> None:
    for words in (["plan", spec, "--check", tmp_path], ["plan", spec, "--diff", tmp_path], ["run", tmp_path]):
        done = dfmspec(*words)
        assert done.returncode == 2
        assert "no bundle" in done.stderr
        assert "spec.yaml differ" not in done.stderr


def test_a_golden_plan_is_checked_and_a_stale_one_is_shown(spec: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    assert dfmspec("plan", spec, "-o", golden).returncode == 0
    assert dfmspec("plan", spec, "--check", golden).returncode == 0
    assert dfmspec("plan", golden.parent / "spec.yaml", "--diff", golden).stdout == "no difference\n"
    spec.write_text(SPEC.replace("1000", "2000"))
    stale = dfmspec("plan", spec, "--check", golden)

    assert stale.returncode == 3
    assert "train.train_iters: 1000 -> 2000" in stale.stdout
    assert "is stale: config.yaml, node0.sh, plan.json" in stale.stderr
    assert dfmspec("plan", spec, "--check", tmp_path / "nowhere").returncode == 2


def between(spec: Path, *words: str, other: str = "target=megatron_core") -> dict[str, str]:
    """The parts of what two targets make of a spec, by their first lines."""
    done = dfmspec("plan", spec, "target=dfm", *words, "--diff", other)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120
    parts = done.stdout.strip().split("\n\n")
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


def test_two_targets_of_a_spec_are_told_by_what_each_has_and_does(spec: Path) -> None:
    parts = between(spec)
    names = list(parts)

    assert names[0] == "target: dfm -> megatron_core"
    assert [name.split(" (")[0] for name in names[1:]] == [
        "only dfm has",
        "only megatron_core has",
        "both have, with other values:",
        "what they do differently",
    ]
    assert "diffusion: condition_dropout, ema_decay" in parts[names[2]]
    assert "  model.layernorm_epsilon: 1e-05 -> 1e-06" in parts[names[3]].splitlines()
    assert "checkpoint.save" not in parts[names[3]]  # the run directory, in the words of each
    assert "noise level in a pack: one sigma for all packed samples -> one for each" in parts[names[4]]
    assert "](" not in parts[names[4]]


def test_a_deviation_is_told_where_a_spec_meets_it(spec: Path) -> None:
    alone = list(between(spec).values())[-1]
    cut = list(between(spec, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true").values())[-1]

    for subject in ("q/k norms, adaLN, embedders under TP", "final gather under sequence parallelism"):
        assert (subject in alone, subject in cut) == (False, True)
    assert "learning-rate schedule" not in cut


def test_the_same_is_told_from_the_other_side_and_of_another_network(spec: Path) -> None:
    turned = dfmspec("plan", spec, "target=megatron_core", "--diff", "target=dfm").stdout
    assert turned.startswith("target: megatron_core -> dfm\n")
    assert "averaged weights: EMA, saved, resumed, sampled from -> none" in turned

    wan = spec.with_name("wan.yaml")
    wan.write_text("target: dfm_wan\ncluster: {nproc_per_node: 8}\ndata: {source: mock}\n")
    assert "what they do differently" not in between(spec, other=str(wan))


def test_one_more_override_is_compared_with(spec: Path) -> None:
    done = dfmspec("plan", spec, "optimizer.lr=1.0e-4", "--diff", "optimizer.lr=2.0e-4")
    assert "  optimizer.lr: 0.0001 -> 0.0002" in done.stdout.splitlines()


def test_exit_code_says_whether_plans_differ_and_markdown_is_for_a_pull_request(spec: Path, tmp_path: Path) -> None:
    same = dfmspec("plan", spec, "--diff", spec, "--exit-code")
    other = dfmspec("plan", spec, "--diff", "rng.seed=7", "--exit-code", "--format", "markdown")

    assert (same.returncode, same.stdout) == (0, "no difference\n")
    assert other.returncode == 3
    assert other.stdout.splitlines() == [
        "**run**: changes the numbers: 1",
        "",
        "| key | was | is | |",
        "|---|---|---|---|",
        "| `rng.seed` | `1234` | `7` | changes the numbers |",
    ]
    for words in (["--exit-code"], ["--format", "markdown"], ["--diff", spec, "--format", "json"]):
        assert dfmspec("plan", spec, *words).returncode == 2


def test_bundles_of_many_specs_and_cells_are_written_and_checked_at_once(spec: Path, tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text(SPEC.replace("name: run", "name: walk") + "matrix: {rng.seed: [1, 2]}\n")
    written = dfmspec("plan", tmp_path, "-o", tmp_path / "golden")
    names = sorted(path.name for path in (tmp_path / "golden").iterdir())

    assert written.returncode == 0, written.stderr
    assert names == ["run", "walk-seed-1", "walk-seed-2"]
    specs = [spec, tmp_path / "many.yaml"]
    assert dfmspec("plan", *specs, "--check", tmp_path / "golden").returncode == 0
    spec.write_text(SPEC.replace("1000", "2000"))
    stale = dfmspec("plan", *specs, "--check", tmp_path / "golden")
    assert stale.returncode == 3
    assert "1 of 3 bundles stale: run" in stale.stderr
    assert "train.train_iters: 1000 -> 2000" in stale.stdout
