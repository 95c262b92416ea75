"""The weights of a checkpoint of NVIDIA DFM's: as its files are, damaged, and into a run."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from dfmspec.errors import CheckpointError
from dfmspec.trainer.network.bridge_weights import _by_layer, read_bridge_weights
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
    with pytest.raises(CheckpointError, match="iter_0000007 cannot be read"):
        read_bridge_weights(path)

    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="and its tensors reach to"):
        read_bridge_weights(path)

    (path / "manifest.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"it is dfmspec's .*; name another, or a safetensors file, which dfmspec export makes"
    ):
        read_bridge_weights(path)
