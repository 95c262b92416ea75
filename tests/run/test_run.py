"""dfmspec run, end to end on the CPU: verdicts, manifests, locks, signals, bad data."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest

from dfmspec.record import checkpoints, verdict
from dfmspec.record import manifest as manifests
from dfmspec.record.events import read_events
from dfmspec.record.run_dir import RunDir
from dfmspec.record.runs import owned
from dfmspec.run.launch.local import free_port
from tests.conftest import HOWTO, ROOT, TINY, dfmspec, environment
from tests.record.made import checkpoint

SPEC = """
cluster: {device: cpu, nproc_per_node: 2}
train: {train_iters: 3}
checkpoint: {save_interval: 2}
dataset: {task_encoder_seq_length: 64}
"""
SMALL = [*TINY, "dataset.task_encoder_seq_length=64"]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


def manifest_of(run_dir: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((Path(run_dir.strip()) / "manifest.json").read_text())
    jsonschema.validate(manifest, json.loads((ROOT / "schemas" / "manifest.schema.json").read_text()))
    return manifest


def begun(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """A run that has told of an iteration."""
    command = [sys.executable, "-m", "dfmspec", "run", *map(str, words)]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not any(
        event["type"] == "iteration"
        for events in cwd.glob("runs/tiny/2*/events.jsonl")
        for event in read_events(events)
    ):
        assert time.monotonic() < deadline, process.communicate()
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


def rank_pids(cwd: Path) -> list[int]:
    """The processes of the first attempt's ranks."""
    return [int(pid.read_text()) for pid in sorted(cwd.glob("runs/tiny/2*/attempts/1/node0/rank*/pid"))]


def is_alive(pid: int) -> bool:
    """Whether a process is there, and more than an entry that whoever adopted it has not read yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes_with(word: str) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if word in " ".join(process.info["cmdline"] or ()) and process.pid != os.getpid()
    ]


def test_a_run_ends_with_a_true_manifest_and_is_not_run_twice(spec: Path, dataset: Path, tmp_path: Path) -> None:
    words = [
        "run",
        spec,
        f"dataset.path={dataset}",
        *SMALL,
        "train.eval_iters=1",
        "model.tensor_model_parallel_size=2",
        "run.num_samples=2",
        "diffusion.num_steps=3",
    ]
    words += [
        "dataset.task_encoder_seq_length=72",
        "train.global_batch_size=4",
    ]  # four pictures of 16 tokens, and 8 of padding
    result = dfmspec(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run_dir = result.stdout.strip()
    manifest = manifest_of(run_dir)

    assert manifest["verdict"] == "succeeded"
    assert manifest["attempts"][0]["to_iteration"] == 3
    assert [checkpoint["iteration"] for checkpoint in manifest["checkpoints"]] == [2, 3]
    assert manifest["metrics"]["eval_loss"] is not None
    assert manifest["metrics"]["padding"] == pytest.approx(1 / 9, abs=1e-4)
    for event in read_events(Path(run_dir) / "events.jsonl"):
        assert event["type"] != "iteration" or event["tokens_per_second"] * event["seconds"] == pytest.approx(
            4 * 64, rel=0.01
        )
    assert set(manifest["artifacts"]) >= {"samples/grid.png", "samples/loss.png"}
    assert {path.name for path in Path(run_dir).iterdir()} >= {
        "spec.yaml",
        "plan.json",
        "config.yaml",
        "manifest.json",
        "events.jsonl",
        "attempts",
        "checkpoints",
        "tensorboard",
        "samples",
    }
    assert (Path(run_dir).parent / "latest").resolve() == Path(run_dir).resolve()
    assert "[INFO] Iteration 3/3" in result.stderr

    again = dfmspec(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout.strip() == run_dir
    assert "finished already" in again.stderr

    listed = dfmspec("runs", cwd=tmp_path)
    assert "succeeded" in listed.stdout
    assert Path(run_dir).name in listed.stdout
    shown = dfmspec("show", "tiny", cwd=tmp_path)
    assert "iteration 3 was reached and its checkpoint is whole" in shown.stdout
    assert "tokens/s, padding 11%" in shown.stdout
    assert re.search(r"start     [\d.]+ s: imports [\d.]+, .*first iteration [\d.]+", shown.stdout)


def test_a_spec_with_paths_of_its_own_is_one_run_from_any_working_directory(dataset: Path, tmp_path: Path) -> None:
    """As a spec, as a bundle, and as the script of a bundle: each finds the data, and the runs, beside the spec."""
    (tmp_path / "specs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "specs" / "data").symlink_to(dataset)
    (tmp_path / "specs" / "a.yaml").write_text(
        SPEC.replace("dataset: {", "dataset: {path: data, ") + "run: {output_dir: out}\n"
    )
    first = dfmspec("run", "specs/a.yaml", *SMALL, "cluster.nproc_per_node=1", "train.eval_iters=0", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(str(tmp_path / "specs" / "out" / "a"))
    planned = dfmspec(
        "plan",
        "a.yaml",
        *SMALL,
        "cluster.nproc_per_node=1",
        "train.eval_iters=0",
        "-o",
        "../plans/a",
        cwd=tmp_path / "specs",
    )
    assert planned.returncode == 0, planned.stderr
    again = dfmspec("run", "../plans/a", cwd=tmp_path / "elsewhere")
    assert again.stdout == first.stdout
    assert "finished already" in again.stderr
    assert (
        dfmspec(
            "plan",
            "specs/a.yaml",
            *SMALL,
            "cluster.nproc_per_node=1",
            "train.eval_iters=0",
            "--diff",
            first.stdout.strip(),
            cwd=tmp_path,
        ).stdout
        == "no difference\n"
    )

    env = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", DFMSPEC_MASTER_PORT=str(free_port()))
    by_hand = subprocess.run(
        ["bash", tmp_path / "plans" / "a" / "node0.sh"],
        cwd=tmp_path / "elsewhere",
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert by_hand.returncode == 0, by_hand.stderr
    plan_id = json.loads((tmp_path / "plans" / "a" / "plan.json").read_text())["plan_id"].removeprefix("sha256:")
    assert (tmp_path / "specs" / "out" / "a" / plan_id[:12] / "checkpoints" / "iter_0000003").is_dir()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGINT, "SIGINT"),
        pytest.param(signal.SIGHUP, "SIGHUP", marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_and_the_same_command_continues(number: int, name: str, spec: Path, tmp_path: Path) -> None:
    words = [
        spec,
        "data.source=mock",
        *SMALL,
        "train.train_iters=40",
        "checkpoint.save_interval=100",
        f"rng.seed={int(number)}",
    ]
    process = begun(*words, cwd=tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    manifest = manifest_of(out)

    assert process.returncode == 75, err
    assert manifest["verdict"] == "stopped"
    assert manifest["attempts"][0]["signal"] == (signal.SIGTERM if name == "SIGHUP" else number)
    stopped_at = manifest["attempts"][0]["to_iteration"]
    assert manifest["checkpoints"][-1]["iteration"] == stopped_at < 40
    assert not processes_with(Path(out.strip()).name)

    again = dfmspec("run", *words, cwd=tmp_path)
    manifest = manifest_of(again.stdout)
    assert again.returncode == 0
    assert again.stdout == out
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["stopped", "finished"]
    assert manifest["attempts"][1]["from_iteration"] == stopped_at


def test_a_killed_supervisor_leaves_no_process_behind(spec: Path, tmp_path: Path) -> None:
    process = begun(spec, "data.source=mock", *SMALL, "train.train_iters=100000", cwd=tmp_path)
    pids = rank_pids(tmp_path)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=45)

    assert pids, gone
    assert not alive, gone
    assert "unwatched" in dfmspec("runs", cwd=tmp_path).stdout
    assert "nobody watches it: the same command goes on with it" in dfmspec("show", "tiny", cwd=tmp_path).stdout


@pytest.mark.long
def test_a_signal_ends_an_evaluation_too(spec: Path, tmp_path: Path) -> None:
    process = begun(
        spec,
        "data.source=mock",
        *SMALL,
        "train.train_iters=40",
        "train.eval_iters=100000",
        "train.eval_interval=1",
        cwd=tmp_path,
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)

    assert process.returncode == 75, err
    assert manifest_of(out)["checkpoints"][-1]["iteration"] == 3  # of the next one the data was on its way


@pytest.mark.long
def test_a_changed_spec_is_another_run_and_says_so(spec: Path, tmp_path: Path) -> None:
    process = begun(
        spec, "data.source=mock", *SMALL, "train.train_iters=40", "checkpoint.save_interval=100", cwd=tmp_path
    )
    process.send_signal(signal.SIGTERM)
    first = process.communicate(timeout=120)[0].strip()
    reached = manifest_of(first)["checkpoints"][-1]["iteration"]
    words = ["run", spec, "data.source=mock", *SMALL, "train.train_iters=40", "logger.log_interval=7"]
    resumed = dfmspec(*words, f"run.resume={first}", cwd=tmp_path)
    anew = dfmspec(*words, "train.train_iters=1", cwd=tmp_path)

    assert f"Resumed from iteration {reached}" in resumed.stderr
    assert resumed.returncode == 0
    assert f"A new run: {first}, at iteration {reached}, has another plan" in anew.stderr
    assert f"run.resume={first} goes on" in anew.stderr


def test_the_script_says_when_there_are_too_few_gpus(tmp_path: Path) -> None:
    script = "examples/megatron/recipes/dit/pretrain_dit_model.py"
    result = subprocess.run(
        [sys.executable, ROOT / script, "--mock"],
        cwd=tmp_path,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 4
    assert "Traceback" not in result.stderr
    assert "1 process needs a GPU, and this machine has none; give cluster.device=cpu" in result.stdout


def test_an_error_that_a_comment_accepts_starts_nothing(spec: Path, tmp_path: Path) -> None:
    spec.write_text(spec.read_text() + "model: {num_attention_heads: 5} # dfmspec: ignore[MOD101] meant\n")
    result = dfmspec("run", spec, "data.source=mock", cwd=tmp_path)

    assert result.returncode == 1
    assert "MOD101 is accepted by a comment, but the trainer refuses it" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_is_judged_by_its_own_last_checkpoint(tmp_path: Path) -> None:
    """A damaged one of a later iteration was passed over when it began."""
    checkpoint(tmp_path, 4)
    (checkpoint(tmp_path, 8) / "manifest.json").write_text("{")

    assert verdict._fault_of(tmp_path, 4, checkpoints) is None
    assert verdict._fault_of(tmp_path, 8, checkpoints)
    assert verdict._fault_of(tmp_path, 6, checkpoints)


def test_what_the_machine_says_of_itself_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        manifests,
        "_output",
        lambda argv: "WARNING: infoROM is corrupted at gpu 0\nNVIDIA H100, GPU-1, 81559 MiB, 580.1\n",
    )
    assert [gpu["name"] for gpu in manifests._gpus()] == ["NVIDIA H100"]


@pytest.mark.long
def test_a_path_that_is_no_utf_8_stays_in_a_manifest(spec: Path, tmp_path: Path) -> None:
    out = os.fsdecode(os.fsencode(tmp_path) + b"/o\xff")
    result = dfmspec("run", spec, "data.source=mock", *SMALL, "train.train_iters=1", "--output-dir", out, cwd=tmp_path)

    assert result.returncode in (0, 1), result.stderr
    assert "internal error" not in result.stderr, result.stderr
    (run_dir,) = Path(out).glob("tiny/2*")
    assert manifests.read_manifest(RunDir(run_dir)).verdict in ("succeeded", "failed")


def test_a_run_that_is_locked_says_by_whom(spec: Path, tmp_path: Path) -> None:
    words = ["run", spec, "data.source=mock", *SMALL, "train.train_iters=1"]
    assert dfmspec(*words, cwd=tmp_path).returncode == 0
    run_dir = next((tmp_path / "runs" / "tiny").glob("2*"))
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps(manifest | {"verdict": "failed"}))
    with owned(run_dir, "run"):
        result = dfmspec(*words, cwd=tmp_path)

    assert result.returncode == 5
    assert f"is locked by process {os.getpid()} on" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_runs_do_not_save_in_one_folder(spec: Path, tmp_path: Path) -> None:
    with owned(shared := tmp_path / "shared", "checkpoint.save"):
        result = dfmspec("run", spec, "data.source=mock", *SMALL, f"checkpoint.save={shared}", cwd=tmp_path)

    assert result.returncode == 5
    assert f"checkpoint.save {shared} is locked by process {os.getpid()}" in result.stderr


def test_a_rank_that_was_killed_is_named(spec: Path, tmp_path: Path) -> None:
    """And not the one that lost it."""
    process = begun(spec, *SMALL, "data.source=mock", "train.train_iters=2000", cwd=tmp_path)
    os.kill(rank_pids(tmp_path)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)

    assert process.returncode == 1
    assert "failed: rank 1: SIGKILL: killed from outside" in err
    assert "full traceback" not in err


@pytest.mark.long
def test_ranks_whose_torchrun_was_killed_end_before_the_verdict(spec: Path, tmp_path: Path) -> None:
    process = begun(spec, *SMALL, "data.source=mock", "train.train_iters=2000", cwd=tmp_path)
    pids = rank_pids(tmp_path)
    psutil.Process(pids[0]).parent().kill()
    process.communicate(timeout=120)

    assert process.returncode in (1, 75)  # whether they could save first, or not
    assert not [pid for pid in pids if is_alive(pid)]


@pytest.mark.long
def test_a_run_goes_on_when_nobody_reads_what_it_says(spec: Path, tmp_path: Path) -> None:
    process = begun(spec, *SMALL, "data.source=mock", "train.train_iters=40", "logger.log_interval=1", cwd=tmp_path)
    process.stderr.close()

    assert manifest_of(process.stdout.read())["verdict"] == "succeeded"
    assert process.wait() == 0


def test_a_bundle_is_run_twice_from_its_own_folder(spec: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    assert (
        dfmspec("plan", spec, "data.source=mock", *SMALL, "train.train_iters=1", "-o", bundle, cwd=tmp_path).returncode
        == 0
    )
    first, second = (dfmspec("run", ".", cwd=bundle) for _ in range(2))

    assert first.returncode == 0, first.stderr
    assert second.returncode == 0
    assert "finished already" in second.stderr
    # What was asked is in the record as if the spec had been run; a run is named by its experiment, too.
    manifest = manifest_of(first.stdout)
    assert (manifest["spec_file"], manifest["overrides"][-1]) == (str(spec), "train.train_iters=1")
    assert (Path(first.stdout.strip()) / "spec.yaml").read_text() == spec.read_text()
    assert dfmspec("run", "tiny", cwd=bundle).stdout == first.stdout
    same = dfmspec("plan", spec, *manifest["overrides"], "--diff", "tiny", "--exit-code", cwd=bundle)
    assert (same.returncode, same.stdout) == (0, "no difference\n")


@pytest.mark.long
def test_drawn_data_that_was_deleted_is_drawn_again_and_the_run_goes_on(spec: Path, tmp_path: Path) -> None:
    words = ["run", spec, *SMALL, "data.source=embedded", "data.num_samples=64", "train.train_iters=1"]
    first = dfmspec(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    run_dir = Path(first.stdout.strip())
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert "dataset" in manifest["guards"]
    (run_dir / "manifest.json").write_text(json.dumps(manifest | {"verdict": "stopped"}))
    shutil.rmtree(tmp_path / "data")
    again = dfmspec(*words, cwd=tmp_path)

    assert again.returncode == 0, again.stderr


def test_a_training_that_fails_says_why_and_where(spec: Path, dataset: Path, tmp_path: Path) -> None:
    """Samples larger than a pack: the message names sample, shard and key; the manifest has the traceback."""
    result = dfmspec("run", spec, f"dataset.path={dataset}", *TINY, "dataset.task_encoder_seq_length=8", cwd=tmp_path)
    manifest = manifest_of(result.stdout)

    assert result.returncode == 1
    assert manifest["verdict"] == "failed"
    assert manifest["attempts"][0]["failure"]["rank"] in (0, 1)
    assert "it has 16 tokens, more than dataset.task_encoder_seq_length = 8" in manifest["reason"]
    assert "failed: rank" in result.stderr
    assert "error.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_two_nodes_of_a_plan_run_on_this_machine(spec: Path, tmp_path: Path) -> None:
    words = [
        "run",
        spec,
        "data.source=mock",
        *SMALL,
        "cluster.nnodes=2",
        "cluster.nproc_per_node=1",
        "train.global_batch_size=2",
    ]
    result = dfmspec(*words, cwd=tmp_path)
    manifest = manifest_of(result.stdout)

    assert result.returncode == 0, result.stderr
    assert [node["exit_code"] for node in manifest["attempts"][0]["nodes"]] == [0, 0]


def test_a_new_run_starts_from_an_iteration_of_the_earlier_one(spec: Path, tmp_path: Path) -> None:
    words = ["run", spec, "data.source=mock", *SMALL]
    first = dfmspec(*words, cwd=tmp_path)
    second = dfmspec(*words, "run.resume=2", cwd=tmp_path)
    manifest = manifest_of(second.stdout)

    assert second.returncode == 0, second.stderr
    assert second.stdout != first.stdout
    assert manifest["attempts"][0]["from_iteration"] == 2
    assert [checkpoint["iteration"] for checkpoint in manifest["checkpoints"]] == [3]


def test_the_how_tos_yaml_runs(dataset: Path, tmp_path: Path) -> None:
    text = HOWTO.read_text().replace("/path/to/checkpoints/dit_butterfly/", "ckpt")
    (tmp_path / "howto.yaml").write_text(text)
    words = ["--dataset-path", dataset, *SMALL, "train.train_iters=2", "train.global_batch_size=4"]
    result = dfmspec("run", "howto.yaml", *words, cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert [path.name for path in sorted((tmp_path / "ckpt").glob("iter_*"))] == ["iter_0000002"]


def test_a_plan_on_disk_is_run_and_a_stale_or_edited_one_is_refused(spec: Path, dataset: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    made = dfmspec("plan", spec, f"dataset.path={copy}", *SMALL, "-o", tmp_path / "plan", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert dfmspec("run", tmp_path / "plan", cwd=tmp_path).returncode == 0

    script = subprocess.run(
        ["bash", str(tmp_path / "plan" / "node0.sh")],
        cwd=tmp_path,
        env=environment(
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", DFMSPEC_MASTER_PORT=str(free_port())
        ),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert script.returncode == 0, script.stderr[-2000:]
    plan_id = json.loads((tmp_path / "plan" / "plan.json").read_text())["plan_id"].removeprefix("sha256:")
    assert (
        tmp_path / "runs" / "tiny" / plan_id[:12] / "checkpoints"
    ).is_dir()  # where no other plan of this name saves

    (copy / ".nv-meta" / "split.yaml").write_text((copy / ".nv-meta" / "split.yaml").read_text() + "\n")
    stale = dfmspec("run", tmp_path / "plan", cwd=tmp_path)
    assert stale.returncode == 3
    assert "the metadata of dataset" in stale.stderr

    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    plan["config"]["optimizer"]["lr"] = 1.0
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(plan))
    edited = dfmspec("run", tmp_path / "plan", cwd=tmp_path)
    assert edited.returncode == 3
    assert "was edited" in edited.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "{spec}", "dataset.path=/nonexistent"], 1, "dataset /nonexistent does not exist"),
        (["run", "{spec}"], 2, "no dataset is named"),
        (["run", "{spec}", "data.source=mock", "cluster.device=cuda"], 4, "no NVIDIA driver"),
        (["run", "{spec}", "data.source=mock", "run.resume=require"], 1, "has no run of this plan"),
        (["run", "/nonexistent.yaml"], 2, "cannot be read"),
        (["run", "{spec}", "model.num_layerz=1"], 1, "did you mean model.num_layers"),
        (["show", "nothing"], 2, "no run 'nothing'"),
        (["sample", "{tmp}"], 1, "has no whole checkpoint"),
        (["data", "inspect", "/nonexistent"], 2, "is not a folder"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(
    words: list[str], code: int, message: str, spec: Path, tmp_path: Path
) -> None:
    result = dfmspec(*[word.format(spec=spec, tmp=tmp_path) for word in words], cwd=tmp_path)

    assert result.returncode == code, result.stderr
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()
