"""How findings are told: what comes first, what is counted, what is underlined, what a branch has changed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from dfmspec.cli.app import COMMANDS
from tests.conftest import ROOT, dfmspec, environment

BASE = "cluster: {nproc_per_node: 8}\ndata: {source: mock}\n"


def said(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "s.yaml").write_text(text)
    return dfmspec("validate", "s.yaml", "--check", "spec", *words, cwd=folder)


def test_errors_come_first_and_hints_are_counted(tmp_path: Path) -> None:
    text = (
        "model: {tensor_model_parallel_size: 3}\n"
        + BASE
        + "train: {train_iters: 9}\nscheduler: {lr_decay_iters: 20}\nrng: {sed: 1}\n"
    )
    folded, shown = said(tmp_path, text), said(tmp_path, text, "--hints")
    severities = re.findall(r": (error|warning|hint): ", shown.stdout)

    assert severities == sorted(severities, key=["error", "warning", "hint"].index)
    assert len({*severities}) == 3
    assert ": hint: " not in folded.stdout
    assert re.search(r"\d hints? \(--hints shows them\)$", folded.stdout.strip())
    # A hint that counts, or that is asked for by name, is shown.
    assert ": hint: " in said(tmp_path, text, "--fail-on", "hint").stdout
    assert "PAR114" in said(tmp_path, text, "--select", "PAR").stdout


def test_success_is_told_on_stderr_and_quiet_is_quiet(tmp_path: Path) -> None:
    good, hinted = BASE, "cluster: {nproc_per_node: 8}\n"  # which names no dataset

    assert re.fullmatch(r"s.yaml: no findings \(\d+ rules\)\n", said(tmp_path, good).stderr)
    assert said(tmp_path, hinted).stderr == "s.yaml: no errors, 1 hint (--hints shows them)\n"
    assert said(tmp_path, good, "-q").stderr == ""
    assert "read: s.yaml; at levels spec" in said(tmp_path, good, "-v").stderr


def test_a_value_that_nobody_set_is_not_underlined(tmp_path: Path) -> None:
    text = BASE + "model:\n  num_layers: 4\ntrain: {global_batch_size: 12}\n"
    shown = said(tmp_path, text, "target=dfm", "train.micro_batch_size=1", "--hints").stdout
    block = shown.partition("About values that the spec does not set:")[2]

    assert "SPC302" in block
    assert "^" not in block


def test_the_place_is_that_of_the_lists_item_also_in_a_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("launcher:\n  sbatch_options:\n    - --exclusive\n    - --nodes=3\n")
    text = "extends: base.yaml\nlauncher: {kind: slurm, setup: [a, 'b ${model.num_layers}']}\n" + BASE
    found = json.loads(said(tmp_path, text, "--format", "json").stdout)["findings"]
    places = {(entry["code"], entry["file"], entry["line"], entry["column"]) for entry in found}

    assert ("RUN119", "base.yaml", 4, 7) in places
    assert ("SPC308", "s.yaml", 2, 36) in places


def test_what_cannot_be_judged_is_one_note(tmp_path: Path) -> None:
    shown = said(
        tmp_path, BASE.replace("8", "7") + "model: {sequence_parallel: yes, tensor_model_parallel_size: 2}\n"
    ).stdout

    assert shown.count("error:") == 2  # the type, and the arithmetic that needs nothing of it
    assert "PAR101" in shown
    assert "SPC103" not in shown
    (note,) = re.findall(r"^note: .*$", shown, re.MULTILINE)
    assert re.match(r"note: \d+ rules could not judge without model.sequence_parallel: PAR\d+", note)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("rng: {sed: 1}\n")
    (tmp_path / "s.yaml").write_text("extends: base.yaml\n" + BASE + "train: {train_iter: 5}\n")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_only_what_a_branch_has_changed_counts_in_the_spec_and_in_what_it_builds_on(repository: Path) -> None:
    def since(*words: str) -> subprocess.CompletedProcess[str]:
        return dfmspec("validate", "s.yaml", "--check", "spec", "--diff-base", "HEAD", *words, cwd=repository)

    assert since().returncode == 0
    (repository / "base.yaml").write_text("# moved\n\nrng: {sed: 1}\noptimizer: {lrr: 1}\n")
    changed = since("--format", "sarif")
    results = json.loads(changed.stdout)["runs"][0]["results"]
    states = {
        (result["ruleId"], result["message"]["text"].split("\n")[0]): result["baselineState"] for result in results
    }

    assert changed.returncode == 1
    assert states["SPC201", "unknown key optimizer.lrr"] == "new"
    assert states["SPC201", "unknown key rng.sed"] == states["SPC201", "unknown key train.train_iter"] == "unchanged"
    assert dfmspec("validate", "s.yaml", "--diff-base", "nowhere", cwd=repository).returncode == 2
    (repository / "new.yaml").write_text("rng: {sed: 1}\n")
    new = dfmspec("validate", "new.yaml", "--check", "spec", "--diff-base", "HEAD", cwd=repository)
    assert new.returncode == 1


def test_excluded_files_are_left_out_and_named_ones_only_by_force(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.draft.yaml", "old/c.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("rng: {sed: 1}\n")

    def files(*words: str) -> list[str]:
        done = dfmspec("validate", *words, "--check", "spec", "--format", "concise", cwd=tmp_path)
        return sorted({line.partition(":")[0] for line in done.stdout.splitlines() if "SPC201" in line})

    assert files(".", "--exclude", "*.draft.yaml", "--exclude", "old") == ["a.yaml"]
    assert files("a.yaml", "b.draft.yaml", "--exclude", "*.draft.yaml") == ["a.yaml", "b.draft.yaml"]
    assert files("a.yaml", "b.draft.yaml", "--exclude", "*.draft.yaml", "--force-exclude") == ["a.yaml"]
    assert dfmspec("validate", "a.yaml", "--exclude", "a.yaml", "--force-exclude", cwd=tmp_path).returncode == 0


def test_a_ci_that_is_known_gets_its_own_form(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("rng: {sed: 1}\n")
    github = dfmspec("validate", "s.yaml", cwd=tmp_path, GITHUB_ACTIONS="true")
    gitlab = dfmspec("validate", "s.yaml", cwd=tmp_path, GITLAB_CI="true")

    assert github.stdout.startswith("::error file=s.yaml,line=1,")
    assert "s.yaml:1:7: error:" in gitlab.stdout
    report = json.loads((tmp_path / "gl-code-quality-report.json").read_text())
    assert "SPC201" in {issue["check_name"] for issue in report}
    assert (
        "::error" not in dfmspec("validate", "s.yaml", "--format", "full", cwd=tmp_path, GITHUB_ACTIONS="true").stdout
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validate"], "error: dfmspec validate needs SPEC... [KEY=VALUE]..."),
        (["run", "s.yaml", "--set", "a=1"], "error: there is no option --set"),
        (["doctors"], "error: no such command 'doctors'"),
        (["validate", "s.yaml", "--fail-on"], "error: option '--fail-on' requires an argument"),
        (["plan", "s.yaml", "--node", "x"], "error: invalid value for '--node'"),
    ],
)
def test_usage_errors_have_the_voice_of_all_others(words: list[str], message: str) -> None:
    done = dfmspec(*words)

    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert "Usage:" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_help_has_every_command_in_a_group_and_none_is_cut_off() -> None:
    shown = dfmspec("--help").stdout

    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S", shown, re.MULTILINE), command
    assert "..." not in shown.partition("Start:")[2]
    for command in (name for name in COMMANDS if name not in ("data", "policy")):
        assert "-q, --quiet" in dfmspec(command, "--help").stdout, command


def test_words_for_torchrun_are_in_the_plan_and_those_of_the_plan_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(BASE)
    plan = json.loads(dfmspec("plan", "s.yaml", "--format", "json", "--", "--max-restarts", "2", cwd=tmp_path).stdout)
    at = plan["command"].index("--max-restarts=2")

    assert plan["command"][at + 1].endswith("pretrain_dit_model.py")
    for words, hint in (
        (["--nnodes=2"], "set cluster.nnodes instead"),
        (["--max-restart=2"], "did you mean --max-restarts"),
    ):
        refused = dfmspec("plan", "s.yaml", "--", *words, cwd=tmp_path)
        assert refused.returncode == 1
        assert "RUN129" in refused.stderr
        assert hint in refused.stderr


def test_what_is_written_for_programs_is_valid_by_its_schema(tmp_path: Path) -> None:
    findings = said(tmp_path, "rng: {sed: 1}\n", "--format", "json").stdout
    (tmp_path / "s.yaml").write_text(BASE)
    plan = dfmspec("plan", "s.yaml", "--format", "json", cwd=tmp_path).stdout
    old = next((ROOT / "tests" / "formats" / "2ade833" / "bundles").glob("*/plan.json")).read_text()
    events = next((ROOT / "tests" / "formats" / "2ade833" / "runs").glob("*/2*/events.jsonl")).read_text().splitlines()

    for name, written in (("findings", [findings]), ("plan", [plan, old]), ("events", events)):
        schema = json.loads(dfmspec("schema", name).stdout)
        jsonschema.Draft202012Validator.check_schema(schema)
        for each in written:
            jsonschema.validate(json.loads(each), schema)
    assert json.loads(dfmspec("schema", "dfm", "--field", "optimizer.lr").stdout)["type"] == "number"


def test_a_rule_as_data_is_all_of_its_page() -> None:
    known = json.loads(dfmspec("rule", "PAR101", "--format", "json").stdout)
    page = dfmspec("rule", "PAR101").stdout

    assert known["message"] in page
    assert known["hint"] in page
    assert all(known["examples"][name]["spec"] in page for name in ("bad", "good"))
    chosen = dfmspec("rule", "--target", "dfm_flux", "--key", "cp").stdout
    assert "FLX104" in chosen
    assert "BAT102" not in chosen
    key = json.loads(dfmspec("explain", "lr", "--format", "json").stdout)
    assert (key["key"], sorted(key["targets"])[0]) == ("optimizer.lr", "dfm")


def test_a_report_is_not_written_over_what_a_spec_builds_on(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "s.yaml").write_text("extends: base.yaml\n")

    for words in (["--report", "json=base.yaml"], ["--write-baseline", "base.yaml"]):
        done = dfmspec("validate", "s.yaml", *words, cwd=tmp_path)
        assert done.returncode == 2, words
        assert (tmp_path / "base.yaml").read_text() == BASE


def test_a_renamed_base_is_compared_with_itself(repository: Path) -> None:
    subprocess.run(["git", "mv", "base.yaml", "ground.yaml"], cwd=repository, check=True)
    (repository / "s.yaml").write_text((repository / "s.yaml").read_text().replace("base.yaml", "ground.yaml"))
    done = dfmspec("validate", "s.yaml", "--check", "spec", "--diff-base", "HEAD", "--format", "json", cwd=repository)
    counted = [found for found in json.loads(done.stdout)["findings"] if found["suppressed"] is None]

    # The file has another name, so what stands in it is told; what stands in the spec was there.
    assert {found["file"] for found in counted if found["severity"] == "error"} == {"ground.yaml"}


def test_an_override_is_compared_with_the_same_spec_also_from_stdin(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(BASE + "matrix: {rng.seed: [1, 2], optimizer.lr: [1.0e-4, 2.0e-4]}\n")
    with (tmp_path / "s.yaml").open() as spec:
        command = [sys.executable, "-m", "dfmspec", "plan", "-", "--cell", "3", "--diff", "optimizer.lr=5.0e-4"]
        done = subprocess.run(
            command, stdin=spec, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )

    assert done.stdout.splitlines() == [
        "changes the numbers:",
        "  optimizer.lr: 0.0001 -> 0.0005",
        "  optimizer.min_lr: 1e-05 -> 5e-05",
    ]


@pytest.mark.parametrize("text", ["[]", "5", "null", '{"plan_id": []}'])
@pytest.mark.parametrize("name", ["plan.json", "guards.json", "source.json"])
def test_a_damaged_file_of_a_bundle_is_told(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(BASE)
    assert dfmspec("plan", "s.yaml", "-o", "bundle", cwd=tmp_path).returncode == 0
    (tmp_path / "bundle" / name).write_text(text)
    done = dfmspec("run", "bundle", "--preflight", "off", cwd=tmp_path)

    assert done.returncode in (3, 4, 1)
    assert done.stderr.startswith("error:" if name != "source.json" else ("error:", "Run"))
    assert "Traceback" not in done.stderr
