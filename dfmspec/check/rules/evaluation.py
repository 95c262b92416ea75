"""EVL: evaluation while training, and the pictures that it draws."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dfmspec.check.rules.base import DFM, DFM_DIT, ERROR, HINT, ITERS, WARNING, Rule, View, excludes, path, together
from dfmspec.diagnostics import Finding
from dfmspec.spec.paths import local_path
from dfmspec.targets import catalogue

INTERVAL = "train.eval_interval"
EVAL = "train.eval_iters"
CACHE = "model.vae_cache_folder"
_VAE_NAME = "model.vae_name"
_VAE_MODULE = "model.vae_module"
_SKIP_TRAIN = "train.skip_train"
_TRAIN_SPLIT = "dataset.use_train_split_for_val"
_WANDB = "logger.wandb_project"


def _sampling(view: View) -> Iterator[Finding]:
    if not view[EVAL]:
        return
    interval = view[INTERVAL]
    if interval < 100 and view.is_set_by_user(INTERVAL):
        calls = 4 * view["model.val_generation_num_steps"]
        yield Finding(
            path(INTERVAL),
            f"every {interval} iterations each GPU loads the VAE and runs {calls} forward passes to draw a video",
            "a larger eval_interval, fewer val_generation_num_steps, or eval_iters 0",
        )


def _vae_cache(view: View) -> Iterator[Finding]:
    folder = view.or_null(CACHE)
    if not view[EVAL]:
        return
    if folder is None:
        yield Finding(
            path(CACHE),
            "evaluation downloads the Cosmos tokenizer on first use, on every node",
            "set model.vae_cache_folder to a folder that has it, or train.eval_iters to 0",
        )
    elif not local_path(folder).is_dir():
        yield Finding(
            path(CACHE),
            f"model.vae_cache_folder {folder} does not exist here",
            "create it on every node, with the tokenizer in it",
            WARNING,
        )


def _never_due(view: View) -> bool:
    return bool(view[EVAL]) and view.is_set_by_user(INTERVAL) and view[INTERVAL] > view[ITERS]


# Both decode 16 channels, of an eighth of the picture's size.
_FITTING = ("Cosmos-0.1-Tokenizer-CV4x8x8", "Cosmos-0.1-Tokenizer-CV8x8x8")


def _does_not_fit(view: View) -> str:
    fitting = " and ".join(_FITTING)
    return (
        f"{_VAE_NAME} {view[_VAE_NAME]}: the network has latents of 16 channels at an eighth of the size, "
        f"as {fitting} have"
    )


def _is_no_class(view: View) -> bool:
    return view[EVAL] and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", view[_VAE_MODULE])


def _other_decoder(view: View) -> Iterator[Finding]:
    default = catalogue(view.target).field(_VAE_MODULE) or {}
    if not view[EVAL]:
        return
    module = view[_VAE_MODULE]
    if module != default["default"] and "." in module:
        yield Finding(
            path(_VAE_MODULE),
            f"{_VAE_MODULE} {module} is not DFM's own tokenizer: "
            "whether it can be imported on the nodes shows at the first evaluation",
            "leave it out, or try it before",
            WARNING,
        )


RULES = (
    # How often it evaluates.
    Rule(
        "EVL101",
        "evaluation-never-due",
        HINT,
        excludes(
            _never_due,
            at=INTERVAL,
            message="train.eval_interval is longer than the run: only the last iteration is evaluated",
            hint="lower it, or set train.eval_iters to 0",
        ),
        "The evaluation curve would have one point.",
        "Megatron-Bridge training/pretrain.py",
    ),
    Rule(
        "EVL102",
        "evaluation-often",
        HINT,
        _sampling,
        "Evaluation takes minutes each time, and the VAE needs memory beside the model.",
        "NVIDIA DFM model/dit/dit_step.py",
        targets=DFM_DIT,
    ),
    # What decodes the latents.
    Rule(
        "EVL103",
        "tokenizer-does-not-fit",
        ERROR,
        together(
            excludes(
                lambda v: not v[_VAE_NAME].endswith(_FITTING),
                at=_VAE_NAME,
                message=_does_not_fit,
                hint=_FITTING[0],
            ),
            excludes(
                _is_no_class,
                at=_VAE_MODULE,
                message=lambda v: f"{_VAE_MODULE} {v[_VAE_MODULE]} is no path of a class",
                hint="leave it out, for DFM's own",
            ),
            _other_decoder,
        ),
        "Accepted at start; the first evaluation fails, hours into the run.",
        "NVIDIA DFM model/dit/dit_model_provider.py",
        targets=DFM_DIT,
    ),
    Rule(
        "EVL104",
        "nothing-to-do",
        HINT,
        excludes(
            lambda v: v[_SKIP_TRAIN] and not v[EVAL],
            at=_SKIP_TRAIN,
            message="skip_train without evaluation: the run would do nothing",
            hint="set train.eval_iters",
        ),
        "The run ends at once, as a success.",
        "Megatron-Bridge training/pretrain.py",
        targets=DFM,
    ),
    Rule(
        "EVL105",
        "tokenizer-not-cached",
        HINT,
        _vae_cache,
        "The first evaluation needs the network: without, the run dies at iteration eval_interval.",
        "NVIDIA DFM common/tokenizers/cosmos",
        targets=DFM_DIT,
        level="paths",
    ),
    # What it sends, and what it reads.
    Rule(
        "EVL107",
        "videos-need-an-encoder",
        HINT,
        excludes(
            lambda v: v[EVAL] and v[_WANDB],
            at=_WANDB,
            message="with evaluation on, the last data-parallel ranks send videos to Weights & Biases, "
            "which needs its media extra there",
            hint="pip install 'wandb[media]' on every node",
        ),
        "The first evaluation fails on those ranks, hours into the run.",
        "NVIDIA DFM model/dit/dit_step.py",
        targets=DFM_DIT,
    ),
    Rule(
        "EVL106",
        "evaluation-on-training-data",
        HINT,
        excludes(
            lambda v: v[_TRAIN_SPLIT] and v[EVAL],
            at=_TRAIN_SPLIT,
            message="evaluation reads the training split: its loss says nothing of new data",
            hint="prepare a val split",
        ),
        "Upstream shares one loader, so evaluation also takes samples away from training, in silence.",
        "NVIDIA DFM data/common/diffusion_energon_datamodule.py",
    ),
)
