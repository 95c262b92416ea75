"""How NVIDIA DFM's script reads a YAML file and a command line: a model of it, apart from our own strict loader.

What it does, in its order: the recipe's values; OmegaConf's merge of the file, which takes any key; Hydra's overrides; the
application to the dataclasses, which drops unknown keys and knows no types; the precision and overlap sections copied over
others; post-inits that fill what is null. What a case resolves to is what `import`, "has no effect" and the compiled
configuration rest on; the recorded verdicts in tests/targets/dfm hold it to the real one.

Sources: pretrain_dit_model.py (DFM 7cb7634); training/utils/omegaconf_utils.py, config.py, mixed_precision.py and
comm_overlap.py (Megatron-Bridge 953aabf7); TransformerConfig.__post_init__ (megatron-core 2d398b42).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from dfmspec.targets import catalogue
from dfmspec.targets.dfm.bridge import BRIDGE_PRECISION, CLASSES, PRECISIONS

Tree = dict[str, Any]
_FOLDER = "${CWD}/nemo_experiments/default"
_RECIPE = {"checkpoint.save": f"{_FOLDER}/checkpoints", "checkpoint.load": f"{_FOLDER}/checkpoints", "logger.tensorboard_dir": f"{_FOLDER}/tb_logs"}
_BEFORE_PRECISION = {"model.fp8_recipe": "delayed", "optimizer.fp8_recipe": None, "optimizer.params_dtype": "torch.float32", "ddp.grad_reduce_in_fp32": True}
"""What stands there until the precision section is copied over it."""
_COMPUTED = ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps", "wsd_decay_steps")
"""Fields of the schedule that a spec may not set and upstream lets anybody set."""
_RESTORED = ("activation_func", "init_method", "output_layer_init_method", "embedding_init_method", "replicated_t_embedder")
"""Of the model: attributes that are no part of the merge, so a file's value for them vanishes without a word."""
_OURS = ("cluster", "launcher", "run", "data")


class Refused(Exception):
    """Upstream stops here."""


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


def read(text: str | None, overrides: Sequence[str], *, world_size: int, mock: bool = False, dataset_path: str | None = None,
         environment: Mapping[str, str] | None = None, target: str = "dfm") -> Reading:  # fmt: skip
    """Read an override file and a command line as upstream does.

    Raises:
        Refused: upstream stops while it reads; its later checks are not part of this model.
    """
    tree = recipe(target, mock=mock, dataset_path=dataset_path)
    merged = copy.deepcopy(tree)
    if text is not None:
        _merge(merged, loaded(text))
    for override in overrides:
        _override(merged, override)
    merged = _interpolated(merged, os.environ if environment is None else environment)
    reading = Reading(tree)
    _apply(tree, merged, reading, "")
    _set_up(reading, world_size)
    return reading


def recipe(target: str = "dfm", *, mock: bool = False, dataset_path: str | None = None) -> Tree:
    """What the target's pretrain_config() gives."""
    tree: Tree = {}
    for name, node in catalogue(target).schema["properties"].items():
        if "properties" not in node or name in _OURS:
            continue
        tree[name] = None if name in CLASSES else {
            key: copy.deepcopy(f.get("x-upstream", f["default"])) for key, f in node["properties"].items() if key not in _RESTORED
        }
    tree["peft"] = None
    tree["scheduler"].update(dict.fromkeys(_COMPUTED))
    for key, value in (_RECIPE | _BEFORE_PRECISION).items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    tree["mixed_precision"] = _precision("bf16_mixed") | {"grad_reduce_in_fp32": False}
    dataset, mark = tree["dataset"], "x-energon-only" if mock else "x-mock-only"
    for name, described in catalogue(target).schema["properties"]["dataset"]["properties"].items():
        if mark in described:
            del dataset[name]
    dataset["path"] = None if mock else dataset_path
    return tree


def _precision(name: str) -> Tree:
    """Megatron-Bridge's recipe of that name."""
    key = name.replace("-", "_")
    if key not in PRECISIONS:
        raise Refused(f"unknown mixed-precision recipe {name}")
    own = {"grad_reduce_in_fp32": key.startswith("bf16") or "_bf16_" in key}
    return BRIDGE_PRECISION | own | PRECISIONS[key] | {"fp8_param": PRECISIONS[key].get("fp8_param_gather")}


# YAML as OmegaConf reads it: YAML 1.1 with floats that need no point, and no double keys.


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+|\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def loaded(text: str) -> Tree:
    """An override file's tree, with the scalars that OmegaConf sees.

    Raises:
        Refused: it is no mapping, or no YAML.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise Refused(str(error)) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise Refused(f"a {type(data).__name__} cannot be merged")
    return data


def _merge(into: Tree, other: Tree) -> None:
    """OmegaConf's merge: mappings into mappings, everything else replaces; ??? leaves what is there."""
    for key, value in other.items():
        if value == "???":
            continue
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, list) and isinstance(into.get(key), dict):
            raise Refused(f"{key}: a list cannot be merged into a section")
        else:
            into[key] = copy.deepcopy(value)


# Hydra's command line.

_KEY = re.compile(r"(\+\+|\+|~)?([A-Za-z_][\w-]*(?:\.[\w-]+)*)(?:=(.*))?$", re.DOTALL)


def _override(tree: Tree, text: str) -> None:
    match = _KEY.fullmatch(text)
    if match is None or (match[3] is None and match[1] != "~"):
        raise Refused(f"{text!r} is no override")
    prefix, parts = match[1] or "", match[2].split(".")
    node: Any = tree
    for part in parts[:-1]:
        if isinstance(node, dict) and part not in node and prefix in ("+", "++"):
            node[part] = {}
        node = node.get(part) if isinstance(node, dict) else None
    there = isinstance(node, dict) and parts[-1] in node
    if not isinstance(node, dict) or (there == (prefix == "+") and prefix != "++"):
        raise Refused(f"{text!r}: {'there is' if there else 'there is no'} such key")
    if prefix == "~":
        del node[parts[-1]]
    else:
        value = value_of(match[3])
        if isinstance(value, dict) and isinstance(node.get(parts[-1]), dict):
            _merge(node[parts[-1]], value)
        elif isinstance(value, list) and isinstance(node.get(parts[-1]), dict):
            raise Refused(f"{text!r}: a list cannot replace a section")
        else:
            node[parts[-1]] = value


def value_of(text: str) -> Any:
    """The value of an override, as Hydra reads it.

    Raises:
        Refused: its grammar has no such value.
    """
    return _Value(text).parsed()


class _Value:
    """Hydra's grammar of values: quoted text, lists, mappings, and words."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def parsed(self) -> Any:
        value = self._element(end="")
        if self.at < len(self.text):
            raise Refused(f"{self.text!r}: {self.text[self.at]!r} is not expected")
        return value

    def _element(self, end: str) -> Any:
        self._blank()
        first = self.text[self.at : self.at + 1]
        if first == "[":
            return self._sequence("]")
        if first == "{":
            return self._mapping()
        if first and first in "'\"":
            return self._quoted(first)
        return self._word(end)

    def _blank(self) -> None:
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1

    def _sequence(self, close: str) -> list[Any]:
        items: list[Any] = []
        self.at += 1
        self._blank()
        while self.text[self.at : self.at + 1] != close:
            items.append(self._element(end=f",{close}"))
            self._separator(close)
        self.at += 1
        self._blank()
        return items

    def _mapping(self) -> dict[Any, Any]:
        items: dict[Any, Any] = {}
        self.at += 1
        self._blank()
        while self.text[self.at : self.at + 1] != "}":
            key = self._element(end=":")
            if self.text[self.at : self.at + 1] != ":":
                raise Refused(f"{self.text!r}: a mapping needs key: value")
            self.at += 1
            items[key] = self._element(end=",}")
            self._separator("}")
        self.at += 1
        self._blank()
        return items

    def _separator(self, close: str) -> None:
        self._blank()
        here = self.text[self.at : self.at + 1]
        if here == ",":
            self.at += 1
            self._blank()
        elif here != close:
            raise Refused(f"{self.text!r} is not closed")

    def _quoted(self, quote: str) -> str:
        end = self.at + 1
        while end < len(self.text) and self.text[end] != quote:
            end += 2 if self.text[end] == "\\" else 1
        if end >= len(self.text):
            raise Refused(f"{self.text!r}: a quote is not closed")
        value = self.text[self.at + 1 : end].replace(f"\\{quote}", quote)
        self.at = end + 1
        self._blank()
        return value

    def _word(self, end: str) -> Any:
        stop = self.at
        while stop < len(self.text) and self.text[stop] not in end:
            if self.text.startswith("${", stop):
                stop = self.text.find("}", stop)
                if stop < 0:
                    raise Refused(f"{self.text!r}: an interpolation is not closed")
            elif self.text[stop] in "=,{}[]()#~'\"" or (self.text[stop] == ":" and end == ":"):
                break
            elif self.text[stop] == "\\":
                stop += 1
            stop += 1
        word = self.text[self.at : stop].strip()
        self.at = stop
        return _word_value(re.sub(r"\\(.)", r"\1", word))


def _word_value(word: str) -> Any:
    lower = word.lower()
    if lower in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[lower]
    if re.fullmatch(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", word):
        return int(word)
    if re.fullmatch(r"[-+]?((\d+(_\d+)*\.\d*|\.\d+)([eE][-+]?\d+)?|\d+(_\d+)*[eE][-+]?\d+|inf|nan)", word, re.IGNORECASE):
        return float(word)
    return word


def _interpolated(node: Any, environment: Mapping[str, str]) -> Any:
    """Interpolations of environment variables; others are refused, as a loop or a missing key would be."""
    if isinstance(node, dict):
        return {key: _interpolated(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [_interpolated(value, environment) for value in node]
    if isinstance(node, str) and "${" in node.replace("${CWD}", ""):
        return re.sub(r"\$\{(?!CWD\})([^}]*)\}", lambda match: _variable(match[1], environment), node)
    return node


def _variable(text: str, environment: Mapping[str, str]) -> str:
    match = re.fullmatch(r"oc\.env:(\w+)(?:,(.*))?", text)
    if match is None or (match[2] is None and match[1] not in environment):
        raise Refused(f"${{{text}}} cannot be resolved")
    return environment.get(match[1], match[2])


# Application to the dataclasses.


def _apply(tree: Tree, merged: Tree, reading: Reading, prefix: str) -> None:
    """_apply_overrides: what has no attribute is skipped; a dtype's word becomes a dtype; nothing else is checked."""
    for key, value in merged.items():
        if key in _RESTORED and prefix == "model.":
            continue
        if key not in tree:
            reading.skipped.append(f"{prefix}{key}")
        elif isinstance(value, dict) and "_target_" in value:
            tree[key] = _instantiated(value)
        elif isinstance(tree[key], dict) and isinstance(value, dict) and not prefix:
            _apply(tree[key], value, reading, f"{key}.")
        elif isinstance(tree[key], str) and tree[key].startswith("torch.") and isinstance(value, str):
            word = value.rsplit(".", 1)[-1]
            tree[key] = f"torch.{ {'half': 'float16', 'float': 'float32'}.get(word, word) }".replace(" ", "") if word in _DTYPES else value
        else:
            tree[key] = value
    if prefix == "mixed_precision.":  # its attributes keep each other in step, and this one is set last
        tree["fp8_param"] = tree["fp8_param_gather"]


_DTYPES = ("float32", "float", "bfloat16", "float16", "half", "float64", "uint8")


def _instantiated(node: Tree) -> Tree:
    """A section by its class: the class's defaults, and the words that it knows."""
    target = str(node["_target_"])
    if target.endswith(".MixedPrecisionConfig"):
        return BRIDGE_PRECISION | {key: value for key, value in node.items() if key in BRIDGE_PRECISION}
    section = next((section for section, path in CLASSES.items() if path == target), None)
    if section is None:
        return {key: value for key, value in node.items() if key != "_target_"}
    known = [name for name in catalogue("dfm").fields(section) if name != "_target_"]
    return dict.fromkeys(known) | {key: value for key, value in node.items() if key in known}


# What happens before training starts.


def _set_up(reading: Reading, world_size: int) -> None:
    tree = reading.tree
    if isinstance(tree["mixed_precision"], str):
        tree["mixed_precision"] = _precision(tree["mixed_precision"])
    if isinstance(precision := tree["mixed_precision"], dict):
        if precision["fp8_param"] is None:
            precision["fp8_param"] = precision["fp8_param_gather"]
        for section in ("model", "optimizer", "ddp"):
            tree[section].update({key: value for key, value in precision.items() if key in tree[section]})
    model = tree["model"]
    sizes = [model[f"{name}_parallel_size"] for name in ("tensor_model", "pipeline_model", "context")]
    try:
        reading.data_parallel_size = world_size // (sizes[0] * sizes[1] * sizes[2])
    except (TypeError, ZeroDivisionError) as error:
        raise Refused(str(error)) from error
    if isinstance(overlap := tree["comm_overlap"], dict):
        overlap["data_parallel_size"] = reading.data_parallel_size
        _overlap(tree, overlap, reading.data_parallel_size)
    _post_init(model)
    _validated(tree)


def _overlap(tree: Tree, overlap: Tree, data_parallel_size: int) -> None:
    """CommOverlapConfig.setup."""
    model, stages = tree["model"], tree["model"]["virtual_pipeline_model_parallel_size"] or 1
    if overlap.get("tp_comm_overlap") is True and (model["tensor_model_parallel_size"] < 2 or not model["sequence_parallel"]):
        overlap = overlap | {"tp_comm_overlap": False}
    pipeline = model["pipeline_model_parallel_size"] > 1
    defaults = {
        "tp_comm_overlap": False, "overlap_p2p_comm": pipeline and stages > 1, "batch_p2p_comm": pipeline and stages == 1,
        "defer_embedding_wgrad_compute": False, "wgrad_deferral_limit": -1, "overlap_moe_expert_parallel_comm": False, "delay_wgrad_compute": False,
    }  # fmt: skip
    model.update({key: default if overlap.get(key) is None else overlap[key] for key, default in defaults.items()})
    if tree["ddp"]["use_distributed_optimizer"]:
        several = data_parallel_size > 1
        shared: Tree = {
            "bucket_size": 128 * 2**20 if several else None, "overlap_grad_reduce": several, "overlap_param_gather": several,
            "overlap_param_gather_with_optimizer_step": False, "align_param_gather": several and pipeline and stages > 1,
        }  # fmt: skip
        for section in ("optimizer", "ddp"):
            tree[section].update({key: default if overlap.get(key) is None else overlap[key] for key, default in shared.items() if key in tree[section]})


def _post_init(model: Tree) -> None:
    """TransformerConfig's second post-init: it fills what is null, and nothing else."""
    fills: dict[str, Callable[[], Any]] = {
        "ffn_hidden_size": lambda: 4 * model["hidden_size"], "kv_channels": lambda: model["hidden_size"] // model["num_attention_heads"],
        "num_query_groups": lambda: model["num_attention_heads"], "expert_tensor_parallel_size": lambda: model["tensor_model_parallel_size"],
        "microbatch_group_size_per_vp_stage": lambda: model["pipeline_model_parallel_size"], "autocast_dtype": lambda: model["params_dtype"],
        "recompute_modules": lambda: ["core_attn"],
    }  # fmt: skip
    for key, value in fills.items():
        if model.get(key) is None:
            model[key] = value()
    if model.get("enable_cuda_graph"):
        model["cuda_graph_impl"] = "local"
    if model.get("external_cuda_graph"):
        model["cuda_graph_impl"] = "transformer_engine"


def _validated(tree: Tree) -> None:
    """What ConfigContainer.validate sets."""
    ddp, optimizer, model, dist = tree["ddp"], tree["optimizer"], tree["model"], tree["dist"]
    if ddp["use_distributed_optimizer"] or optimizer["use_distributed_optimizer"]:
        ddp["use_distributed_optimizer"] = optimizer["use_distributed_optimizer"] = True
    if dist["use_megatron_fsdp"] or ddp["use_megatron_fsdp"]:
        dist["use_megatron_fsdp"] = ddp["use_megatron_fsdp"] = True
        ddp["average_in_collective"] = False if ddp["average_in_collective"] else ddp["average_in_collective"]
        ddp["preserve_fp32_weights"] = False if optimizer["use_precision_aware_optimizer"] else ddp["preserve_fp32_weights"]
        model["gradient_accumulation_fusion"] = False if model["gradient_accumulation_fusion"] else model["gradient_accumulation_fusion"]
    if tree["rng"]["te_rng_tracker"] or model["use_te_rng_tracker"]:
        tree["rng"]["te_rng_tracker"] = model["use_te_rng_tracker"] = True
    model["use_cpu_initialization"] = model["use_cpu_initialization"] or dist["lazy_init"]
    _steps(tree["train"], tree["scheduler"])


def _steps(train: Tree, scheduler: Tree) -> None:
    """The schedule in samples, which is how upstream counts."""
    batch, fraction = train["global_batch_size"], scheduler["lr_warmup_fraction"]
    if train["train_samples"] is not None:
        train["train_iters"] = train["train_samples"] // batch
        if scheduler["lr_decay_samples"] is None:
            scheduler["lr_decay_samples"] = train["train_samples"]
        decay, total, warmup = scheduler["lr_decay_samples"], train["train_samples"], scheduler["lr_warmup_samples"]
        wsd = scheduler["lr_wsd_decay_samples"]
    else:
        if scheduler["lr_decay_iters"] is None:
            scheduler["lr_decay_iters"] = train["train_iters"]
        decay, total, warmup = scheduler["lr_decay_iters"] * batch, train["train_iters"] * batch, scheduler["lr_warmup_iters"] * batch
        wsd = None if scheduler["lr_wsd_decay_iters"] is None else scheduler["lr_wsd_decay_iters"] * batch
    scheduler |= {"lr_decay_steps": decay, "wd_incr_steps": total, "lr_warmup_steps": warmup if fraction is None else fraction * decay}
    scheduler["wsd_decay_steps"] = wsd if wsd is not None else scheduler.get("wsd_decay_steps")
