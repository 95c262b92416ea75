"""Which checkpoint a path means, and whose it is when it means none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dfmspec.errors import CheckpointError
from dfmspec.record.bridge_config import trained_config
from dfmspec.record.checkpoints import find
from dfmspec.record.locate import locate

REAL = """\
checkpoint: {save_optim: true, save_rng: true}
model:
  _target_: dfm.src.megatron.model.dit.dit_model_provider.DiTXLModelProvider
  activation_func:
    _call_: false
    _target_: torch._C._nn.gelu
  cuda_graph_scope: !!python/tuple []
  crossattn_emb_size: 1024
  ffn_hidden_size: 1536
  hidden_size: 384
  in_channels: 16
  kv_channels: 64
  layernorm_epsilon: 1.0e-05
  max_frames: 34
  max_img_h: 80
  max_img_w: 80
  num_attention_heads: 6
  num_layers: 4
  num_query_groups: 6
  patch_spatial: 2
  patch_temporal: 1
  sigma_data: 0.5
  vae_cache_folder: null
"""


def of_bridge(folder: Path) -> Path:
    """A checkpoint as Megatron-Bridge leaves it."""
    checkpoint = folder / "iter_0000100"
    checkpoint.mkdir(parents=True)
    for name in ("common.pt", ".metadata", "metadata.json", "run_config.yaml", "train_state.pt", "__0_0.distcp"):
        (checkpoint / name).touch()
    return checkpoint


@pytest.mark.parametrize("of_one", [True, False])
def test_samples_and_exports_take_no_checkpoint_of_dfms_that_is_not_whole(
    of_one: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = of_bridge(tmp_path)
    words = "iter_0000100 is not whole: its .metadata" if of_one else "has no whole checkpoint"

    with pytest.raises(CheckpointError, match=words):
        locate(checkpoint if of_one else tmp_path, print)
    assert of_one or "iter_0000100 is passed over: its .metadata is not trusted" in capsys.readouterr().out


def test_a_checkpoint_says_what_dfms_dit_was_trained_with(tmp_path: Path) -> None:
    """Lines of a real run_config.yaml, among them some that no other configuration has."""
    (tmp_path / "run_config.yaml").write_text(REAL)
    found = trained_config(tmp_path)

    assert found["model"] | {"num_layers": 4, "layernorm_epsilon": 1e-5, "max_frames": 34} == found["model"]
    assert found["diffusion"] == {"sigma_data": 0.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("model: [", "is damaged"),
        ("[]", "is of None, says its run_config.yaml, and not of NVIDIA DFM's DiT"),
        ("model: {_target_: megatron.bridge.models.GPTModelProvider}", "is of megatron.bridge.models.GPTModelProvider"),
        ("model: {_target_: dfm.src.megatron.model.dit.x.Y, num_layers: 4}", "does not say model.hidden_size"),
    ],
)
def test_what_is_no_configuration_of_dfms_dit_is_told(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        trained_config(tmp_path)


def test_a_run_directory_of_nothing_is_no_other_programs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        locate(tmp_path, print)


@pytest.mark.parametrize("iteration", [None, 100])
def test_a_training_is_told_whose_a_checkpoint_is(iteration: int | None, tmp_path: Path) -> None:
    of_bridge(tmp_path)

    with pytest.raises(CheckpointError, match=r"Megatron-Bridge's \(it has run_config.yaml\)"):
        find(tmp_path, iteration=iteration, report=print, digests={})


def test_a_copy_that_broke_off_is_not_taken_for_another_programs(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000100"
    checkpoint.mkdir()
    for name in ("common.pt", ".metadata", "metadata.json"):
        (checkpoint / name).touch()

    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        find(tmp_path, iteration=None, report=print, digests={})
