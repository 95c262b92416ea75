"""A site's policy: each shape, what cannot switch it off, files that are no policy, its own tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dfmspec.check.policy import policy_findings
from dfmspec.check.policy_file import policies, policy_of
from dfmspec.check.rules.policies import RULE_OF
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.read.sites import SITE_VARIABLE, site_folder
from tests.conftest import dfmspec

HOLDS = "DFMSPEC_POLICY"


def write(folder: Path, *rules: dict[str, Any], **more: Any) -> str:
    file = folder / "policy.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"policy_version": 1, "rules": list(rules), **more}))
    return str(file)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which a policy.yaml holds, and no site's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(HOLDS, "policy.yaml")
    (tmp_path / "site").mkdir()
    monkeypatch.setenv(SITE_VARIABLE, str(tmp_path / "site"))
    return tmp_path


def found(*overrides: str, file: str | None = None) -> list[tuple[str, str]]:
    resolved = resolve_spec(load_spec(file, overrides))
    return [(finding.code, finding.message) for finding in policy_findings(resolved)]


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"key": "cluster.nnodes", "max": 16}, "cluster.nnodes=17", "cluster.nnodes is 17, and may be at most 16"),
    ({"key": "cluster.gpus", "max": 64}, "cluster.nnodes=9", "cluster.gpus is 72, and may be at most 64"),
    ({"key": "cluster.gpu_hours", "max": 100}, "launcher.time_limit=13h", "cluster.gpu_hours is 104, "),
    ({"key": "launcher.time_limit", "max": "24h"}, "launcher.time_limit=1-01:00:00", "launcher.time_limit is 1-01"),
    ({"key": "launcher.time_limit", "min": "10m"}, "launcher.time_limit=5", "launcher.time_limit is 5, and may be at "),
    ({"key": "cluster.nproc_per_node", "multiple_of": 4}, "cluster.nproc_per_node=6", "must be a multiple of 4"),
    ({"key": "launcher.partition", "allowed": ["a", "b"]}, "launcher.partition=c", "is c, and may be a, b"),
    ({"key": "cluster.device", "allowed": ["cuda"]}, "cluster.device=cpu", "is cpu, and may be cuda"),
    ({"key": "launcher.sbatch_options", "allowed": ["--x"]}, "launcher.sbatch_options=[--x, --y]", "is --y, and may"),
    ({"key": "launcher.container", "matches": r".+@sha256:\w+"}, "launcher.container=a:latest", "must match .+@sha"),
    ({"key": "launcher.account", "required": True}, "launcher.kind=slurm", "launcher.account must be set"),
    ({"key": "launcher.setup", "forbidden": True}, "launcher.setup=[x]", "launcher.setup must not be set"),
    ({"key": "checkpoint.save", "under": ["/a", "/b/"]}, "checkpoint.save=/ab", "is /ab, and must lie in /a or /b/"),
    ({"key": "checkpoint.save", "under": ["/a"]}, "checkpoint.save=/a/../b", "checkpoint.save is /b"),
    ({"key": "checkpoint.save", "owners": {"/a": ["nobody"]}}, "checkpoint.save=/a/b", "/a is of nobody"),
    ({"key": "checkpoint.save", "owners": {"/a": ["@x"], "/": ["root"]}}, "checkpoint.save=/a/b", "/a is of @x"),
]
FINE: list[tuple[dict[str, Any], str]] = [
    ({"key": "cluster.nnodes", "max": 16}, "cluster.nnodes=16"),
    ({"key": "cluster.gpus", "max": 64}, "cluster.nnodes=8"),
    ({"key": "cluster.gpu_hours", "max": 100}, "cluster.nnodes=64"),
    ({"key": "launcher.time_limit", "max": "24h"}, "launcher.time_limit=1-00:00:00"),
    ({"key": "launcher.time_limit", "max": "24h"}, "launcher.kind=slurm"),
    ({"key": "launcher.partition", "allowed": ["a", "b"]}, "launcher.kind=slurm"),
    ({"key": "launcher.partition", "allowed": ["a", "b"]}, "launcher.partition=b"),
    ({"key": "launcher.container", "matches": r".+@sha256:\w+"}, "launcher.container=a@sha256:0f"),
    ({"key": "launcher.account", "required": True}, "launcher.account=x"),
    ({"key": "launcher.account", "required": True, "when": {"launcher.kind": ["slurm"]}}, "launcher.kind=ssh"),
    ({"key": "launcher.setup", "forbidden": True}, "launcher.kind=slurm"),
    ({"key": "checkpoint.save", "under": ["/a"]}, "checkpoint.save=/a/b"),
    ({"key": "checkpoint.save", "under": ["/a"]}, "launcher.kind=slurm"),
    ({"key": "checkpoint.save", "owners": {"/a": ["nobody"], "/a/b": ["root"]}}, "checkpoint.save=/a/b/c"),
    ({"key": "model.vae_cache_folder", "required": True}, "cluster.nnodes=1"),  # which this target has not
]


@pytest.mark.parametrize(("rule", "override", "message"), FAULTS)
def test_a_rule_finds_what_it_forbids(held: Path, rule: dict[str, Any], override: str, message: str) -> None:
    write(held, rule)
    shape = next(name for name in RULE_OF if name in rule)
    [(code, said)] = found("cluster.nproc_per_node=8", override)

    assert code == RULE_OF[shape].code
    assert message in said


@pytest.mark.parametrize(("rule", "override"), FINE)
def test_a_rule_lets_pass_what_it_allows(
    held: Path, rule: dict[str, Any], override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfmspec.check.policy._who_we_are", lambda: {"root", "@vision"})
    write(held, rule)

    assert found("cluster.nproc_per_node=8", override) == []


def test_every_shape_is_tried() -> None:
    assert {next(name for name in RULE_OF if name in rule) for rule, *_ in FAULTS} == set(RULE_OF)


def test_of_a_group_one_may(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfmspec.check.policy._who_we_are", lambda: {"ada", "@vision"})
    write(held, {"key": "checkpoint.save", "owners": {"/a": ["@vision"]}})

    assert found("checkpoint.save=/a/b") == []


def test_a_users_name_is_the_systems_whatever_the_shell_says(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(held, {"key": "checkpoint.save", "under": ["/scratch/${env:USER}"]})
    for name in (".", "../tmp", "bob"):
        monkeypatch.setenv("USER", name)
        assert [code for code, _ in found("checkpoint.save=/scratch/bob/x")] == ["POL105"]
        assert [code for code, _ in found("checkpoint.save=/tmp/x")] == ["POL105"]


def test_a_site_that_is_named_and_not_there_is_an_error(held: Path) -> None:
    result = dfmspec("validate", "-", DFMSPEC_SITE="/nonexist", DFMSPEC_POLICY="")

    assert result.returncode == 2
    assert "DFMSPEC_SITE: /nonexist is no folder" in result.stderr


def test_a_link_is_followed_to_where_it_leads(held: Path) -> None:
    (held / "allowed").mkdir()
    (held / "allowed/link").symlink_to("/tmp")
    write(held, {"key": "checkpoint.save", "under": [str(held / "allowed")]})

    assert found("checkpoint.save=allowed/x") == []
    assert [code for code, _ in found("checkpoint.save=allowed/link/x")] == ["POL105"]


def test_where_two_say_something_the_stricter_counts(held: Path) -> None:
    write(
        held,
        {"key": "cluster.nnodes", "max": 8},
        {"key": "cluster.nnodes", "max": 4},
        {"key": "cluster.nnodes", "max": 6},
    )

    assert [message for _, message in found("cluster.nnodes=9")] == ["cluster.nnodes is 9, and may be at most 4"]


def test_the_sites_policy_and_the_named_one_both_hold(held: Path) -> None:
    write(held, {"key": "cluster.nnodes", "max": 8})
    write(held / "site", {"key": "launcher.account", "required": True})

    assert [code for code, _ in found("cluster.nnodes=9")] == ["POL103", "POL101"]
    assert len(policies()) == 2


def test_a_profile_of_the_site_may_set_what_is_forbidden(held: Path) -> None:
    write(held, {"key": "launcher.setup", "forbidden": True})
    profiles = held / "site/profiles"
    profiles.mkdir(parents=True)
    (profiles / "big.yaml").write_text("launcher: {setup: [module load cuda]}\n")

    assert found("profile=big") == []
    assert [code for code, _ in found("profile=big", "launcher.setup=[module load cuda]")] == ["POL104"]


MALFORMED = {
    "a key that is not there": "rules: [{key: cluster.nodes, max: 3}]",
    "a key of the condition": "rules: [{key: cluster.nnodes, max: 3, when: {cluster.kind: x}}]",
    "two shapes": "rules: [{key: cluster.nnodes, max: 3, min: 2}]",
    "no shape": "rules: [{key: cluster.nnodes}]",
    "an unknown word": "rules: [{key: cluster.nnodes, most: 3}]",
    "no number": "rules: [{key: launcher.time_limit, max: soon}]",
    "a limit of a word": "rules: [{key: launcher.partition, max: 3}]",
    "a folder of a number": "rules: [{key: train.train_iters, under: [/x]}]",
    "a section": "rules: [{key: cluster, forbidden: true}]",
    "a condition that never holds": "rules: [{key: cluster.nnodes, max: 3, when: {cluster.device: cpuu}}]",
    "a value that never is": "rules: [{key: train.train_iters, allowed: ['three']}]",
    "no expression": "rules: [{key: run.group, matches: '['}]",
    "no rules": "contact: x",
    "a list": "[]",
    "no YAML": "{",
    "nothing": "",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_policy_passes_nothing(held: Path, text: str) -> None:
    Path("policy.yaml").write_text(f"policy_version: 1\n{text}\n" if text[:1] not in "[{" and text else text)
    codes = {code for code, _ in found()}

    assert "POL100" in codes
    assert all(problem.span.file == "policy.yaml" for problem in policy_of("policy.yaml").problems)


def test_a_policy_that_cannot_be_read_passes_nothing(held: Path) -> None:
    Path("policy.yaml").mkdir()

    assert [code for code, _ in found()] == ["POL100"]


def test_a_policy_that_is_named_and_not_there_is_an_error(held: Path) -> None:
    result = dfmspec("validate", "target=dfm", "-")

    assert result.returncode == 2
    assert "DFMSPEC_POLICY: policy.yaml is not there" in result.stderr


def test_no_comment_option_or_baseline_switches_it_off(held: Path) -> None:
    write(
        held, {"key": "cluster.nnodes", "max": 1, "severity": "warning"}, {"key": "launcher.account", "required": True}
    )
    Path("s.yaml").write_text(
        "# dfmspec: ignore-file[POL101, POL103] mine\ncluster: {nnodes: 2}  # dfmspec: ignore[POL101] mine\n"
    )
    entries = [{"file": "s.yaml", "finding": "POL103:launcher.account", "count": 9}]
    Path("base.json").write_text(json.dumps({"schema_version": 1, "findings": entries}))
    options = (["--ignore", "POL"], ["--select", "BAT"], ["--baseline", "base.json"], ["--write-baseline", "new.json"])
    for option in options:
        result = dfmspec("validate", "--check", "spec", "--format", "json", "s.yaml", *option)
        codes = [each["code"] for each in json.loads(result.stdout)["findings"] if each["suppressed"] is None]
        assert result.returncode == 1
        assert {"POL101", "POL103"} <= set(codes)
    assert "POL" not in Path("new.json").read_text()


def test_a_run_of_a_spec_or_of_a_bundle_is_refused(held: Path) -> None:
    write(held, {"key": "launcher.account", "required": True}, {"key": "checkpoint.save_interval", "max": 10})
    Path("s.yaml").write_text("data: {source: mock}\ncluster: {device: cpu, nproc_per_node: 1}\n")
    planned = dfmspec("plan", "s.yaml", "-o", "b", DFMSPEC_POLICY="")
    spec = dfmspec("run", "s.yaml")
    bundle = dfmspec("run", "b")

    assert planned.returncode == 0
    for result in (spec, bundle):
        assert result.returncode == 1
        assert "launcher.account must be set" in result.stderr
        assert "checkpoint.save_interval is 1000, and may be at most 10" in result.stderr
    assert "the plan of s.yaml is not allowed here; nothing was started" in bundle.stderr


def test_its_own_tests_are_run(held: Path) -> None:
    rules = ({"key": "cluster.nnodes", "max": 4}, {"key": "launcher.account", "required": True})
    tests = [
        {"name": "large", "overrides": ["cluster.nnodes=5", "launcher.account=x"], "finds": ["cluster.nnodes"]},
        {"name": "small", "spec": {"cluster": {"nnodes": 2}}, "finds": []},
    ]
    write(held, *rules, tests=tests)
    wrong = dfmspec("policy", "test")
    write(held, *rules, tests=tests[:1])
    right = dfmspec("policy", "test", "policy.yaml")

    assert wrong.returncode == 1
    assert "policy.yaml: small: something is found at launcher.account" in wrong.stdout
    assert (right.returncode, right.stdout) == (0, "policy.yaml: large: as it should be\n")
    assert "no test breaks this: launcher.account required (error)" in right.stderr


def test_the_rules_are_listed(held: Path) -> None:
    write(held, {"key": ["cluster.nnodes", "cluster.gpus"], "max": 4, "when": {"launcher.kind": "slurm"}})

    assert dfmspec("policy", "show").stdout.splitlines()[1:] == [
        "  cluster.nnodes max 4 when launcher.kind is slurm (error)",
        "  cluster.gpus max 4 when launcher.kind is slurm (error)",
    ]


def test_the_default_site_is_where_platformdirs_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SITE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CONFIG_DIRS", raising=False)

    assert site_folder() == Path("/etc/xdg/dfmspec")
