"""Compares tools/dfm_fields.yaml with the dataclasses of NVIDIA DFM and of what it pins.

    python tools/upstream_fields.py --dfm DFM@7cb7634 --bridge Megatron-Bridge@953aabf7 --core Megatron-LM@2d398b42

The classes are read from checkouts, without importing them. Prints each field that the table lacks or has too many;
`--json` prints what upstream declares.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BRIDGE = "bridge/src/megatron/bridge"
CORE = "core/megatron/core"
DFM = "dfm/dfm/src/megatron"
CONFIG = f"{BRIDGE}/training/config.py"
SECTIONS = {
    # The model's classes are Megatron-Core's two, then DFM's two.
    "model": [
        f"{CORE}/model_parallel_config.py:ModelParallelConfig",
        f"{CORE}/transformer/transformer_config.py:TransformerConfig",
        f"{DFM}/model/dit/dit_model_provider.py:DiTModelProvider",
        f"{DFM}/model/dit/dit_model_provider.py:DiTXLModelProvider",
    ],
    # Training.
    "train": [f"{CONFIG}:TrainingConfig"],
    "optimizer": [f"{CORE}/optimizer/optimizer_config.py:OptimizerConfig"],
    "scheduler": [f"{CONFIG}:SchedulerConfig"],
    "ddp": [f"{CORE}/distributed/distributed_data_parallel_config.py:DistributedDataParallelConfig"],
    # Data: a WebDataset, or random tensors.
    "dataset": [
        f"{CONFIG}:DataloaderConfig",
        f"{CONFIG}:DatasetProvider",
        f"{DFM}/data/common/diffusion_energon_datamodule.py:DiffusionDataModuleConfig",
    ],
    "dataset (mock)": [f"{DFM}/data/dit/dit_mock_datamodule.py:DiTMockDataModuleConfig"],
    # The other sections of the recipe.
    "logger": [f"{CONFIG}:LoggerConfig"],
    "tokenizer": [f"{BRIDGE}/training/tokenizers/config.py:TokenizerConfig"],
    "checkpoint": [f"{CONFIG}:CheckpointConfig"],
    "rng": [f"{CONFIG}:RNGConfig"],
    "mixed_precision": [f"{BRIDGE}/training/mixed_precision.py:MixedPrecisionConfig"],
    "comm_overlap": [f"{BRIDGE}/training/comm_overlap.py:CommOverlapConfig"],
    "dist": [f"{CONFIG}:DistributedInitConfig"],
    "rerun_state_machine": [f"{CONFIG}:RerunStateMachineConfig"],
    "profiling": [f"{CONFIG}:ProfilingConfig"],
    "ft": [f"{CONFIG}:FaultToleranceConfig"],
    "straggler": [f"{CONFIG}:StragglerDetectionConfig"],
    "nvrx_straggler": [f"{CONFIG}:NVRxStragglerDetectionConfig"],
    "tensor_inspect": [f"{CONFIG}:TensorInspectConfig"],
    "inprocess_restart": [f"{CONFIG}:InProcessRestartConfig"],
}
"""Each section's classes, the deriving ones last."""

Fields = dict[str, dict[str, Any]]
"""field -> {"type", "default"}, as an annotation has them."""


def declared(roots: dict[str, Path], places: list[str]) -> Fields:
    """The fields of some classes, each a FILE:CLASS; the later class wins."""
    fields: Fields = {}
    for place in places:
        for name, field in _fields_of(_class(roots, place)):
            # In the place where the later class has it.
            fields.pop(name, None)
            fields[name] = field
    return fields


def _class(roots: dict[str, Path], place: str) -> ast.ClassDef:
    file, name = place.rsplit(":", 1)
    repository, rest = file.split("/", 1)
    tree = ast.parse((roots[repository] / rest).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise SystemExit(f"{place}: no such class")


def _fields_of(cls: ast.ClassDef) -> Iterator[tuple[str, dict[str, Any]]]:
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        if "ClassVar" in kind:
            continue
        default = "<required>"
        if node.value is not None:
            default = ast.unparse(node.value)
        yield node.target.id, {"type": kind, "default": default}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("dfm", "bridge", "core"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    # What upstream declares.
    roots = {"dfm": given.dfm, "bridge": given.bridge, "core": given.core}
    upstream = {section: declared(roots, places) for section, places in SECTIONS.items()}
    if given.json:
        print(json.dumps(upstream, indent=1))
        return

    # Beside the table, which has one section of data.
    upstream["dataset"] |= upstream.pop("dataset (mock)")
    table = yaml.safe_load((ROOT / "tools" / "dfm_fields.yaml").read_text())
    for section, fields in upstream.items():
        ours = table.get(section, {})
        for name in fields.keys() - ours.keys():
            field = fields[name]
            print(f"{section}.{name}: not in the table ({field['type']} = {field['default']})")
        for name in ours.keys() - fields.keys():
            print(f"{section}.{name}: not upstream's")


if __name__ == "__main__":
    main()
