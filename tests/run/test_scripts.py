"""dfmspec run of scripts that know nothing of it: a stand-in for NVIDIA DFM's, under a real torchrun on two processes.

The stand-in has the real one's flags, lines, files and faults; tests/gpu/README.md tells of the real one.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dfmspec.record.events import read_events
from dfmspec.record.progress import Start
from dfmspec.run import watch
from dfmspec.targets.dfm.log import told
from tests.conftest import dfmspec, environment
from tests.run.test_run import is_alive, manifest_of

STAND_IN = Path(__file__).parent / "standin"
LOGS = Path(__file__).parents[1] / "targets" / "dfm" / "logs"
SPEC = f"""
spec_version: 1
target: dfm
cluster: {{nproc_per_node: 2, device: cpu}}
launcher: {{root: {STAND_IN}}}
data: {{source: mock}}
train: {{global_batch_size: 2, train_iters: 20, eval_iters: 2}}
logger: {{log_interval: 1}}
checkpoint: {{save_interval: 10}}
"""

SHORT = ["train.train_iters=3", "train.eval_iters=0"]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "dit.yaml"
    path.write_text(SPEC)
    return path


def run(cwd: Path, *words: object, fault: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    first = words or ("dit.yaml",)
    return dfmspec("run", *first, "--allow-revision", cwd=cwd, STANDIN_FAULT=fault, STANDIN_SECONDS="0.01", **env)


def begun(cwd: Path, *words: str, iterations: int = 3, **env: str) -> subprocess.Popen[str]:
    """A run of the stand-in that has told of some iterations."""
    command = [sys.executable, "-m", "dfmspec", "run", "dit.yaml", "--allow-revision", *words]
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(**env), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(told_in(cwd)) < iterations:
        assert time.monotonic() < deadline, process.communicate()
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    return process


def told_in(cwd: Path) -> list[int]:
    """The iterations that the newest run has told of."""
    found = [read_events(events, kinds=["iteration"]) for events in cwd.glob("runs/dit/2*/events.jsonl")]
    return [event["iteration"] for events in found for event in events]


def the_run(cwd: Path) -> Path:
    return (cwd / "runs/dit/latest").resolve()


def shape(line: str) -> str:
    """A line with its numbers and paths left out."""
    line = re.sub(r"(?<= )/\S+", "PATH", line)
    return " ".join(re.sub(r"\d[\d.:E+-]*", "N", line).split())


def test_a_run_ends_with_a_true_manifest_and_is_not_run_twice(spec: Path, tmp_path: Path) -> None:
    done = run(tmp_path)
    manifest = manifest_of(done.stdout)
    again = run(tmp_path)

    assert done.returncode == 0, done.stderr
    assert manifest["verdict"] == "succeeded"
    assert manifest["reason"].endswith("is whole as far as its files tell: they carry no checksums")
    assert [checkpoint["iteration"] for checkpoint in manifest["checkpoints"]] == [10, 20]
    assert manifest["metrics"]["first_loss"] == 1.0
    assert manifest["metrics"]["eval_loss"] == 1.0
    assert manifest["attempts"][0]["nodes"][0]["exit_code"] == 0
    assert [event["iteration"] for event in read_events(the_run(tmp_path) / "events.jsonl", kinds=["iteration"])] == [
        *range(1, 21)
    ]
    sources = manifest["environment"]["training"]["sources"]
    assert {source["revision"] for source in sources} == {None}  # another than is known, and accepted
    assert again.returncode == 0
    assert "has finished already" in again.stderr

    # What the stand-in prints is what was recorded of the real one.
    recorded = {shape(line) for file in LOGS.glob("*.log") for line in file.read_text().splitlines()}
    for log in (the_run(tmp_path) / "attempts/1/node0").glob("rank*/stdout"):
        for line in log.read_text().splitlines():
            known = told(line)
            if known is not None and known.kind != "random_weights":
                assert shape(line) in recorded, line


def test_the_script_is_started_as_by_python_itself(spec: Path, tmp_path: Path) -> None:
    run(tmp_path)
    printed = (the_run(tmp_path) / "attempts/1/node0/rank1/stdout").read_text()

    assert printed.startswith(f"Namespace(mock=True, config_file='{the_run(tmp_path)}/config.yaml'")


def test_a_signal_stops_and_saves_and_the_run_goes_on_by_its_folder(spec: Path, tmp_path: Path) -> None:
    process = begun(tmp_path, STANDIN_SECONDS="0.3")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    stopped_at = manifest_of(out)["attempts"][0]["to_iteration"]
    refused = run(tmp_path, out.strip(), "train.train_iters=30")
    on = run(tmp_path, out.strip())
    manifest = manifest_of(on.stdout)

    assert process.returncode == 75, err
    assert "stopped by a signal after iteration" in err
    assert 2 < stopped_at < 20
    assert refused.returncode == 2
    assert "goes on exactly as it is" in refused.stderr
    assert on.returncode == 0, on.stderr
    assert on.stdout == out
    assert [attempt["from_iteration"] for attempt in manifest["attempts"]] == [0, stopped_at]


def test_without_a_handler_a_signal_loses_what_was_not_saved_and_the_run_says_so(spec: Path, tmp_path: Path) -> None:
    process = begun(tmp_path, "train.exit_signal_handler=false", STANDIN_SECONDS="0.3")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 128 + signal.SIGTERM
    assert "train.exit_signal_handler is false" in err
    assert manifest_of(out)["verdict"] == "failed"


def test_the_rank_that_failed_first_is_named(spec: Path, tmp_path: Path) -> None:
    done = run(tmp_path, fault="crash")
    manifest = manifest_of(done.stdout)

    assert done.returncode == 1
    assert "failed: rank 1: ValueError: the stand-in's rank 1 has had enough" in done.stderr
    assert "full traceback:" in done.stderr
    assert manifest["attempts"][0]["failure"]["rank"] == 1


def test_a_rank_that_was_killed_is_named(spec: Path, tmp_path: Path) -> None:
    process = begun(tmp_path, STANDIN_SECONDS="0.3")
    pids = [int(pid.read_text()) for pid in (the_run(tmp_path) / "attempts/1/node0").glob("rank1/pid")]
    psutil.Process(pids[0]).kill()
    out, err = process.communicate(timeout=60)

    assert process.returncode == 1
    assert "failed: rank 1: SIGKILL: killed from outside" in err
    assert manifest_of(out)["verdict"] == "failed"


def test_a_cut_checkpoint_is_no_success_and_is_not_gone_on_from(spec: Path, tmp_path: Path) -> None:
    done = run(tmp_path, fault="truncated")
    again = run(tmp_path)

    assert done.returncode == 1
    assert re.search(
        r"failed: the last checkpoint cannot be used: \S+ has \d+ bytes, and its tensors reach", done.stderr
    )
    assert "the same command continues" not in done.stderr
    assert again.returncode == 1
    assert "cannot be used: " in again.stderr
    assert "begin anew with run.resume=never" in again.stderr or "run.resume=" in again.stderr


@pytest.mark.long
def test_a_loss_that_is_no_number_is_told_and_is_null(spec: Path, tmp_path: Path) -> None:
    done = run(tmp_path, fault="nan")
    events = read_events(the_run(tmp_path) / "events.jsonl", kinds=["iteration"])
    losses = {event["iteration"]: event["loss"] for event in events}

    assert done.returncode == 0, done.stderr
    assert "[WARNING] Iteration  4/20, Loss: no number" in done.stderr
    assert losses[4] is None
    assert losses[5] == 0.2


def test_a_script_that_begins_anew_in_silence_is_ended_before_it_saves(spec: Path, tmp_path: Path) -> None:
    process = begun(tmp_path, iterations=12, STANDIN_SECONDS="0.2")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    saved = sorted(path.name for path in (Path(out.strip()) / "checkpoints").glob("iter_*"))
    again = dfmspec("run", "dit.yaml", "--allow-revision", cwd=tmp_path, STANDIN_FAULT="fresh", STANDIN_SECONDS="0.2")
    manifest = manifest_of(again.stdout)

    assert again.returncode == 1
    assert re.search(r"failed: it began anew, although iteration \d+ was committed before", again.stderr)
    assert manifest["attempts"][-1]["outcome"] == "failed"
    assert sorted(path.name for path in (Path(out.strip()) / "checkpoints").glob("iter_*")) == saved
    assert run(tmp_path).returncode == 0


@pytest.mark.long
def test_lost_checkpoints_are_told_before_anything_starts(spec: Path, tmp_path: Path) -> None:
    process = begun(tmp_path, iterations=12, STANDIN_SECONDS="0.2")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    (newest,) = [path for path in (Path(out.strip()) / "checkpoints").glob("iter_*") if path.name != "iter_0000010"]
    shutil.rmtree(newest)
    gone = run(tmp_path)
    shutil.rmtree(Path(out.strip()) / "checkpoints")
    all_gone = run(tmp_path)
    begun_attempts = list((Path(out.strip()) / "attempts").iterdir())

    assert gone.returncode == all_gone.returncode == 1
    assert f"the script would go on from {newest}, which cannot be used: it is gone" in gone.stderr
    assert "go on from another with run.resume=10" in gone.stderr
    assert "would go on from iteration 0" in all_gone.stderr
    assert len(begun_attempts) == 1


@pytest.mark.long
def test_a_missing_checkpoint_is_no_success_although_the_script_exits_with_0(spec: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "dit.yaml", "checkpoint.exit_on_missing_checkpoint=true")

    assert done.returncode == 1
    assert "it found no checkpoint to load, and checkpoint.exit_on_missing_checkpoint had it end" in done.stderr


@pytest.mark.long
def test_a_slow_save_is_waited_for(spec: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "dit.yaml", *SHORT, fault="slow_save")
    saves = read_events(the_run(tmp_path) / "events.jsonl", kinds=["checkpoint"])

    assert done.returncode == 0, done.stderr
    assert min(save["seconds"] for save in saves) >= 2.5


@pytest.mark.long
def test_a_script_that_does_not_exit_is_ended_and_has_succeeded(spec: Path, tmp_path: Path) -> None:
    done = run(tmp_path, fault="hang")
    manifest = manifest_of(done.stdout)

    assert done.returncode == 0, done.stderr
    assert re.search(r"its processes did not exit, and were ended 6\d s after their last word", manifest["reason"])
    assert not [
        pid for pid in (the_run(tmp_path) / "attempts/1/node0").glob("rank*/pid") if is_alive(int(pid.read_text()))
    ]


@pytest.mark.long
def test_another_plans_checkpoints_are_not_gone_on_from(spec: Path, tmp_path: Path) -> None:
    first = run(tmp_path, "dit.yaml", f"checkpoint.save={tmp_path / 'shared'}")
    other = run(tmp_path, "dit.yaml", f"checkpoint.save={tmp_path / 'shared'}", "train.train_iters=30")
    named = run(
        tmp_path, "dit.yaml", f"checkpoint.save={tmp_path / 'shared'}", "train.train_iters=30",
        f"run.resume={tmp_path / 'shared'}",
    )  # fmt: skip

    assert first.returncode == 0, first.stderr
    assert other.returncode == 1
    assert "are of another plan, and the script would go on from them" in other.stderr
    assert named.returncode == 0, named.stderr
    assert manifest_of(named.stdout)["attempts"][0]["from_iteration"] == 20


@pytest.mark.long
def test_a_bundle_runs_as_its_plan_does_and_as_it_is(spec: Path, tmp_path: Path) -> None:
    made = dfmspec("plan", "dit.yaml", "-o", "bundle", cwd=tmp_path)
    done = run(tmp_path, "bundle")
    rank = tmp_path / "bundle" / "rank.py"
    rank.write_text(rank.read_text() + "# mine\n")
    edited = run(tmp_path, "bundle")

    assert made.returncode == 0, made.stderr
    assert done.returncode == 0, done.stderr
    assert edited.returncode == 3
    assert "rank.py" in edited.stderr


def test_a_run_without_checkpoints_may_succeed(spec: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "dit.yaml", "checkpoint.save=null", "checkpoint.load=null", *SHORT)

    assert done.returncode == 0, done.stderr
    assert "iteration 3 was reached, and no checkpoint is asked for" in done.stderr


@pytest.mark.parametrize("lost", ["manifest.json", "plan.json"])
def test_a_run_whose_record_is_gone_is_told(lost: str, spec: Path, tmp_path: Path) -> None:
    folder = Path(run(tmp_path, "dit.yaml", *SHORT).stdout.strip())
    (folder / lost).unlink()
    done = run(tmp_path, folder)

    assert done.returncode in (1, 2)
    assert lost in done.stderr
    assert "Traceback" not in done.stderr


class Clock:
    """Time as a test has it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        return int(self.now * 1e9)

    def time(self) -> float:
        return self.now


def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **train: Any) -> tuple[watch.ScriptWatch, Path, Clock]:
    """A watch over a run directory without processes, its log, and the clock."""
    from dfmspec.plan.plan import make_plan
    from dfmspec.read.load import load_spec
    from dfmspec.read.resolve import resolve_spec
    from dfmspec.record.run_dir import RunDir
    from dfmspec.run.request import Launch, Request

    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    words = ["target=dfm", "data.source=mock", "cluster.nproc_per_node=1", "train.train_iters=40"]
    words += [f"train.{name}={value}" for name, value in train.items()]
    plan = make_plan(resolve_spec(load_spec(None, [*words, f"run.output_dir={tmp_path}"])))
    request = Request(plan, None, None, (), talk=lambda line: None)
    directory = RunDir(tmp_path / "run")
    log = directory.attempt(1).node(0).rank(0).stdout
    log.parent.mkdir(parents=True)
    seen = watch.watch(Launch.of(request), directory, 1, Start(0))
    assert isinstance(seen, watch.ScriptWatch)
    return seen, log, clock


def test_a_finished_script_is_ended_when_nothing_grows_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, log, clock = watched(tmp_path, monkeypatch, eval_iters=0)
    text = (LOGS / "dit.log").read_text()
    log.write_text(text)
    shard = tmp_path / "run" / "checkpoints" / "iter_0000040" / "__0_0.distcp"
    shard.parent.mkdir(parents=True)
    seen.forward()
    verdicts = []
    for second in range(0, 200, 5):
        clock.now = 1000.0 + second
        if second <= 60:  # a file grows
            shard.write_bytes(b"x" * second)
        if second == 100:  # a line comes
            log.write_text(text + "a line\n")
        seen.forward()
        verdicts.append((second, seen.over()))
    ended = [second for second, why in verdicts if why is not None]

    assert ended[0] >= 160
    assert "did not exit" in seen.remark


def test_an_evaluation_after_the_end_has_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, log, clock = watched(tmp_path, monkeypatch, eval_iters=32)
    log.write_text((LOGS / "dit.log").read_text())
    seen.forward()
    assert seen.over() is None
    clock.now += 300
    assert seen.over() is None
    clock.now += 400
    assert seen.over() is not None


def test_a_save_that_goes_on_behind_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, log, clock = watched(tmp_path, monkeypatch, eval_iters=0)
    log.write_text((LOGS / "dit.log").read_text().rpartition("  successfully saved")[0])
    seen.forward()
    seen.over()
    clock.now += 10_000

    assert seen.over() is None


def test_events_are_json_that_others_read(spec: Path, tmp_path: Path) -> None:
    run(tmp_path, "dit.yaml", *SHORT)
    lines = (the_run(tmp_path) / "events.jsonl").read_text().splitlines()

    assert json.loads(lines[0])["type"] == "started"
    assert "runs/dit" in dfmspec("show", "dit", cwd=tmp_path).stdout


def test_ranks_whose_supervisor_was_killed_save_and_are_gone_on_from(spec: Path, tmp_path: Path) -> None:
    process = begun(tmp_path, iterations=4, STANDIN_SECONDS="0.2", STANDIN_FAULT="slow_save")
    process.kill()
    process.wait()
    on = run(tmp_path)
    attempts = manifest_of(on.stdout)["attempts"]

    assert on.returncode == 0, on.stderr
    assert "processes of an earlier attempt still save and end" in on.stderr
    assert attempts[1]["from_iteration"] == attempts[0]["to_iteration"] >= 4


def test_a_full_disk_costs_events_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, log, _ = watched(tmp_path, monkeypatch, eval_iters=0)
    text = (LOGS / "dit.log").read_text()
    log.write_text(text[: len(text) // 2])
    events = tmp_path / "run" / "events.jsonl"
    events.symlink_to("/dev/full")
    seen.forward()
    events.unlink()
    log.write_text(text)
    seen.forward()
    seen.forward(is_last=True)

    assert [event["type"] for event in read_events(events)][:2] == ["started", "iteration"]
    assert read_events(events)[-1]["type"] == "finished"


def test_a_wrong_start_is_no_success_although_nobody_saw_it_begin(spec: Path, tmp_path: Path) -> None:
    """The run is over before anybody looks."""
    first = tmp_path / "first"
    assert run(tmp_path, "dit.yaml", f"checkpoint.save={first}", *SHORT).returncode == 0
    done = run(
        tmp_path, "dit.yaml", f"checkpoint.load={first}", "train.train_iters=6", "train.eval_iters=0", fault="fresh"
    )

    assert done.returncode == 1
    assert f"it started from random weights, and {first} was to be gone on from" in done.stderr


def test_no_interval_means_no_checkpoint_at_the_end_either(tmp_path: Path) -> None:
    from dfmspec.plan.plan import make_plan
    from dfmspec.read.load import load_spec
    from dfmspec.read.resolve import resolve_spec
    from dfmspec.run.request import Launch, Request

    def saves(*words: str) -> bool:
        plan = make_plan(resolve_spec(load_spec(None, ["target=dfm", "data.source=mock", *words])))
        return Launch.of(Request(plan, None, None, (), talk=print)).saves

    assert saves()
    assert saves("checkpoint.save_interval=null")
    assert not saves("checkpoint.save_interval=0")
    assert not saves("checkpoint.save=null", "train.eval_iters=0")


@pytest.mark.long
def test_a_script_without_a_handler_is_not_promised_a_save(spec: Path, tmp_path: Path) -> None:
    process = begun(tmp_path, "train.exit_signal_handler=false", STANDIN_SECONDS="0.3")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)

    assert "what follows its last checkpoint is lost" in err
    assert "saved first" not in err


def test_a_rank_reads_another_configuration_once_the_run_has_saved(tmp_path: Path) -> None:
    from dfmspec.run.rank import GOES_ON, _going_on

    words = ["script.py", "--config-file", str(tmp_path / "config.yaml"), "--mock"]
    assert _going_on(words) == words
    known = {"tracker": str(tmp_path / "latest"), "config": str(tmp_path / "on.yaml")}
    (tmp_path / GOES_ON).write_text(json.dumps(known))
    assert _going_on(words) == words
    (tmp_path / "latest").touch()
    assert _going_on(words) == ["script.py", "--config-file", str(tmp_path / "on.yaml"), "--mock"]


@pytest.mark.parametrize(("text", "number"), [("15", 15), ("10\n", 10), ("", 0), ("x", 0)])
def test_a_stop_counts_once_its_number_is_written(text: str, number: int, tmp_path: Path) -> None:
    from dfmspec.run.rank import _number_in

    (tmp_path / "stop").write_text(text)
    assert _number_in(tmp_path / "stop") == number
    assert _number_in(tmp_path / "nowhere") == 0
