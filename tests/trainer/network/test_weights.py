"""Weights in one file: out of a checkpoint, into a run, and to and from NVIDIA DFM's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dfmspec.trainer.network.weights import from_dfm, to_dfm
from tests.conftest import dfmspec
from tests.trainer.training import losses, train

LAYERS, HIDDEN, RANK, TEXT, HEAD, PATCH = 2, 288, 16, 1024, 72, 64


def dfms() -> dict[str, torch.Tensor]:
    """A random state dict of DFM's DiT: names and shapes that its modules declare (dit_model.py, dit_layer_spec.py)."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (HIDDEN, PATCH),
        "x_embedder.bias": (HIDDEN,),
        "final_layer_linear.weight": (PATCH, HIDDEN),
        "final_layer_linear.bias": (PATCH,),
        "affline_norm.weight": (HIDDEN,),
    }
    for embedder, width in (("t_embedder", HIDDEN), ("fps_embedder", 256)):
        shapes |= {
            f"{embedder}.1.linear_{i}.{kind}": (width, width)[: 2 if kind == "weight" else 1]
            for i in (1, 2)
            for kind in ("weight", "bias")
        }
    for layer in range(LAYERS):
        at = f"decoder.layers.{layer}."
        shapes |= {
            f"{at}full_self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
            f"{at}full_self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
            f"{at}cross_attention.linear_q.weight": (HIDDEN, HIDDEN),
            f"{at}cross_attention.linear_kv.weight": (2 * HIDDEN, TEXT),
            f"{at}cross_attention.linear_proj.weight": (HIDDEN, HIDDEN),
            f"{at}mlp.linear_fc1.weight": (4 * HIDDEN, HIDDEN),
            f"{at}mlp.linear_fc2.weight": (HIDDEN, 4 * HIDDEN),
            f"{at}adaLN.adaLN_modulation.1.weight": (RANK, HIDDEN),
            f"{at}adaLN.adaLN_modulation.2.weight": (9 * HIDDEN, RANK),
        }
        shapes |= {
            f"{at}{part}.{norm}_layernorm.weight": (HEAD,)
            for part in ("full_self_attention", "cross_attention")
            for norm in "qk"
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_dfms_state_dict_goes_both_ways() -> None:
    theirs = dfms()
    ours = from_dfm(
        {f"module.{name}": weight for name, weight in theirs.items()}
        | {"module.decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(1)}
    )
    back = to_dfm(ours)

    assert back.keys() == theirs.keys()
    assert all(back[name].shape == weight.shape for name, weight in theirs.items())
    assert from_dfm(back).keys() == ours.keys()
    for name, weight in back.items():
        if not name.startswith(("fps_embedder", "affline_norm")) and name != "t_embedder.1.linear_2.bias":
            assert torch.equal(weight, theirs[name]), name


def test_dfms_constant_frame_rate_is_part_of_our_noise_embedding() -> None:
    """What DFM adds to the embedding of every noise level, computed as diffusers does: 30 frames a second."""
    theirs = dfms()
    angles = 30.0 * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 127)
    x = torch.cat([angles.sin(), angles.cos()])
    for layer in ("linear_1", "linear_2"):
        x = F.linear(
            x, theirs[f"fps_embedder.1.{layer}.weight"].double(), theirs[f"fps_embedder.1.{layer}.bias"].double()
        )
        x = F.silu(x) if layer == "linear_1" else x
    added = from_dfm(theirs)["noise_embedding.linear_2.bias"].double() - theirs["t_embedder.1.linear_2.bias"].double()

    torch.testing.assert_close(added[:256], x, rtol=1e-4, atol=1e-4)
    assert not added[256:].any()


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(run_dir, "train.train_iters=2", f"dataset.path={dataset}", "model.hidden_size=256")
    return run_dir


WORDS = ["train.train_iters=1", "model.hidden_size=256", "data.num_streams=2", "train.global_batch_size=2"]


def start(trained: Path, dataset: Path, folder: Path, names: str, *layout: str) -> set[tuple[float, float]]:
    """Loss and gradient norm of the first iteration of a run that starts from the exported weights."""
    file = folder / f"{names}.safetensors"
    exported = dfmspec("export", trained, "--out", file, "--raw", "--names", names)
    assert (exported.returncode, exported.stdout.strip()) == (0, str(file)), exported.stderr
    said = train(
        folder / "run",
        *WORDS,
        f"dataset.path={dataset}",
        f"checkpoint.pretrained_checkpoint={file}",
        *layout,
        processes=2 if layout else 1,
    )
    assert f"Weights from {file}" in said
    return losses(folder / "run")[1]


def test_a_run_starts_from_exported_weights_of_either_naming_in_any_layout(
    trained: Path, dataset: Path, tmp_path: Path
) -> None:
    for name in ("ours", "theirs", "cut", "fresh"):
        (tmp_path / name).mkdir()
    ((loss, norm),) = start(trained, dataset, tmp_path / "ours", "dfmspec")
    train(tmp_path / "fresh" / "run", *WORDS, f"dataset.path={dataset}")

    assert start(trained, dataset, tmp_path / "theirs", "dfm") == {(loss, norm)}
    ((cut_loss, cut_norm),) = start(trained, dataset, tmp_path / "cut", "dfm", "model.tensor_model_parallel_size=2")
    assert cut_loss == pytest.approx(loss, rel=1e-6)
    assert cut_norm == pytest.approx(norm, rel=1e-5)
    assert losses(tmp_path / "fresh" / "run")[1] != {(loss, norm)}


def test_weights_of_another_network_are_an_error(dataset: Path, tmp_path: Path) -> None:
    save_file({"x_embedder.weight": torch.zeros(3, 3)}, tmp_path / "odd.safetensors")
    said = train(
        tmp_path / "run",
        "train.train_iters=1",
        f"dataset.path={dataset}",
        f"checkpoint.pretrained_checkpoint={tmp_path}/odd.safetensors",
        expect=1,
    )

    assert "is of another network: model.hidden_size is 3 there, and 64 here" in said
    assert "Traceback" not in said


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    assert dfmspec("export", tmp_path, "--out", tmp_path / "mine").returncode == 2
    assert (tmp_path / "mine").read_text() == "x"


def test_the_positions_change_places_on_the_way_to_dfm_and_back() -> None:
    """A quarter of the channels is of the time; height's and width's are in the other order there."""
    theirs = dfms()
    ours = from_dfm(theirs)
    quarter, rest = HIDDEN // 4, 3 * HIDDEN // 8
    there = theirs["x_embedder.bias"].split([quarter, rest, rest])
    here = ours["x_embedder.bias"].split([quarter, rest, rest])

    assert torch.equal(here[0], there[0])
    assert torch.equal(here[1], there[2])
    assert torch.equal(here[2], there[1])
    assert torch.equal(
        ours["final_linear.weight"][:, quarter : quarter + rest], theirs["final_layer_linear.weight"][:, -rest:]
    )


def test_a_file_that_an_earlier_version_wrote_under_dfms_names_is_read_as_it_was_meant(tmp_path: Path) -> None:
    """It has no word of the order of its positions, which is ours; DFM's own has no word of dfmspec at all."""
    from dfmspec.trainer.network.weights import DFMS_ORDER, POSITIONS, _read_ours

    theirs = dfms()
    before = {"iteration": "4", "weights": "averaged", "config_digest": "sha256:1"}
    cases = {"earlier": before, "today": before | {POSITIONS: DFMS_ORDER}, "dfm": None}
    for name, facts in cases.items():
        save_file(theirs, tmp_path / f"{name}.safetensors", metadata=facts)
    read = {name: _read_ours(tmp_path / f"{name}.safetensors") for name in cases}

    assert torch.equal(read["earlier"]["x_embedder.bias"], theirs["x_embedder.bias"])
    assert torch.equal(read["today"]["x_embedder.bias"], from_dfm(theirs)["x_embedder.bias"])
    assert torch.equal(read["dfm"]["x_embedder.bias"], from_dfm(theirs)["x_embedder.bias"])
