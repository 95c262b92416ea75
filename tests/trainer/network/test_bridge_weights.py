"""The weights of a checkpoint of NVIDIA DFM's: as its files are, damaged, into a run; and one written for it."""

from __future__ import annotations

import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfmspec.errors import CheckpointError
from dfmspec.spec.experiment import Experiment
from dfmspec.spec.model import Model
from dfmspec.trainer.commands import sample
from dfmspec.trainer.network.bridge_weights import _by_layer, read_bridge_weights
from dfmspec.trainer.network.bridge_writer import position_table, write_bridge_checkpoint
from tests.conftest import ROOT, dfmspec
from tests.trainer.network.test_weights import LAYERS, dfms
from tests.trainer.training import losses, train

RECORDED = Path(__file__).parents[2] / "record" / "bridge" / "iter_0000040" / ".metadata"
"""Of a DiT-S of four layers, from an H200."""
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As megatron-core names and shapes them in a checkpoint."""
    found: dict[str, Tensor] = {}
    layers: dict[str, list[Tensor]] = {}
    for name, weight in weights.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(f"module.decoder.layers.{match[2]}", []).append(weight)
        else:
            found[f"module.{name}"] = weight
    return found | {name: torch.stack(parts) for name, parts in layers.items()}


def checkpoint_of(weights: dict[str, Tensor], folder: Path, iteration: int = 7) -> Path:
    """A checkpoint with the files, the names and the kinds of content of a real one."""
    path = folder / f"iter_{iteration:07d}"
    content: dict[str, object] = dict(stacked(weights))
    content["module.pos_embedder.pos_embedding.weight"] = torch.zeros(16, 4)
    content["module.decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = io.BytesIO(b"not read")
    content["optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param"] = torch.zeros(8)
    dcp.save(content, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    torch.save({"iteration": iteration, "checkpoint_version": 3.0}, path / "common.pt")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (path / "run_config.yaml").write_text("model: {}\n")
    state = {"step": torch.tensor(iteration, dtype=torch.int32)}
    torch.save(state, path / "train_state.pt")
    torch.save(state, folder / "latest_train_state.pt")
    return path


def test_each_layer_has_its_own_weights_and_nothing_else_is_read(tmp_path: Path) -> None:
    theirs = {name: weight.bfloat16() for name, weight in dfms().items()}
    checkpoint_of(dfms(), tmp_path, iteration=3)
    path = checkpoint_of(theirs, tmp_path)
    for found in (read_bridge_weights(path), read_bridge_weights(tmp_path)):
        assert found.keys() == theirs.keys()
        assert all(torch.equal(found[name], weight) for name, weight in theirs.items())
        assert {weight.dtype for weight in found.values()} == {torch.bfloat16}


def test_a_real_checkpoint_has_these_names(tmp_path: Path) -> None:
    described = pickle.loads(RECORDED.read_bytes()).state_dict_metadata
    shapes = {name: torch.empty(kind.size, device="meta") for name, kind in described.items() if hasattr(kind, "size")}
    model = {name: weight for name, weight in shapes.items() if name.startswith("module.") and "pos_" not in name}
    found = dict(_by_layer(model))

    assert {int(match[1]) for match in map(LAYER.fullmatch, found) if match} == set(range(4))
    beyond = tuple(f"decoder.layers.{layer}." for layer in range(LAYERS, 4))
    assert {name for name in found if not name.startswith(beyond)} == dfms().keys()
    assert {name: weight.dim() for name, weight in found.items() if name in dfms()} == {
        name: weight.dim() for name, weight in dfms().items()
    }


def test_a_run_starts_from_dfms_checkpoint_as_from_a_file_of_its_weights(dataset: Path, tmp_path: Path) -> None:
    theirs = {name: weight / 20 for name, weight in dfms().items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    checkpoints = checkpoint_of(theirs, tmp_path / "checkpoints").parent
    words = [
        "model.hidden_size=288",
        "model.num_attention_heads=4",
        "model.num_layers=2",
        "model.adaln_lora_rank=16",
        "train.train_iters=1",
        f"dataset.path={dataset}",
    ]
    starts = {}
    for name, source in {"file": tmp_path / "theirs.safetensors", "folder": checkpoints}.items():
        said = train(tmp_path / name, *words, f"checkpoint.pretrained_checkpoint={source}")
        assert f"Weights from {source}" in said
        assert "UserWarning: torch.distributed is disabled" not in said
        starts[name] = losses(tmp_path / name)[1]

    assert starts["folder"] == starts["file"]


def test_what_is_no_checkpoint_of_theirs_is_told_with_a_way_out(tmp_path: Path) -> None:
    path = checkpoint_of(dfms(), tmp_path / "good")
    shard = next(path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    (tmp_path / "empty").mkdir()

    with pytest.raises(CheckpointError, match="empty is neither a safetensors file nor a folder of Megatron-Bridge's"):
        read_bridge_weights(tmp_path / "empty")

    shard.write_bytes(bytes(len(content)))
    with pytest.raises(CheckpointError, match="iter_0000007 cannot be read: a shard is damaged, or holds what is no"):
        read_bridge_weights(path)

    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="and its tensors reach to"):
        read_bridge_weights(path)

    (path / "manifest.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"it is dfmspec's .*; name another, or a safetensors file, which dfmspec export makes"
    ):
        read_bridge_weights(path)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    words = ["model.num_layers=4", "model.hidden_size=64", "model.adaln_lora_rank=256"]
    train(run_dir, "train.train_iters=2", f"dataset.path={dataset}", *words)
    return run_dir


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """A folder of checkpoints for DFM."""
    folder = trained.parent / "for dfm"
    done = dfmspec("export", trained, "-o", folder, "--for", "dfm", "--raw")
    assert (done.returncode, done.stdout.strip()) == (0, str(folder)), done.stderr
    assert "UserWarning" not in done.stderr
    assert "from iteration 0 and with a new optimizer, by checkpoint.pretrained_checkpoint=" in done.stderr
    return folder


def test_what_is_written_for_dfm_has_the_files_names_and_kinds_of_a_real_checkpoint(exported: Path) -> None:
    """All that an H200's has of the model, and nothing else, layer by layer."""
    (checkpoint,) = exported.glob("iter_*")
    theirs = pickle.loads(RECORDED.read_bytes()).state_dict_metadata
    mine = pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata
    model = {name: kind for name, kind in theirs.items() if name.startswith("module.")}

    assert mine.keys() == model.keys()  # both have four layers
    for name, kind in model.items():
        assert type(mine[name]) is type(kind), name
        if hasattr(kind, "size"):
            assert mine[name].properties.dtype == kind.properties.dtype == torch.bfloat16
            assert len(mine[name].size) == len(kind.size), name
    real = {path.name for path in RECORDED.parent.iterdir()} | {"run_config.yaml", "__0_0.distcp"}
    assert {path.name for path in checkpoint.iterdir()} == real
    assert (checkpoint.parent / "latest_train_state.pt").read_bytes() == (checkpoint / "train_state.pt").read_bytes()
    for name in ("train_state.pt", "common.pt"):
        recorded = torch.load(RECORDED.parent / name, weights_only=True)
        written = torch.load(checkpoint / name, weights_only=True)
        assert recorded.keys() >= written.keys() >= recorded.keys() - {"optimizer", "opt_param_scheduler"}


def test_megatron_cores_own_reader_takes_what_is_written_for_dfm(exported: Path) -> None:
    (checkpoint,) = exported.glob("iter_*")
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "from megatron.core import dist_checkpointing as dc\n"
        "from dfmspec.trainer.network.bridge_weights import read_bridge_weights\n"
        "path = sys.argv[1]\n"
        "theirs = dc.load_plain_tensors(path)\n"
        "mine = read_bridge_weights(Path(path))\n"
        "key = 'module.decoder.layers.mlp.linear_fc1.weight'\n"
        "parts = [mine[f'decoder.layers.{i}.mlp.linear_fc1.weight'] for i in range(4)]\n"
        "assert torch.equal(theirs[key], torch.stack(parts))\n"
        "print(dc.load_common_state_dict(path)['iteration'], sum(map(torch.is_tensor, theirs.values())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=False, cwd=ROOT, timeout=100
    )
    assert done.stdout.split() == ["2", "27"], done.stderr[-1500:]


def test_a_checkpoint_of_dfms_is_exported_and_sampled_as_ours_is(
    trained: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the checkpoint for DFM come the weights that went into it, rounded to bf16."""
    files = [tmp_path / "own.safetensors", tmp_path / "dfms.safetensors"]
    for source, file in zip((trained, exported), files, strict=True):
        assert dfmspec("export", source, "-o", file, "--raw").returncode == 0
    own, dfms_own = map(load_file, files)
    assert own.keys() == dfms_own.keys()
    assert all(torch.equal(dfms_own[name], weight.bfloat16().float()) for name, weight in own.items())

    words = ["--num-samples", "1", "--num-steps", "1", "--resolution", "64"]
    drawn = dfmspec("sample", exported, "-o", tmp_path / "drawn", *words)
    assert drawn.returncode == 0, drawn.stderr
    assert Image.open(tmp_path / "drawn" / "sample_000.png").size == (64, 64)
    assert sample.main([str(exported)]) != 0
    assert "does not say the size of its pictures; name it with --resolution" in capsys.readouterr().err


def test_a_network_that_dfm_has_not_is_no_checkpoint_of_its(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="NVIDIA DFM's DiT has 256; --names dfm writes a file of any rank"):
        write_bridge_checkpoint(tmp_path / "out", {}, Experiment(model=Model(adaln_lora_rank=16)), 1)
    assert not (tmp_path / "out").exists()


def test_names_are_of_a_file_alone(trained: Path, tmp_path: Path) -> None:
    done = dfmspec("export", trained, "-o", tmp_path / "out", "--for", "dfm", "--names", "dfm")
    assert (done.returncode, "leave one out" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(2, 8, 8), (1, 4, 12)],
)
def test_the_table_of_positions_is_diffusers(frames: int, height: int, width: int) -> None:
    """Row r of a frame holds width r // H before height r % H, as diffusers' meshgrid of [H, W] gives it."""
    sizes = {"max_frames": frames, "max_img_h": 2 * height, "max_img_w": 2 * width, "hidden_size": 32}
    table = position_table(Model(num_attention_heads=4, **sizes)).double()

    def of(position: int, channels: int) -> Tensor:
        omega = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
        return torch.cat([(position * omega).sin(), (position * omega).cos()])

    for t in range(frames):
        for row in range(height * width):
            expected = torch.cat([of(t, 8), of(row % height, 12), of(row // height, 12)])
            torch.testing.assert_close(table[t * height * width + row], expected, atol=1e-6, rtol=0)
