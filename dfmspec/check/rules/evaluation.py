"""EVL: evaluation while training, and the pictures that it draws."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dfmspec.check.rules.base import DFM, DFM_DIT, ERROR, HINT, ITERS, WARNING, Rule, View, excludes, path, together
from dfmspec.diagnostics import Finding
from dfmspec.spec.paths import local_path
from dfmspec.targets import catalogue

INTERVAL, EVAL, CACHE = "train.eval_interval", "train.eval_iters", "model.vae_cache_folder"


def _sampling(view: View) -> Iterator[Finding]:
    if view[EVAL] and view[INTERVAL] * 10 < 1000 and view.is_users(INTERVAL):
        calls = 4 * view["model.val_generation_num_steps"]
        yield Finding(path(INTERVAL), f"every {view[INTERVAL]} iterations each GPU loads the VAE and runs {calls} forward passes to draw a video", "a larger eval_interval, fewer val_generation_num_steps, or eval_iters 0")


def _vae_cache(view: View) -> Iterator[Finding]:
    folder = view[CACHE]
    if not view[EVAL]:
        return
    if folder is None:
        yield Finding(path(CACHE), "evaluation downloads the Cosmos tokenizer on first use, on every node", "set model.vae_cache_folder to a folder that has it, or train.eval_iters to 0")
    elif not local_path(folder).is_dir():
        yield Finding(path(CACHE), f"model.vae_cache_folder {folder} does not exist here", "create it on every node, with the tokenizer in it", WARNING)


_FITTING = ("Cosmos-0.1-Tokenizer-CV4x8x8", "Cosmos-0.1-Tokenizer-CV8x8x8")


def _other_decoder(view: View) -> Iterator[Finding]:
    key, default = "model.vae_module", catalogue(view.target).field("model.vae_module") or {}
    if view[EVAL] and view[key] != default["default"] and "." in view[key]:
        yield Finding(path(key), f"model.vae_module {view[key]} is not DFM's own tokenizer: whether it can be imported on the nodes shows at the first evaluation", "leave it out, or try it before", WARNING)


RULES = (
    Rule(
        "EVL101", "evaluation-never-due", HINT,
        excludes(lambda v: bool(v[EVAL]) and v.is_users(INTERVAL) and v[INTERVAL] > v[ITERS], at=INTERVAL,
                 message="train.eval_interval is longer than the run: only the last iteration is evaluated", hint="lower it, or set train.eval_iters to 0"),
        "The evaluation curve would have one point.", "Megatron-Bridge training/pretrain.py",
    ),
    Rule(
        "EVL102", "evaluation-often", HINT, _sampling,
        "Evaluation takes minutes each time, and the VAE needs memory beside the model.", "NVIDIA DFM model/dit/dit_step.py", DFM_DIT,
    ),
    Rule(
        "EVL103", "tokenizer-does-not-fit", ERROR,
        together(
            excludes(lambda v: not v["model.vae_name"].endswith(_FITTING), at="model.vae_name",
                     message=lambda v: f"model.vae_name {v['model.vae_name']}: the network has latents of 16 channels at an eighth of the size, as {' and '.join(_FITTING)} have",
                     hint=_FITTING[0]),
            excludes(lambda v: v[EVAL] and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", v["model.vae_module"]), at="model.vae_module",
                     message=lambda v: f"model.vae_module {v['model.vae_module']} is no path of a class", hint="leave it out, for DFM's own"),
            _other_decoder,
        ),
        "Accepted at start; the first evaluation fails, hours into the run.", "NVIDIA DFM model/dit/dit_model_provider.py", DFM_DIT,
    ),
    Rule(
        "EVL104", "nothing-to-do", HINT,
        excludes(lambda v: v["train.skip_train"] and not v[EVAL], at="train.skip_train", message="skip_train without evaluation: the run would do nothing", hint="set train.eval_iters"),
        "The run ends at once, as a success.", "Megatron-Bridge training/pretrain.py", DFM,
    ),
    Rule(
        "EVL105", "tokenizer-not-cached", HINT, _vae_cache,
        "The first evaluation needs the network: without, the run dies at iteration eval_interval.", "NVIDIA DFM common/tokenizers/cosmos", DFM_DIT, "paths",
    ),
    Rule(
        "EVL107", "videos-need-an-encoder", HINT,
        excludes(lambda v: v[EVAL] and v["logger.wandb_project"], at="logger.wandb_project",
                 message="with evaluation on, the last data-parallel ranks send videos to Weights & Biases, which needs its media extra there", hint="pip install 'wandb[media]' on every node"),
        "The first evaluation fails on those ranks, hours into the run.", "NVIDIA DFM model/dit/dit_step.py", DFM_DIT,
    ),
    Rule(
        "EVL106", "evaluation-on-training-data", HINT,
        excludes(lambda v: v["dataset.use_train_split_for_val"] and v[EVAL], at="dataset.use_train_split_for_val",
                 message="evaluation reads the training split: its loss says nothing of new data", hint="prepare a val split"),
        "Upstream shares one loader, so evaluation also takes samples away from training, in silence.", "NVIDIA DFM data/common/diffusion_energon_datamodule.py",
    ),
)  # fmt: skip
