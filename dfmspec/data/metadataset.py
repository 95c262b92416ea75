"""What a metadataset names: the file in which Energon blends datasets, without Energon.

Weights, subsets and joins' fields are Energon's to judge. Sources: megatron-energon 7.4.1, metadataset/metadataset.py,
metadataset_v2.py and loader.py. `energon` is the major version that reads: 7, or 6 (6.0.1), which NVIDIA DFM pins; it
reads YAML by PyYAML's safe loader, and its forms are taken to be the same.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dfmspec.bounded import TooLarge, TooMuch, load_yaml, read_text, refuse_excess

MOST = 10_000
"""How many datasets are looked at, of all that a metadataset names."""
_BYTES = 2**18
"""Of a metadataset; it may name some thousand datasets."""
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_ONE_OF = ("path", "blend", "blend_epochized", "join")
_NEEDS_ONE_OF = "needs one of " + ", ".join(_ONE_OF)
_NO_SPLITS = "it has no splits"

_Node = dict[str, Any]
"""A reference as the file has it."""
_Nodes = tuple[list[_Node], str]
"""The references of a split that can be followed, and what is wrong with it; empty: nothing."""


class Reference(NamedTuple):
    """A dataset that a split names."""

    path: Path
    split_part: str | None
    """The split of that dataset which is read; None: the one of the same name."""
    configured: bool
    """Whether it names metadata files of its own, which Energon alone judges."""


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
    """A dataset and, where it is a metadataset, all that its splits name, by way of other metadatasets too.

    Of more than MOST, the first.
    """
    return list(_reached([dataset], energon=energon))


def names_itself(file: Path, *, energon: int) -> bool:
    """Whether a metadataset is among what it names, which Energon would follow for ever."""
    named = [reference.path for reference in _references(file, energon=energon)]
    return file in _reached(named, energon=energon)


def _reached(datasets: Iterable[Path], *, energon: int) -> dict[Path, None]:
    """Datasets and all that they name, in the order in which they are met."""
    found = dict.fromkeys(datasets)
    left = deque(found)
    while left:
        part = left.popleft()
        if not is_metadataset(part):
            continue
        for reference in _references(part, energon=energon):
            if len(found) >= MOST:
                return found
            if reference.path not in found:
                found[reference.path] = None
                left.append(reference.path)
    return found


def _references(file: Path, *, energon: int) -> Iterator[Reference]:
    """The references of all splits of a metadataset."""
    splits, _ = read(file, energon=energon)
    return chain.from_iterable(splits.values())


def leaves(dataset: Path, split: str, *, energon: int) -> list[Leaf | Gap]:
    """What is read when a split of a dataset is: folders of shards, and splits that are missing; each once.

    Args:
        dataset: a folder of shards, or a metadataset.
        split: such as "train".
        energon: the major version that reads.
    """
    found: dict[Leaf | Gap, None] = {}
    followed: set[tuple[Path, str]] = set()
    left = [(Reference(dataset, split, configured=False), split)]
    while left:
        part, inner = left.pop()
        if not is_metadataset(part.path):
            found[Leaf(part.path, inner, part.configured)] = None
            continue
        # One that was followed names itself, or is named twice.
        if (part.path, inner) in followed or len(followed) >= MOST:
            continue
        followed.add((part.path, inner))
        splits, _ = read(part.path, energon=energon)
        if inner not in splits:
            found[Gap(part.path, inner, tuple(splits))] = None
            continue
        left += [(named, named.split_part or inner) for named in reversed(splits[inner])]
    return list(found)


_Read = tuple[dict[str, list[Reference]], list[str]]


def read(file: Path, *, energon: int) -> _Read:
    """The references of each split of a metadataset, and what of it Energon would not take."""
    stat = file.stat()
    return _read(file, stat.st_mtime_ns, stat.st_size, energon)


@lru_cache(maxsize=256)
def _read(file: Path, modified: int, size: int, energon: int) -> _Read:
    """What a metadataset names; one that was changed has another time or size, and is read anew."""
    try:
        splits = _splits(file, energon=energon)
    except TooMuch as error:
        return {}, [f"it is not read: {error}"]
    except TooLarge as error:
        return {}, [f"it is not read: {error.strerror}"]
    if not splits:
        return {}, [_NO_SPLITS]
    found: dict[str, list[Reference]] = {}
    faults = []
    for name, (nodes, fault) in splits.items():
        # Only what is on this machine can be looked into.
        on_disk = [each for each in nodes if "://" not in each["path"]]
        found[name] = [_reference(file, each) for each in on_disk]
        if fault:
            faults.append(f"its split {name} {fault}")
        if any(each.get("aux") for each in nodes):
            faults.append(f"its split {name} has auxiliary datasets (aux), which the task encoder does not read")
    return found, faults


def addresses(file: Path, *, energon: int) -> list[str]:
    """The addresses, such as msc://profile/folder, that the splits of a metadataset name."""
    try:
        splits = _splits(file, energon=energon)
    except (TooMuch, TooLarge):  # `read` tells it
        return []
    nodes = chain.from_iterable(nodes for nodes, _ in splits.values())
    return [node["path"] for node in nodes if "://" in node["path"]]


def _splits(file: Path, *, energon: int) -> dict[str, _Nodes]:
    """What each split of a metadataset holds, in the form of the file's version.

    Raises:
        TooLarge, TooMuch: it holds more than is read.
    """
    data = _data(file, energon=energon)
    splits = data.get("splits") if isinstance(data, dict) else None
    if not isinstance(splits, dict):
        return {}
    nodes_of = _nodes_of_v2 if data.get("__class__") == "MetadatasetV2" else _nodes_of_v1
    return {str(name): nodes_of(node) for name, node in splits.items()}


def _reference(file: Path, node: _Node) -> Reference:
    """What a reference names; its path is relative to the file that it stands in."""
    path = os.path.normpath(file.parent / node["path"])
    split = node.get("split_part")
    if not isinstance(split, str):
        split = None
    is_configured = bool(node.get("dataset_config") or node.get("split_config"))
    return Reference(Path(path), split, is_configured)


def _nodes_of_v2(node: Any) -> _Nodes:
    """The references of a split of a MetadatasetV2."""
    if not isinstance(node, dict):
        return [], _NEEDS_ONE_OF
    kinds = [kind for kind in _ONE_OF if kind in node]
    if len(kinds) != 1:
        return [], _NEEDS_ONE_OF
    kind = kinds[0]
    if kind == "path":
        return _with_paths([node])
    if kind == "join":
        return _with_paths(_joined(node[kind]))

    # A blend: datasets, and joins of several.
    nodes = []
    for part in _items(node[kind]):
        if isinstance(part, dict) and "join" in part:
            nodes += _joined(part["join"])
        else:
            nodes.append(part)
    return _with_paths(nodes)


def _nodes_of_v1(node: Any) -> _Nodes:
    """The references of a split of the first version, which a file without `__class__` is of."""
    datasets = node.get("datasets") if isinstance(node, dict) else None
    if not isinstance(datasets, list):
        return [], (
            "needs datasets, a list; for path or blend, the file must begin with "
            "__module__: megatron.energon and __class__: MetadatasetV2"
        )
    return _with_paths(datasets)


def _joined(node: Any) -> list[Any]:
    """The datasets of a join, which is a map or a list of them."""
    if isinstance(node, dict):
        return list(node.values())
    return _items(node)


def _items(node: Any) -> list[Any]:
    """A list as it is; nothing of what is none."""
    return node if isinstance(node, list) else []


def _with_paths(nodes: list[Any]) -> _Nodes:
    """The references of a list that name a path, and what is wrong unless all do."""
    whole = [node for node in nodes if _has_path(node)]
    if not nodes or len(whole) < len(nodes):
        return whole, "needs a path for each of its datasets"
    return whole, ""


def _has_path(node: Any) -> bool:
    """Whether a reference names a path."""
    return isinstance(node, dict) and isinstance(node.get("path"), str)


def _data(file: Path, *, energon: int) -> Any:
    """What a metadataset holds; None when it cannot be read.

    Raises:
        TooLarge, TooMuch: it holds more than is read.
    """
    try:
        text = read_text(file, most=_BYTES)
        if energon < 7:
            return load_yaml(text, _PARSER)
        refuse_excess(text, _PARSER)
        return _as_rapid_yaml(text)
    except (TooLarge, TooMuch):
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _as_rapid_yaml(text: str) -> Any:
    """What a YAML text holds to Energon 7, which reads by Rapid YAML: an alias is its own text, and a date one too.

    Raises:
        ValueError: a key is no text, or there is another document.
        yaml.YAMLError: it is no YAML.
    """
    events = iter(yaml.parse(text, _PARSER))
    data = None
    for event in events:
        if isinstance(event, yaml.NodeEvent):
            data = _node(event, events)
            break
    if any(isinstance(event, yaml.DocumentStartEvent) for event in events):
        raise ValueError("there is another document")
    return data


def _node(event: yaml.Event, events: Iterator[yaml.Event]) -> Any:
    """The node that an event begins: texts, lists and mappings."""
    if isinstance(event, yaml.AliasEvent):
        return f"*{event.anchor}"
    if isinstance(event, yaml.ScalarEvent):
        return event.value
    children = []
    for child in events:
        if isinstance(child, yaml.CollectionEndEvent):
            break
        children.append(_node(child, events))
    if isinstance(event, yaml.SequenceStartEvent):
        return children
    names = children[::2]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("a key is no text")
    return dict(zip(names, children[1::2], strict=True))
