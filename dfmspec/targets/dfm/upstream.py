"""How NVIDIA DFM's script reads a YAML file and a command line: a model of it, apart from our own strict loader.

What it does, in its order: the recipe's values; OmegaConf's merge of the file, which takes any key; Hydra's overrides;
the application to the dataclasses, which drops unknown keys and knows no types; the precision and overlap sections
copied over others; post-inits that fill what is null. What a case resolves to is what `import`, "has no effect" and the
compiled configuration rest on; the recorded verdicts in tests/targets/dfm hold it to the real one.

Sources: pretrain_dit_model.py (DFM 7cb7634); training/utils/omegaconf_utils.py (Megatron-Bridge 953aabf7).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfmspec.targets import catalogue
from dfmspec.targets.dfm import Refused
from dfmspec.targets.dfm.bridge import BRIDGE_PRECISION, CLASSES
from dfmspec.targets.dfm.hydra import override, value_of
from dfmspec.targets.dfm.omegaconf import Tree, interpolated, loaded, merge
from dfmspec.targets.dfm.setup import named_precision, only, set_up

__all__ = ["Reading", "Refused", "loaded", "read", "recipe", "value_of"]


@dataclass
class Reading:
    """What upstream makes of its input."""

    tree: Tree
    """Section -> field -> value, after every stage."""
    skipped: list[str] = field(default_factory=list)
    """Keys that it dropped with a line in the log."""
    data_parallel_size: int = 0

    def __getitem__(self, key: str) -> Any:
        node: Any = self.tree
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node


def read(
    text: str | None,
    overrides: Sequence[str],
    *,
    world_size: int,
    mock: bool = False,
    dataset_path: str | None = None,
    environment: Mapping[str, str] | None = None,
    target: str = "dfm",
) -> Reading:
    """Read an override file and a command line as upstream does.

    Raises:
        Refused: upstream stops while it reads; its later checks are not part of this model.
    """
    if environment is None:
        environment = os.environ

    # The file, then the command line, over the recipe.
    tree = recipe(target, mock=mock, dataset_path=dataset_path)
    merged = copy.deepcopy(tree)
    if text is not None:
        merge(merged, loaded(text))
    for word in overrides:
        override(merged, word)
    merged = interpolated(merged, environment)

    # What was merged, back over the recipe's own objects.
    skipped = _apply(tree, merged, "")
    data_parallel_size = set_up(tree, world_size)
    return Reading(tree, skipped, data_parallel_size)


# The recipe.

_OURS = ("cluster", "launcher", "run", "data")
"""Sections of dfmspec, of which upstream knows nothing."""
_RESTORED = (
    "activation_func",
    "init_method",
    "output_layer_init_method",
    "embedding_init_method",
    "replicated_t_embedder",
)
"""Attributes of the model that are no part of the merge, so a file's value for them vanishes without a word."""
_COMPUTED = ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps", "wsd_decay_steps")
"""Fields of the schedule that a spec may not set and upstream lets anybody set."""
_FOLDER = "${CWD}/nemo_experiments/default"
_FOLDERS = {
    "checkpoint.save": f"{_FOLDER}/checkpoints",
    "checkpoint.load": f"{_FOLDER}/checkpoints",
    "logger.tensorboard_dir": f"{_FOLDER}/tb_logs",
}
_BEFORE_PRECISION = {
    "model.fp8_recipe": "delayed",
    "optimizer.fp8_recipe": None,
    "optimizer.params_dtype": "torch.float32",
    "ddp.grad_reduce_in_fp32": True,
}
"""What stands there until the precision section is copied over it."""


def recipe(target: str = "dfm", *, mock: bool = False, dataset_path: str | None = None) -> Tree:
    """What the target's pretrain_config() gives."""
    sections = catalogue(target).schema["properties"]
    tree: Tree = {}
    for name, section in sections.items():
        if "properties" not in section or name in _OURS:
            continue
        tree[name] = None if name in CLASSES else _defaults(section)

    # What no spec may set, and what the schema has otherwise.
    tree["peft"] = None
    tree["scheduler"].update(dict.fromkeys(_COMPUTED))
    for key, value in (_FOLDERS | _BEFORE_PRECISION).items():
        name, _, attribute = key.partition(".")
        tree[name][attribute] = value
    tree["mixed_precision"] = named_precision("bf16_mixed") | {"grad_reduce_in_fp32": False}

    # One of the two classes of dataset.
    other = "x-energon-only" if mock else "x-mock-only"
    for name, described in sections["dataset"]["properties"].items():
        if other in described:
            del tree["dataset"][name]
    tree["dataset"]["path"] = None if mock else dataset_path
    return tree


def _defaults(section: Mapping[str, Any]) -> Tree:
    """Upstream's own value of each field of a section."""
    tree = {}
    for name, described in section["properties"].items():
        if name not in _RESTORED:
            value = described.get("x-upstream", described["default"])
            tree[name] = copy.deepcopy(value)
    return tree


# Application to the dataclasses.

_DTYPES = {
    "float32": "torch.float32",
    "float": "torch.float32",
    "bfloat16": "torch.bfloat16",
    "float16": "torch.float16",
    "half": "torch.float16",
    "float64": "torch.float64",
    "uint8": "torch.uint8",
}
"""The words for a dtype, after their last point."""


def _apply(tree: Tree, merged: Tree, prefix: str) -> list[str]:
    """Set what was merged, as _apply_overrides does: no value is checked; the keys that have no attribute."""
    skipped = []
    for key, value in merged.items():
        if prefix == "model." and key in _RESTORED:
            continue
        if key not in tree:
            skipped.append(f"{prefix}{key}")
            continue
        before = tree[key]
        is_section = isinstance(before, dict) and not prefix
        if isinstance(value, dict) and "_target_" in value:
            tree[key] = _instantiated(value)
        elif is_section and isinstance(value, dict):
            skipped += _apply(before, value, f"{key}.")
        elif _is_dtype(before) and isinstance(value, str):
            tree[key] = _DTYPES.get(value.rpartition(".")[2], value)
        else:
            tree[key] = value
    # The attributes of a precision keep each other in step, and this one is set last.
    if prefix == "mixed_precision.":
        tree["fp8_param"] = tree["fp8_param_gather"]
    return skipped


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("torch.")


def _instantiated(node: Tree) -> Tree:
    """A section by its class: the class's defaults, and the words that it knows."""
    path = str(node["_target_"])
    if path.endswith(".MixedPrecisionConfig"):
        return BRIDGE_PRECISION | only(node, BRIDGE_PRECISION)
    for section, own_path in CLASSES.items():
        if path == own_path:
            known = [name for name in catalogue("dfm").fields(section) if name != "_target_"]
            return dict.fromkeys(known) | only(node, known)
    # A class that this model does not know: its words, without defaults.
    return {key: value for key, value in node.items() if key != "_target_"}
