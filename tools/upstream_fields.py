"""Compares tools/dfm_fields.yaml with the dataclasses of NVIDIA DFM and what it pins, read from checkouts without importing them.

    python tools/upstream_fields.py --dfm DFM@7cb7634 --bridge Megatron-Bridge@953aabf7 --core Megatron-LM@2d398b42

Prints each field that the table lacks, has too many, or gives another type; `--json` prints what upstream declares.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BRIDGE, CORE, DFM = "bridge/src/megatron/bridge", "core/megatron/core", "dfm/dfm/src/megatron"
SECTIONS = {
    "model": [f"{CORE}/model_parallel_config.py:ModelParallelConfig", f"{CORE}/transformer/transformer_config.py:TransformerConfig",
              f"{DFM}/model/dit/dit_model_provider.py:DiTModelProvider", f"{DFM}/model/dit/dit_model_provider.py:DiTXLModelProvider"],
    "train": [f"{BRIDGE}/training/config.py:TrainingConfig"],
    "optimizer": [f"{CORE}/optimizer/optimizer_config.py:OptimizerConfig"],
    "scheduler": [f"{BRIDGE}/training/config.py:SchedulerConfig"],
    "ddp": [f"{CORE}/distributed/distributed_data_parallel_config.py:DistributedDataParallelConfig"],
    "dataset": [f"{BRIDGE}/training/config.py:DataloaderConfig", f"{BRIDGE}/training/config.py:DatasetProvider",
                f"{DFM}/data/common/diffusion_energon_datamodule.py:DiffusionDataModuleConfig"],
    "dataset (mock)": [f"{DFM}/data/dit/dit_mock_datamodule.py:DiTMockDataModuleConfig"],
    "logger": [f"{BRIDGE}/training/config.py:LoggerConfig"],
    "tokenizer": [f"{BRIDGE}/training/tokenizers/config.py:TokenizerConfig"],
    "checkpoint": [f"{BRIDGE}/training/config.py:CheckpointConfig"],
    "rng": [f"{BRIDGE}/training/config.py:RNGConfig"],
    "mixed_precision": [f"{BRIDGE}/training/mixed_precision.py:MixedPrecisionConfig"],
    "comm_overlap": [f"{BRIDGE}/training/comm_overlap.py:CommOverlapConfig"],
    "dist": [f"{BRIDGE}/training/config.py:DistributedInitConfig"],
    "rerun_state_machine": [f"{BRIDGE}/training/config.py:RerunStateMachineConfig"],
    "profiling": [f"{BRIDGE}/training/config.py:ProfilingConfig"],
    "ft": [f"{BRIDGE}/training/config.py:FaultToleranceConfig"],
    "straggler": [f"{BRIDGE}/training/config.py:StragglerDetectionConfig"],
    "nvrx_straggler": [f"{BRIDGE}/training/config.py:NVRxStragglerDetectionConfig"],
    "tensor_inspect": [f"{BRIDGE}/training/config.py:TensorInspectConfig"],
    "inprocess_restart": [f"{BRIDGE}/training/config.py:InProcessRestartConfig"],
}  # fmt: skip
"""Each section's classes, the deriving ones last."""


def declared(roots: dict[str, Path], places: list[str]) -> dict[str, dict[str, Any]]:
    """field -> {"type", "default"} as the classes' annotations have them; the later class wins."""
    fields: dict[str, dict[str, Any]] = {}
    for place in places:
        file, name = place.rsplit(":", 1)
        repository, rest = file.split("/", 1)
        tree = ast.parse((roots[repository] / rest).read_text())
        cls = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
        if cls is None:
            raise SystemExit(f"{place}: no such class")
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = ast.unparse(node.annotation)
                if "ClassVar" in text:
                    continue
                default = "<required>" if node.value is None else ast.unparse(node.value)
                fields.pop(node.target.id, None)
                fields[node.target.id] = {"type": text, "default": default}
    return fields


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("dfm", "bridge", "core"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    roots = {"dfm": given.dfm, "bridge": given.bridge, "core": given.core}
    upstream = {section: declared(roots, places) for section, places in SECTIONS.items()}
    if given.json:
        print(json.dumps(upstream, indent=1))
        return
    upstream["dataset"] |= upstream.pop("dataset (mock)")
    table = yaml.safe_load((ROOT / "tools" / "dfm_fields.yaml").read_text())
    for section, fields in upstream.items():
        ours = table.get(section, {})
        for name in fields.keys() - ours.keys():
            print(f"{section}.{name}: not in the table ({fields[name]['type']} = {fields[name]['default']})")
        for name in ours.keys() - fields.keys():
            print(f"{section}.{name}: not upstream's")


if __name__ == "__main__":
    main()
