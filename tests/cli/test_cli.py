"""The command line: help, formats, exit codes, streams."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfmspec.check.rules import check_spec
from dfmspec.read.document import parse_document
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from tests.conftest import HOWTO, ROOT, dfmspec

COMMANDS = ["validate", "plan", "run", "runs", "show", "sample", "schema", "data prepare", "data inspect"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_says_what_it_does(command: str) -> None:
    result = dfmspec(*command.split(), "--help")

    assert result.returncode == 0
    assert "Usage:" in result.stdout
    assert len(result.stdout.splitlines()) > 8


def test_our_own_specs_are_silent() -> None:
    result = dfmspec("validate", *sorted((ROOT / "specs").glob("*.yaml")))

    assert (result.returncode, result.stdout) == (0, "")
    assert re.search(r"no findings \(\d+ rules\)$", result.stderr.strip())


def test_the_how_tos_yaml_for_dfm_is_told_what_upstream_would_do() -> None:
    result = dfmspec("validate", HOWTO, "target=dfm", "cluster.nproc_per_node=2", "--format", "json")
    found = {finding["code"]: finding for finding in json.loads(result.stdout)["findings"]}

    assert result.returncode == 1
    assert found["CKP101"]["severity"] == "hint"
    assert found["CKP101"]["line"] == 21
    assert found["BAT102"]["severity"] == "error"
    assert found["BAT102"]["line"] == 10
    assert found["OPT103"]["severity"] == "warning"
    assert found["OPT103"]["line"] == 16


def test_the_how_tos_yaml_is_accepted_for_our_trainer() -> None:
    assert dfmspec("plan", HOWTO).returncode == 0
    # Its folder for checkpoints is one that nobody has.
    told = dfmspec("validate", HOWTO)
    assert (told.returncode, told.stdout.count("error:")) == (1, 1)
    assert "/path/to/checkpoints/dit_butterfly/ looks like a placeholder" in told.stdout
    assert dfmspec("validate", HOWTO, "checkpoint.save=checkpoints").returncode == 0
    assert dfmspec("run", HOWTO, "checkpoint.save=checkpoints", "--dry-run").returncode == 0


def test_a_finding_shows_the_line_and_a_caret(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("model:\n  num_layer: 3\n")
    result = dfmspec("validate", path, "cluster.nproc_per_node=1", "data.source=mock")

    assert f"{path}:2:3: error: unknown key model.num_layer [SPC201 unknown-key]" in result.stdout
    assert "  2 |   num_layer: 3\n    |   ^^^^^^^^^\n  help: did you mean model.num_layers?" in result.stdout
    assert result.returncode == 1


@pytest.mark.parametrize("form", ["full", "concise", "json", "github"])
def test_each_format_carries_each_finding(form: str) -> None:
    result = dfmspec("validate", HOWTO, "target=dfm", "--format", form, "--hints")

    assert all(code in result.stdout for code in ("CKP101", "BAT102", "OPT103"))
    assert "\x1b[" not in result.stdout


def test_github_annotations_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a,b.yaml"
    path.write_text("model: {num_layers: 50%}\n")

    assert "file=" + str(path).replace(",", "%2C") in dfmspec("validate", path, "--format", "github").stdout


@pytest.mark.parametrize(
    "words",
    [
        ["validate"],
        ["validate", "nowhere.yaml"],
        ["plan", str(HOWTO), "novalue="],
        ["validate", str(HOWTO), "--format", "xml"],
        ["validate", str(HOWTO), "--check", "all"],
        ["schema", "nothing"],
        ["nonsense"],
        ["plan", str(HOWTO), "--node", "9", "--format", "sh"],
    ],
)
def test_wrong_usage_exits_with_2_or_findings_and_without_a_traceback(words: list[str]) -> None:
    result = dfmspec(*words)

    assert result.returncode in (1, 2)
    assert result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["experiment", "megatron_core", "dfm", "manifest"])
def test_schemas_are_valid_schemas(name: str) -> None:
    schema = json.loads(dfmspec("schema", name).stdout)

    jsonschema.validators.validator_for(schema).check_schema(schema)


def test_the_editors_schema_agrees_on_our_specs() -> None:
    schema = jsonschema.Draft7Validator(json.loads((ROOT / "schemas" / "experiment.schema.json").read_text()))
    for path in (ROOT / "specs").glob("*.yaml"):
        assert list(schema.iter_errors(yaml.safe_load(path.read_text()))) == []
    assert list(schema.iter_errors({"model": {"num_layer": 3}}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8)
            | st.sampled_from(["model", "train", "extends", "num_layers", "checkpoint", "load_checkpoint"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.one_of(st.binary(max_size=80), JSON.map(lambda tree: yaml.safe_dump(tree).encode())))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_document_whose_places_lie_in_the_text(raw: bytes) -> None:
    document = parse_document(raw, "spec.yaml")
    lines = document.text.count("\n") + 2

    assert all(1 <= span.line <= lines and span.column >= 1 for span in document.values.values())


@given(
    JSON,
    st.lists(
        st.sampled_from(
            [
                "model.num_layers=3",
                "target=dfm",
                "a=b",
                "model=3",
                "model.x.y=1",
                "train.train_iters=[1",
                "recipe=1",
                "checkpoint.load_checkpoint=3",
                "model.tensor_model_parallel_size=0",
            ]
        ),
        max_size=3,
    ),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_and_overrides_give_findings_and_never_an_exception(
    tmp_path: Path, tree: object, overrides: list[str]
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(tree))
    resolved = resolve_spec(load_spec(path, overrides))

    assert all(finding.message and finding.code for finding in check_spec(resolved))
