"""What a hostile folder, file or locale may not do, and what may not hide a finding: each was once possible."""

from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from dfmspec.data.shards import scan
from dfmspec.data.tensors import read_tensor
from dfmspec.errors import DataError
from tests.conftest import ROOT, dfmspec

BAD = "cluster: {nproc_per_node: 8}\nmodel:\n  tensor_model_parallel_size: 3\n"


def test_the_working_directory_is_never_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "spec.yaml").write_text(
        "data: {source: mock}\nrecipe: dit_tiny\ncluster: {nproc_per_node: 1, device: cpu}\n"
    )
    (tmp_path / "empty").mkdir()
    script = Path(sys.executable).parent / "dfmspec"
    for words in (["validate", "spec.yaml", "--check", "spec,deep"], ["data", "inspect", "empty"]):
        subprocess.run([script, *words], cwd=tmp_path, capture_output=True, check=False, timeout=120)

    assert not (tmp_path / "ran").exists()


def test_the_action_reads_words_over_several_lines_and_runs_nothing_of_the_checkout(tmp_path: Path) -> None:
    steps = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]
    (tmp_path / "a.yaml").write_text("data: {source: mock}\n")
    (tmp_path / "b.yaml").write_text(BAD)
    (tmp_path / "pip.py").write_text("raise SystemExit('the checkout ran')\n")
    env = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "SPECS": "a.yaml\nb.yaml\n",
        "ARGUMENTS": "",
        "CHECK": "spec",
        "SARIF": "",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", steps[-1]["run"]], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1, done.stderr
    assert "::error file=b.yaml" in done.stdout, done.stderr
    assert steps[1]["run"].startswith("python -P -m pip")


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 40000 + "]" * 40000,
        "- " * 60000,
        'launcher: {env: {"+1": 3}}',
        'launcher: {env: {"²": x, "00": 3}}',
        "checkpoint: {load_checkpoint: iter_²}",
        "name: 'a\\n::stop-commands::x'",
        "model: {num_layers: !!python/name:os.system x}",
    ],
    ids=["brackets", "dashes", "plus-one", "superscript", "iter", "control", "tag"],
)
def test_no_file_ends_the_program(tmp_path: Path, text: str) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    result = dfmspec("validate", "spec.yaml", "--check", "spec", "--format", "concise", cwd=tmp_path)

    assert result.returncode in (0, 1)
    assert "internal error" not in result.stderr
    assert not any(line.startswith("::") or "\x1b" in line for line in result.stdout.splitlines())


def test_nothing_hides_an_error_of_reading(tmp_path: Path) -> None:
    file, baseline = tmp_path / "broken.yaml", tmp_path / "base.json"
    file.write_text("model: [\n")

    assert dfmspec("validate", file, "--select", "PAR").returncode == 1
    assert dfmspec("validate", file, "--ignore", "SPC").returncode == 1
    assert dfmspec("validate", file, "--write-baseline", baseline).returncode == 1
    assert dfmspec("validate", file, "--baseline", baseline).returncode == 1


def test_a_file_that_cannot_be_read_hides_no_findings_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    result = dfmspec("validate", "missing.yaml", "bad.yaml", "x" * 300 + ".yaml", "--format", "concise", cwd=tmp_path)

    assert result.returncode == 2
    assert "PAR101" in result.stdout
    assert "missing.yaml cannot be read" in result.stderr
    assert "PAR101" in dfmspec("validate", tmp_path, "--format", "concise").stdout


@pytest.mark.parametrize(
    "text",
    [
        "dataset: {path: ~nobody_of_that_name/x}",
        "run: {resume: ~nobody_of_that_name/y}",
        f"dataset: {{path: {'x' * 5000}}}",
        f"target: dfm\ncheckpoint: {{save: {'x' * 5000}}}",
        'dataset: {path: "a\\0b"}',
        f"run: {{resume: {'x' * 5000}}}",
    ],
)
def test_a_path_that_cannot_be_looked_at_is_one_finding_and_hides_no_other_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text(BAD)
    result = dfmspec("validate", "a.yaml", "b.yaml", "--check", "spec,paths,data", "--format", "concise", cwd=tmp_path)

    assert result.returncode == 1
    assert result.stderr == ""
    assert "b.yaml:3:3: error" in result.stdout
    assert re.search(r"^a.yaml:\d:\d+: error: .*(RUN122|RUN103|DAT102)", result.stdout, re.MULTILINE)
    assert result.stdout.count("cannot be looked at:") <= 1
    assert "internal error" not in dfmspec("plan", "a.yaml", cwd=tmp_path).stderr


def test_quiet_changes_what_is_shown_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("data: {source: mock}\ntrain: {train_iters: 5}\nscheduler: {lr_decay_iters: 9}\n")
    result = dfmspec(
        "validate", "w.yaml", "-q", "--fail-on", "warning", "--report", "json=out.json", "--check", "spec", cwd=tmp_path
    )

    assert result.returncode == 1
    assert result.stdout == ""
    assert any(finding["code"] == "SPC301" for finding in json.loads((tmp_path / "out.json").read_text())["findings"])


def test_a_report_never_overwrites_a_spec_and_never_hides_the_findings(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(BAD)
    onto_itself = dfmspec("validate", spec, "--report", f"sarif={spec}")
    onto_a_folder = dfmspec("validate", spec, "--report", f"json={tmp_path}", "--format", "concise")

    assert onto_itself.returncode == 2
    assert spec.read_text() == BAD
    assert "PAR101" in onto_a_folder.stdout
    assert "\x1b" not in (
        dfmspec("validate", spec, "--report", f"full={tmp_path / 'r.txt'}", FORCE_COLOR="1")
        and (tmp_path / "r.txt").read_text()
    )


def test_a_shared_base_is_reported_once_and_whole_files_suppress_their_own_absences(tmp_path: Path) -> None:
    (tmp_path / "base.yml.txt").write_text("model: {typo: 1}\n")
    for number in range(5):
        (tmp_path / f"{number}.yaml").write_text(
            "extends: base.yml.txt\n# dfmspec: ignore-file[DAT101, RUN101] a template\n"
        )
    result = dfmspec("validate", tmp_path, "--check", "spec", "--format", "concise")

    assert result.stdout.count("SPC201") == 1
    assert "DAT101" not in result.stdout
    assert "SPC401" not in result.stdout


def test_fix_keeps_marks_endings_and_letters_in_any_locale(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_bytes(b"\xef\xbb\xbf# \xc3\xa4\r\ncheckpoint:\r\n  load_checkpoint: a/iter_5\r\n")
    result = dfmspec("fix", file, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")

    assert result.returncode == 1, result.stderr  # there is no such checkpoint
    assert file.read_bytes() == b"\xef\xbb\xbf# \xc3\xa4\r\ncheckpoint:\r\n  load: a\r\n  ckpt_step: 5\r\n"
    assert list(tmp_path.iterdir()) == [file]
    assert "1 error left" in dfmspec("fix", file).stderr
    file.write_text("target: dfm\nmodel: {recompute_modules: '5'}\n")
    assert "1 error left" in dfmspec("fix", file).stderr


def test_fix_does_not_write_an_override_into_the_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("train: {train_iters: 500}\nscheduler: {lr_decay_iters: 500}\n")

    assert dfmspec("fix", "--diff", file, "train.train_iters=77").returncode == 0


def imported(text: str) -> dict:
    """What a spec has besides the lines that every imported one begins with."""
    data = yaml.safe_load(text)
    assert text.startswith("# yaml-language-server: $schema=https://dfmspec.dev/schemas/")
    assert data.pop("spec_version") == 1
    assert data.pop("recipe") in ("dit_xl", "wan_1_3b", "flux_schnell")
    return data


@pytest.mark.parametrize(
    ("words", "kept", "left_out"),
    [
        (
            "WANDB_API_KEY=abc NCCL_DEBUG=INFO torchrun pretrain_dit_model.py",
            {"launcher": {"env": {"NCCL_DEBUG": "INFO"}}},
            "WANDB_API_KEY",
        ),
        (
            "export A=1 && env B=2 torchrun --nproc_per_node=`n` pretrain_dit_model.py > log 2>&1",
            {"launcher": {"env": {"A": 1, "B": 2}}},
            "nproc_per_node",
        ),
        (
            "torchrun --nproc_per_node=gpu pretrain_dit_model.py --dataset-path $DATA train.train_iters=$N",
            {},
            "dataset.path=$DATA",
        ),
        (
            "torchrun pretrain_dit_model.py mixed_precision=bf16_mixed mixed_precision.grad_reduce_in_fp32=true",
            {"mixed_precision": {"recipe": "bf16_mixed", "grad_reduce_in_fp32": True}},
            "",
        ),
        (
            "torchrun pretrain_dit_model.py " + " ".join(f"model.num_layers={n}" for n in range(30, 60)),
            {"model": {"num_layers": 59}},
            "",
        ),
        ("torchrun pretrain_dit_model.py '+a=1\nmodel: {num_layers: 1}'", {}, "+a=1"),
    ],
)
def test_import_leaves_out_what_it_cannot_know_and_says_so(words: str, kept: dict, left_out: str) -> None:
    result = dfmspec("import", words)
    data = imported(result.stdout)
    if "launcher" in data:
        data["launcher"]["env"] = {
            name: yaml.safe_load(value) if isinstance(value, str) else value
            for name, value in data["launcher"]["env"].items()
        }

    assert result.returncode == 0, result.stderr
    assert data == {"target": "dfm"} | kept
    assert left_out in result.stderr
    assert "abc" not in result.stdout


@pytest.mark.parametrize(
    ("command", "data", "left_out"),
    [
        (
            "torchrun examples/megatron/recipes/wan/pretrain_wan.py --training-mode pretrain --mock",
            {"target": "dfm_wan", "data": {"source": "mock"}},
            [],
        ),
        ("torchrun pretrain_wan.py", {"target": "dfm_wan"}, []),
        ("torchrun pretrain_wan.py --training-mode=finetune", {"target": "dfm_wan"}, ["--training-mode=finetune"]),
        (
            "torchrun pretrain_flux.py --guidance-scale 4 --flow-shift 2 --use-loss-weighting train.train_iters=9",
            {"target": "dfm_flux", "model": {"guidance_scale": 4}, "train": {"train_iters": 9}},
            ["--flow-shift 2", "--use-loss-weighting", "flux_pretrain_override_example"],
        ),
        (
            (
                "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint head:29400 --rdzv_id=7 --max-restarts 3 "
                "pretrain_dit_model.py"
            ),
            {
                "target": "dfm",
                "cluster": {"nnodes": 2, "master_addr": "head", "master_port": 29400},
                "launcher": {"rendezvous": "c10d"},
            },
            ["--max-restarts 3", "--rdzv-id 7"],
        ),
        (
            "torchrun --rdzv-backend etcd --rdzv-endpoint $HEAD:1234 pretrain_dit_model.py",
            {"target": "dfm", "cluster": {"master_port": 1234}},
            ["etcd", "$HEAD"],
        ),
    ],
)
def test_import_takes_the_target_from_the_script_and_loses_no_word_in_silence(
    command: str, data: dict, left_out: list[str]
) -> None:
    result = dfmspec("import", command)

    assert result.returncode == 0, result.stderr
    assert imported(result.stdout) == data, result.stderr
    assert all(word in result.stderr for word in left_out), result.stderr
    assert left_out or result.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["torchrun inference_dit_model.py"],
        ["torchrun train.py"],
        ["torchrun pretrain_wan.py", "--target", "dfm"],
        ["torchrun inference_wan.py", "--target", "dfm_wan"],
    ],
)
def test_a_script_that_does_not_train_what_is_asked_is_refused(words: list[str]) -> None:
    assert dfmspec("import", *words).returncode == 2
    assert (
        yaml.safe_load(dfmspec("import", "torchrun my_copy.py --mock", "--target", "megatron_core").stdout)["target"]
        == "megatron_core"
    )


def test_a_shell_script_with_one_command_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "run.sh"
    file.write_text(
        "#!/bin/bash\n# torchrun old.py\nset -e\nexport NCCL_DEBUG=INFO\npython -m pip list\n"
        "torchrun --nproc-per-node 8 \\\n  pretrain_wan.py --mock \\\n  train.train_iters=5\n"
    )

    assert imported(dfmspec("import", file).stdout) == {
        "target": "dfm_wan",
        "cluster": {"nproc_per_node": 8},
        "data": {"source": "mock"},
        "train": {"train_iters": 5},
        "launcher": {"env": {"NCCL_DEBUG": "INFO"}},
    }
    file.write_text("echo hello\n")
    assert dfmspec("import", file).returncode == 2
    assert "0 commands" in dfmspec("import", file).stderr


def test_an_unquoted_command_and_a_missing_file_are_understood(tmp_path: Path) -> None:
    assert "nproc_per_node: 8" in dfmspec("import", "torchrun", "--nproc-per-node", "8", "pretrain_dit_model.py").stdout
    assert "cannot be read" in dfmspec("import", tmp_path / "no.yaml").stderr


def test_imported_paths_are_relative_to_the_spec_that_is_written(tmp_path: Path) -> None:
    dfmspec("import", "torchrun pretrain_dit_model.py --dataset-path data/x", "-o", "specs/new.yaml", cwd=tmp_path)
    dfmspec("init", "specs/init.yaml", "--dataset-path", "data/a\\b", cwd=tmp_path)

    assert yaml.safe_load((tmp_path / "specs" / "new.yaml").read_text())["dataset"]["path"] == "../data/x"
    assert yaml.safe_load((tmp_path / "specs" / "init.yaml").read_text())["dataset"]["path"] == "../data/a\\b"


def test_a_bomb_is_not_unpacked_and_every_shard_is_looked_at(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps(None))
        archive.writestr("x/data/0", bytes(300 * 2**20))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_tensor(bomb.getvalue(), ".pth")
    folder = tmp_path / "nested"
    folder.mkdir()
    for number in range(100):
        with tarfile.open(folder / f"{number:03}.tar", "w") as tar:
            member = tarfile.TarInfo("0.json")
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    (folder / "099.tar").write_bytes(b"garbage" * 100)

    found = scan(tmp_path)
    assert len(found.samples) == 99
    assert len(found.broken) == 1


def test_tensors_of_every_way_to_save_them_are_read() -> None:
    import numpy as np
    import torch

    values = torch.randn(16, 1, 8, 8)
    old = io.BytesIO()
    torch.save(values, old, _use_new_zipfile_serialization=False)
    parameter = io.BytesIO()
    torch.save(torch.nn.Parameter(values), parameter)
    arrays = [
        pickle.dumps(values.numpy().astype(order), protocol=protocol)
        for order in ("<f4", ">f4")
        for protocol in (2, 4, 5)
    ]
    for data in (old.getvalue(), parameter.getvalue(), pickle.dumps(values), pickle.dumps(values.bfloat16()), *arrays):
        found = read_tensor(data, ".pth")
        assert found.shape == (16, 1, 8, 8)
        assert found.mean_square == pytest.approx(float((values.double() ** 2).mean()), rel=2e-2)
    expanded = io.BytesIO()
    torch.save(torch.ones(1, 4).expand(3, 4), expanded)
    assert read_tensor(expanded.getvalue(), ".pth").shape == (3, 4)
    assert np.isfinite(found.largest)


FEW = 100_000
"""Bytes that are enough for what is said of any hostile spec with one fault."""


@pytest.mark.parametrize("command", ["validate", "plan", "run", "fix", "import"])
@pytest.mark.parametrize("name", ["zero.yaml", "tower.yaml", "large.yaml", "deep.yaml"])
def test_a_spec_without_end_ends_every_command_with_one_error(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    tower = ["m0: &m0 {x: 1}", *(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 40))]
    (tmp_path / "tower.yaml").write_text("\n".join(tower))
    (tmp_path / "large.yaml").write_text("a: [" + "1, " * 3_000_000 + "]")
    (tmp_path / "deep.yaml").write_text("- " * 100_000)
    result = dfmspec(command, name, cwd=tmp_path)
    said = result.stdout + result.stderr

    assert command == "fix" or result.returncode in (1, 2)
    assert "error" in said
    assert "internal error" not in said
    assert len(said) < FEW


def test_the_lines_of_a_report_are_as_wide_as_a_terminal_whatever_the_spec_has(tmp_path: Path) -> None:
    entries = ", ".join(f"num_layer{number}: {number}" for number in range(3000))
    (tmp_path / "spec.yaml").write_text(f"model: {{{entries}}}")
    result = dfmspec("validate", "spec.yaml", cwd=tmp_path)

    assert "3000 errors" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 1000
    assert len(result.stdout) < 3000 * 1000


def test_import_takes_no_key_that_is_no_text_and_no_list_that_holds_itself(tmp_path: Path) -> None:
    (tmp_path / "number.yaml").write_text("1: {a: 2}\nmodel: {num_layers: 3}\n")
    (tmp_path / "itself.yaml").write_text("model: &a [*a]\n")
    number = dfmspec("import", "number.yaml", cwd=tmp_path)

    assert imported(number.stdout) == {"target": "dfm", "model": {"num_layers": 3}}
    assert "left out: 1: ..." in number.stderr
    assert dfmspec("import", "itself.yaml", cwd=tmp_path).returncode == 2
