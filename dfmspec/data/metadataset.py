"""What a metadataset names: the file in which Energon blends datasets, without Energon.

Weights, subsets and joins' fields are Energon's to judge. Sources: megatron-energon 7.4.1, metadataset/metadataset.py,
metadataset_v2.py and loader.py. `energon` is the major version that reads: 7, or 6 (6.0.1), which NVIDIA DFM pins; it
reads YAML by PyYAML's safe loader, and its forms are taken to be the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_ONE_OF = ("path", "blend", "blend_epochized", "join")


class Reference(NamedTuple):
    """A dataset that a split names."""

    path: Path
    split_part: str | None
    """The split of that dataset which is read; None: the one of the same name."""
    configured: bool
    """It names metadata files of its own, which Energon alone judges."""


class Leaf(NamedTuple):
    """A folder of shards, and the split of it that is read."""

    folder: Path
    split: str
    configured: bool = False


class Gap(NamedTuple):
    """A split that is read and that a metadataset does not have."""

    file: Path
    split: str
    there: tuple[str, ...]


def is_metadataset(dataset: Path) -> bool:
    """Whether a path is a file that names other datasets."""
    return dataset.suffix == ".yaml" and os.path.isfile(dataset)  # noqa: PTH113  which a name too long does not stop


def everything(dataset: Path, *, energon: int) -> list[Path]:
    """A dataset and, where it is a metadataset, all that its splits name, by way of other metadatasets too."""
    found = [dataset]
    for part in found:  # which grows
        if is_metadataset(part):
            references = [reference for each in read(part, energon=energon)[0].values() for reference in each]
            found += [inner for inner in dict.fromkeys(reference.path for reference in references) if inner not in found]
    return found


def names_itself(file: Path, *, energon: int) -> bool:
    """Whether a metadataset is among what it names, which Energon would follow for ever."""
    return any(file in everything(reference.path, energon=energon) for references in read(file, energon=energon)[0].values() for reference in references)


def leaves(dataset: Path, split: str, *, energon: int, by_way_of: tuple[Path, ...] = ()) -> Iterator[Leaf | Gap]:
    """What is read when a split of a dataset is."""
    if not is_metadataset(dataset):
        yield Leaf(dataset, split)
        return
    splits, _ = read(dataset, energon=energon)
    if split not in splits:
        yield Gap(dataset, split, tuple(splits))
    for reference in splits.get(split, ()):
        inner = reference.split_part or split
        if not is_metadataset(reference.path):
            yield Leaf(reference.path, inner, reference.configured)
        elif reference.path not in (*by_way_of, dataset):  # else it names itself
            yield from leaves(reference.path, inner, energon=energon, by_way_of=(*by_way_of, dataset))


def read(file: Path, *, energon: int) -> tuple[dict[str, list[Reference]], list[str]]:
    """The references of each split of a metadataset, and what of it Energon would not take."""
    data = _data(file, energon=energon)
    splits = data.get("splits") if isinstance(data, dict) else None
    if not isinstance(splits, dict) or not splits:
        return {}, ["it has no splits"]
    of_split = _blend if data.get("__class__") == "MetadatasetV2" else _datasets
    found: dict[str, list[Reference]] = {}
    faults = []
    for name, node in splits.items():
        nodes, fault = of_split(node)
        found[str(name)] = [_reference(file, each) for each in nodes if "://" not in each["path"]]
        if fault:
            faults.append(f"its split {name} {fault}")
        if any(each.get("aux") for each in nodes):
            faults.append(f"its split {name} has auxiliary datasets (aux), which the task encoder does not read")
    return found, faults


def _reference(file: Path, node: dict[str, Any]) -> Reference:
    split, configured = node.get("split_part"), bool(node.get("dataset_config") or node.get("split_config"))
    return Reference(Path(os.path.normpath(file.parent / node["path"])), split if isinstance(split, str) else None, configured)


def _blend(node: Any) -> tuple[list[dict[str, Any]], str]:
    """The references of a MetadatasetV2's split, and what is wrong with it."""
    kinds = [kind for kind in _ONE_OF if isinstance(node, dict) and kind in node]
    if len(kinds) != 1:
        return [], f"needs one of {', '.join(_ONE_OF)}"
    if kinds == ["path"]:
        return _with_paths([node])
    inner = node[kinds[0]]
    if kinds == ["join"]:
        return _with_paths(_joined(inner))
    parts = inner if isinstance(inner, list) else []
    return _with_paths([each for part in parts for each in (_joined(part["join"]) if isinstance(part, dict) and "join" in part else [part])])


def _datasets(node: Any) -> tuple[list[dict[str, Any]], str]:
    """The same of a split of the first version, which a file without `__class__` is of."""
    if not isinstance(node, dict) or not isinstance(node.get("datasets"), list):
        return [], "needs datasets, a list; for path or blend, the file must begin with __module__: megatron.energon and __class__: MetadatasetV2"
    return _with_paths(node["datasets"])


def _joined(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _with_paths(nodes: list[Any]) -> tuple[list[dict[str, Any]], str]:
    """Those of some references that name a path, and what is wrong unless all do."""
    whole = [each for each in nodes if isinstance(each, dict) and isinstance(each.get("path"), str)]
    return whole, "" if nodes and len(whole) == len(nodes) else "needs a path for each of its datasets"


class _AsRapidYaml(yaml.BaseLoader):
    """Energon 7's: an alias is its own text, and a date one too."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            return yaml.ScalarNode("tag:yaml.org,2002:str", f"*{self.get_event().anchor}")  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)


def _data(file: Path, *, energon: int) -> Any:
    stat = file.stat()
    return _parsed(file, stat.st_mtime_ns, stat.st_size, energon)


@lru_cache(maxsize=64)
def _parsed(file: Path, modified: int, size: int, energon: int) -> Any:
    try:
        return yaml.load(file.read_text(), _AsRapidYaml if energon >= 7 else yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
