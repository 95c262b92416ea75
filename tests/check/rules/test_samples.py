"""What the rules say of samples, where the trainer says it too."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfmspec.check.rules import LEVELS, check_spec
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.plan.plan import make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.run.request import _config_at_launch
from tests.data.faulty import CONTAINERS
from tests.data.test_shards import whole, written

LATENT = torch.randn(16, 1, 8, 8)
TEXT = torch.randn(5, 1024)


def dataset(folder: Path, latent: Tensor = LATENT, text: Tensor = TEXT, exclude: str = "[]") -> Path:
    """A prepared dataset of two shards, four samples each."""
    files = {"pth": CONTAINERS["zip"](latent), "pickle": pickle.dumps(text), "json": b"{}"}
    for name in ("a.tar", "val.tar"):
        written(folder / name, *whole("0", "1", "2", "3"), files=files)
        (folder / name).with_suffix(".tar.idx").write_bytes(bytes(5 * 8))
    metadata = folder / ".nv-meta"
    metadata.mkdir()
    (metadata / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    (metadata / ".info.json").write_text(json.dumps({"shard_counts": {"a.tar": 4, "val.tar": 4}}))
    (metadata / "split.yaml").write_text(f"split_parts: {{train: [a.tar], val: [val.tar]}}\nexclude: {exclude}\n")
    return folder


def found(folder: Path, *words: str) -> dict[str, Diagnostic]:
    """The findings of a dataset, by code."""
    spec = load_spec(None, (f"dataset.path={folder}", "cluster.device=cpu", "recipe=dit_tiny", *words))
    return {finding.code: finding for finding in check_spec(resolve_spec(spec), levels=LEVELS)}


def test_a_dataset_that_trains_has_no_finding(tmp_path: Path) -> None:
    few = ("dataset.task_encoder_seq_length=64", "data.num_streams=1", "cluster.nproc_per_node=1")

    assert not [code for code in found(dataset(tmp_path / "data"), *few) if code.startswith("DAT")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("part", "code"), [("latent", "DAT204"), ("text", "DAT205")])
def test_values_that_are_not_finite_are_an_error_in_either_part(
    part: str, code: str, value: float, tmp_path: Path
) -> None:
    tensor = {"latent": LATENT, "text": TEXT}[part].clone()
    tensor.view(-1)[3] = value
    finding = found(dataset(tmp_path / "data", **{part: tensor}))[code]

    assert finding.severity is Severity.ERROR
    assert "not finite" in finding.message


def test_a_text_longer_than_any_of_t5_is_a_warning(tmp_path: Path) -> None:
    finding = found(dataset(tmp_path / "data", text=TEXT[:1].bfloat16().expand(100_000, 1024)))["DAT205"]

    assert finding.severity is Severity.WARNING
    assert "texts of up to 100000 tokens" in finding.message


def test_frames_that_are_no_whole_number_of_patches_are_an_error(tmp_path: Path) -> None:
    video = torch.randn(16, 3, 8, 8)
    finding = found(dataset(tmp_path / "data", latent=video), "model.patch_temporal=2")["DAT204"]

    assert "latents of 3 x 8 x 8, no whole number of 2 x 2 x 2 patches" in finding.message


def test_values_that_only_dfm_leaves_out_are_an_error_for_it_alone(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", latent=LATENT * 1e5)

    assert found(folder)["DAT204"].severity is Severity.WARNING
    assert found(folder, "target=dfm", "cluster.device=cuda")["DAT204"].severity is Severity.ERROR


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("[a.tar]", "the train split of {} is empty (what its split.yaml excludes is not counted: train 0, val 4)"),
        ("['a.tar/{0..3}']", "the train split of {} is empty"),
        ("[a.tar/2]", "4 streams share the 3 samples of split train of {}"),
    ],
)
def test_a_split_is_what_its_excludes_leave(exclude: str, message: str, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", exclude=exclude)

    assert message.format(folder) in found(folder, "data.num_streams=4")["DAT104"].message


def test_a_stream_whose_samples_are_all_excluded_is_an_error(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", exclude="['a.tar/{0..1}']")

    assert "1 of the 2 streams of split train" in found(folder, "data.num_streams=2")["DAT104"].message
    assert "DAT104" not in found(folder, "data.num_streams=1")


def test_an_excluded_shard_need_not_be_there(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", exclude="[a.tar]")
    (folder / "a.tar").unlink()

    assert "DAT105" not in found(folder)


def test_shards_by_way_of_links_are_there_and_are_looked_into(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", text=TEXT * math.nan)
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.tar", "a.tar.idx"):
        (folder / name).rename(tmp_path / "elsewhere" / name)
    (folder / "part0").symlink_to("../elsewhere")
    metadata = folder / ".nv-meta"
    for file in (metadata / ".info.json", metadata / "split.yaml"):
        file.write_text(file.read_text().replace("a.tar", "part0/a.tar"))
    (folder / "val.tar").rename(tmp_path / "own.tar")
    (folder / "val.tar").symlink_to(tmp_path / "own.tar")
    findings = found(folder)

    assert "DAT105" not in findings
    assert "8 of 8 samples that were read" in findings["DAT205"].message
    assert "of part0/a.tar" in findings["DAT205"].message


def test_an_address_that_energon_reads_is_in_the_runs_config_to_the_letter(tmp_path: Path) -> None:
    spec = tmp_path / "specs" / "spec.yaml"
    spec.parent.mkdir()
    spec.write_text("dataset: {path: msc://profile/butterflies}\n")
    plan = make_plan(resolve_spec(load_spec(str(spec))))

    assert _config_at_launch(plan)["dataset"]["path"] == "msc://profile/butterflies"
