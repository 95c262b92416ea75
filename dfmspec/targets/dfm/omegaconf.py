"""OmegaConf, by which NVIDIA DFM's script reads a YAML file: its scalars, its merge, its interpolation of variables.

A model, without OmegaConf. It reads YAML 1.1, but floats need no point, dates are text, and keys may not come twice.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import yaml

from dfmspec.targets.dfm import Refused

Tree = dict[str, Any]

# The loader.

_FLOAT = "tag:yaml.org,2002:float"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


def _yaml_resolvers() -> dict[str, list[Any]]:
    """PyYAML's (tag, pattern) by first character, without those of floats and dates."""
    kept = {}
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept[first] = [each for each in resolvers if each[0] not in (_FLOAT, _TIMESTAMP)]
    return kept


_Loader.yaml_implicit_resolvers = _yaml_resolvers()
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+"
        r"|\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*"
        r"|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN))$"
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
    except (yaml.YAMLError, RecursionError) as error:
        raise Refused(str(error)) from error
    # An empty file overrides nothing.
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise Refused(f"a {type(data).__name__} cannot be merged")
    return data


# Merge and interpolation.


def merge(into: Tree, other: Tree) -> None:
    """Merge a tree into another: mappings into mappings, everything else replaces; ??? leaves what is there.

    Raises:
        Refused: a list stands where there is a section.
    """
    for key, value in other.items():
        if value == "???":
            continue
        is_section = isinstance(into.get(key), dict)
        if is_section and isinstance(value, dict):
            merge(into[key], value)
        elif is_section and isinstance(value, list):
            raise Refused(f"{key}: a list cannot be merged into a section")
        else:
            into[key] = copy.deepcopy(value)


def interpolated(node: Any, environment: Mapping[str, str]) -> Any:
    """A tree with its variables of the environment in place; ${CWD} stays a symbol.

    Raises:
        Refused: another interpolation, as a loop or a missing key would be.
    """
    if isinstance(node, dict):
        return {key: interpolated(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolated(value, environment) for value in node]
    if isinstance(node, str) and "${" in node.replace("${CWD}", ""):
        return re.sub(r"\$\{(?!CWD\})([^}]*)\}", lambda match: _variable(match[1], environment), node)
    return node


def _variable(text: str, environment: Mapping[str, str]) -> str:
    """What `oc.env:NAME` or `oc.env:NAME,DEFAULT` stands for."""
    match = re.fullmatch(r"oc\.env:(\w+)(?:,(.*))?", text)
    if match is None or (match[2] is None and match[1] not in environment):
        raise Refused(f"${{{text}}} cannot be resolved")
    return environment.get(match[1], match[2])
