"""The how-to, command by command: each works as written, with a tiny recipe and few iterations appended."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfmspec.record import checkpoints
from tests.conftest import HOWTO, dfmspec
from tests.trainer.training import SHORT, finish, pair, place, start


def run(cwd: Path, *words: str, processes: int = 2) -> str:
    code, out, err = finish(start(cwd, *words, *SHORT, "train.train_iters=2", processes=processes))
    assert code == 0, (out[-2000:], err[-3000:])
    return out


def test_step_2_defaults_with_dataset_path(dataset: Path, tmp_path: Path) -> None:
    out = run(tmp_path, "--dataset-path", str(dataset))

    expected = [
        r"\[INFO\] Megatron-Bridge DiT Pretraining Script with YAML & CLI Overrides",
        r"\[INFO\] Loaded base configuration",
        r"\[INFO\] Starting pretraining\.\.\.",
        r"\[INFO\] Iteration +1/2, Loss: \d\.\d{3}, LR: [\d.e-]+",
        r"\[INFO\] Iteration +2/2, Loss: \d\.\d{3}",
        r"\[INFO\] Checkpoint saved: .*/checkpoints/dit_butterfly/iter_0000002/",
    ]
    lines = iter(out.splitlines())
    for pattern in expected:
        assert any(re.match(pattern, line) for line in lines), (pattern, out)
    folder = tmp_path / "checkpoints" / "dit_butterfly"
    assert (folder / "iter_0000002").is_dir()
    assert (folder / checkpoints.TRACKER).read_text().strip() == "2"
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))


@pytest.fixture
def howto_yaml(tmp_path: Path) -> Path:
    """The how-to's own file, with its placeholder folder made real."""
    path = place(tmp_path) / "dit_butterfly_config.yaml"
    path.write_text(HOWTO.read_text().replace("/path/to/checkpoints/dit_butterfly/", str(tmp_path / "ckpt")))
    return path


def test_step_3_the_yaml_file_and_then_the_command_line_win(dataset: Path, howto_yaml: Path, tmp_path: Path) -> None:
    words = ["--config-file", howto_yaml.name, "--dataset-path", str(dataset)]
    run(tmp_path, *words, "train.global_batch_size=4")
    first = (checkpoints.committed(tmp_path / "ckpt")[0] / "manifest.json").read_text()

    assert '"tensor_model_parallel_size": 2' in first
    assert '"lr": 0.0001' in first
    assert '"micro_batch_size": 2' in first
    assert '"global_batch_size": 4' in first  # 64 in the file


def test_step_3_the_command_line_overrides_the_files_parallelism(
    dataset: Path, howto_yaml: Path, tmp_path: Path
) -> None:
    run(
        tmp_path,
        "--config-file",
        howto_yaml.name,
        "--dataset-path",
        str(dataset),
        "model.tensor_model_parallel_size=1",
        "train.global_batch_size=8",
    )

    assert (
        '"tensor_model_parallel_size": 1' in (checkpoints.committed(tmp_path / "ckpt")[0] / "manifest.json").read_text()
    )


def test_multi_node_the_pair_of_commands(dataset: Path, tmp_path: Path) -> None:
    """Two torchruns on loopback, one process each, with the how-to's flags."""
    first, second = pair(tmp_path, "--dataset-path", str(dataset), *SHORT, "train.train_iters=2", processes=1)

    assert "Iteration 2/2" in first
    assert "Iteration" not in second


def test_resume_from_a_checkpoint_folder(dataset: Path, tmp_path: Path) -> None:
    run(tmp_path, "--dataset-path", str(dataset), processes=1)
    folder = tmp_path / "checkpoints" / "dit_butterfly"
    words = [
        "--dataset-path",
        str(dataset),
        f"checkpoint.load_checkpoint={folder}/iter_2/",
        *SHORT,
        "train.train_iters=3",
    ]
    code, out, err = finish(start(tmp_path, *words, processes=1))

    assert code == 0, err[-2000:]
    assert "Resumed from iteration 2" in out
    assert "Iteration 3/3" in out
    assert "Iteration 1/3" not in out


def test_a_checkpoint_that_is_not_there_names_those_that_are(dataset: Path, tmp_path: Path) -> None:
    words = ["--dataset-path", str(dataset), "checkpoint.load_checkpoint=/nonexistent/iter_5000/", *SHORT]
    code, out, _ = finish(start(tmp_path, *words, processes=0))

    assert code == 1
    assert "checkpoint folder /nonexistent does not exist" in out
    assert "CKP104" in out


@pytest.mark.parametrize(
    "words",
    [
        ["train.micro_batch_size=1", "train.global_batch_size=32"],
        ["model.tensor_model_parallel_size=2"],
        ["optimizer.lr=0.0001"],
    ],
)
def test_troubleshooting_the_commands_are_accepted(words: list[str], dataset: Path) -> None:
    assert dfmspec("plan", HOWTO, "--dataset-path", dataset, "cluster.nproc_per_node=4", *words).returncode == 0


def test_mock_needs_no_dataset_and_nothing_at_all_says_so(tmp_path: Path) -> None:
    assert "Iteration 2/2" in run(tmp_path, "--mock", processes=0)
    code, out, _ = finish(start(tmp_path / "b", *SHORT, processes=0))

    assert code == 2
    assert "give --dataset-path, or --mock" in out


def test_the_how_tos_sample_check_works(dataset: Path) -> None:
    """Its one-liner, as written, beside the data set."""
    code = "import webdataset as wds; print(next(iter(wds.WebDataset('butterfly_webdataset/rank0-000000.tar'))))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=dataset.parent, capture_output=True, text=True, timeout=120, check=True
    )

    assert "'pickle': " in result.stdout
    assert "'pth': " in result.stdout
