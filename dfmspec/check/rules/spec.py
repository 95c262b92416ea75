"""SPC3xx: values that follow from others, that have no effect, or that something overwrites; secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dfmspec.check.rules.base import DFM, DFM_DIT, ERROR, HINT, LAYERS, WARNING, Rule, View, excludes, path, shown
from dfmspec.diagnostics import Edit, Finding
from dfmspec.spec.secrets import is_a_token, names_a_secret
from dfmspec.targets import catalogue, target_module
from dfmspec.targets.dfm.script import OVERLAPS


def _stale_derived(view: View) -> Iterator[Finding]:
    for derivation in target_module(view.target).DERIVED:
        key = derivation.key
        if derivation.differing is None or key not in view.resolved.derived or not view.users(key):
            continue
        users = [source for source in derivation.sources if view.is_users(source)]
        value, expected = view[key], view.resolved.derived[key]
        if derivation.meant(view.resolved.values):
            continue
        differing = derivation.differing
        passing = any(view.resolved.origins[source].layer not in ("spec", "extends", "config file", "default", "derived") for source in users)  # a flag, an override
        if (users or derivation.alone) and value != expected:
            yield Finding(
                path(key), f"{key} is {shown(value)}, but {_reason(users or derivation.sources, derivation.formula)} makes it {shown(expected)}",
                f"remove {key} to have it derived", HINT if key == "scheduler.lr_decay_iters" and value < expected else differing, () if passing else (Edit("set", path(key), expected),),
            )  # fmt: skip


def _reason(sources: Sequence[str], formula: str) -> str:
    named = ", ".join(sources)
    return named if formula.startswith(sources[0]) else f"{named} ({formula})"


def _derived_for_upstream(view: View) -> Iterator[Finding]:
    legal, resolved, said, places = catalogue(view.target), view.resolved, [], []
    for derivation in target_module(view.target).DERIVED:
        key = derivation.key
        if key in resolved.unknown or key not in resolved.values or (resolved.origins[key].is_users and resolved.values[key] is not None):
            continue
        kept = (legal.field(key) or {}).get("x-upstream")
        nulled = resolved.spec.origins[key].is_users  # the user's null, which stands for the derived value
        users = [source for source in derivation.sources if view.is_users(source)]
        if nulled or (users and resolved.values[key] != kept and kept is not None):
            said.append(f"{key} {shown(resolved.values[key])}" + (f" (not {shown(kept)})" if kept is not None else ""))
            places.append(key if nulled else users[0])
    for section in sorted({key.partition(".")[0] for key in resolved.spec.users}):
        target_key = f"{section}._target_"
        if target_key in resolved.values and not view.is_users(target_key):
            said.append(target_key)
            places.append(view.section(section)[0])
    if said:
        yield Finding(path(places[0]), f"derived, where upstream would keep its recipe's value or fail: {', '.join(said)}", "the plan writes these out; set them to differ")


def _marked(view: View) -> Iterator[tuple[str, dict[str, object]]]:
    legal = catalogue(view.target)
    for key in view.resolved.spec.users:
        if key not in view.resolved.unknown and (field := legal.field(key)) and view.resolved.values[key] is not None:
            yield key, field


_TOLD_ELSEWHERE = ("model.sigma_data", "model.init_method_std")  # SPC305 and SPC307 say more


def _without_effect(view: View) -> Iterator[Finding]:
    for key, field in _marked(view):
        harmless = (field.get("x-upstream", field.get("default")), view.resolved.derived.get(key))
        if (reason := field.get("x-no-effect")) and view[key] not in harmless and key not in _TOLD_ELSEWHERE:
            yield Finding(path(key), f"{key} has no effect: {reason}", "remove it")


def _overwritten(view: View) -> Iterator[Finding]:
    for key, field in _marked(view):
        source = str(field.get("x-overwritten-by", ""))
        if source and source in view.resolved.values and source not in view.resolved.unknown and view["mixed_precision.recipe"] is not None:
            kept = view[source]
            if view[key] != kept:
                yield Finding(path(key), f"{key} {shown(view[key])} is overwritten at start by {source} {shown(kept)}", f"set {source} instead")


def _overwritten_by_overlap(view: View) -> Iterator[Finding]:
    for key in view.users(*(derivation.key for derivation in OVERLAPS)):
        name, kept = key.split(".")[1], view.resolved.derived.get(key, view[key])
        if view[key] != kept:
            yield Finding(path(key), f"with a comm_overlap section, {key} {shown(view[key])} is overwritten: upstream has {shown(kept)}", f"set comm_overlap.{name} instead")


def _texts(value: object) -> Iterator[str]:
    """The texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _interpolations(view: View) -> Iterator[Finding]:
    for key, _ in _marked(view):
        for text in _texts(view[key]):
            if "${" in text.replace("${RUN_DIR}", "") or text == "???":
                what = "the marker ??? keeps the default in silence" if text == "???" else "interpolations are not part of a spec, except ${RUN_DIR}"
                yield Finding(path(key), f"{key} {text}: {what}", "write the value itself")


def _secrets(view: View) -> Iterator[Finding]:
    for key, _ in _marked(view):
        value = view[key]
        for name, text in value.items() if isinstance(value, dict) else ((key, value),):
            if not isinstance(text, str) or not text or text.startswith("$"):
                continue
            if names_a_secret(str(name).rpartition(".")[2]) or is_a_token(text):
                yield Finding(path(key), f"{name} looks like a secret, and a spec is kept, hashed and shared", "export it where the run starts; remove it here and renew it")


_HYDRA_QUOTED = r"[=,{}#()~]|^\s|\s$"
_OURS = ("cluster", "launcher", "run", "data", "name", "recipe", "target", "spec_version")


def _quoting(view: View) -> Iterator[Finding]:
    for override in view.resolved.spec.overrides:
        key, _, value = override.partition("=")
        if key.partition(".")[0] in _OURS or value == "~":
            continue
        if re.search(_HYDRA_QUOTED, value) and not value.startswith(("[", "{", "'", '"')):
            yield Finding(path(key), f"upstream's command line would refuse {value!r} unquoted; the plan puts it into config.yaml", "nothing to do with dfmspec; for torchrun by hand, quote it")


def _other_dataset(view: View) -> Iterator[Finding]:
    mark = "x-energon-only" if view.is_mock else "x-mock-only"
    for key, field in _marked(view):
        if mark in field:
            yield Finding(path(key), "this key belongs to a WebDataset, and data.source is mock" if view.is_mock else "this key belongs to random data, and data.source is webdataset",
                          "remove it" if view.is_mock else "remove it, or set data.source: mock")  # fmt: skip
            return


RULES = (
    Rule(
        "SPC301", "stale-derived-value", WARNING, _stale_derived,
        "A value that follows from another was set to something else; one of the two is not what was meant. Upstream keeps both in silence.",
        "NVIDIA DFM recipes/dit/dit.py copies these values once, when the recipe is built",
    ),
    Rule(
        "SPC302", "derived-for-upstream", HINT, _derived_for_upstream,
        "Upstream derives these once, inside its recipe, and never again: after an override they would keep the recipe's values, fail, or train another "
        "model than was asked for. The plan writes the derived values out.",
        "NVIDIA DFM recipes/dit/dit.py; megatron-core TransformerConfig.__post_init__ fills only what is null; Megatron-Bridge omegaconf_utils needs _target_ "
        "for a section that the recipe leaves out", DFM,
    ),
    Rule(
        "SPC303", "key-without-effect", WARNING, _without_effect,
        "Nothing on the path of this training reads the key: the run is not what the file says, in silence.",
        "found by reading every reader of the field at the pinned revision", DFM,
    ),
    Rule(
        "SPC304", "key-overwritten", ERROR, _overwritten,
        "The precision section is copied over model, optimizer and ddp before training starts; the value set here is lost in silence, but for a line at debug level.",
        "Megatron-Bridge training/mixed_precision.py, setup", DFM,
    ),
    Rule(
        "SPC305", "fixed-sigma-data", ERROR,
        excludes(lambda v: v["model.sigma_data"] != 0.5, at="model.sigma_data",
                 message="DFM trains with sigma_data 0.5 whatever the key says, and samples with the key's value",
                 hint="set it to 0.5; target: megatron_core has diffusion.sigma_data"),
        "Training hard-codes 0.5 and inference rescales with the configured value, so samples come out wrong without an error.",
        "NVIDIA DFM model/dit/dit_step.py and inference_dit_model.py", DFM_DIT,
    ),
    Rule(
        "SPC306", "overlap-overwritten", ERROR, _overwritten_by_overlap,
        "comm_overlap writes its own values, or its defaults, over model, ddp and optimizer; what stands there is lost in silence.",
        "Megatron-Bridge training/comm_overlap.py, setup", DFM,
    ),
    Rule(
        "SPC307", "initialisation-not-rescaled", HINT,
        excludes(lambda v: v.users(LAYERS, "model.init_method_std") and (v[LAYERS] != 28 or v["model.init_method_std"] != 0.02),
                 at=lambda v: v.users(LAYERS, "model.init_method_std")[0],
                 message="upstream built its initialisers for 28 layers and a standard deviation of 0.02, and keeps them",
                 hint="no key mends it; target: megatron_core scales with the model that is asked for"),
        "The initialisers are functions made in the recipe; an override changes the numbers they were made from, not the functions.",
        "megatron-core TransformerConfig.__post_init__, init_method and output_layer_init_method", DFM_DIT,
    ),
    Rule(
        "SPC308", "interpolation-in-spec", ERROR, _interpolations,
        "OmegaConf resolves, keeps or refuses such text by rules of its own, in silence and depending on the environment of each rank.",
        "OmegaConf's interpolation and missing-value syntax",
    ),
    Rule(
        "SPC309", "key-of-the-other-dataset", ERROR, _other_dataset,
        "The two kinds of data have different classes upstream: in a file the key is dropped in silence, on the command line it is an error.",
        "NVIDIA DFM recipes/dit/dit.py, DiffusionDataModuleConfig and DiTMockDataModuleConfig", DFM,
    ),
    Rule(
        "SPC310", "override-needs-quotes", HINT, _quoting,
        "Hydra's grammar gives these characters a meaning, so upstream refuses the words as they stand; dfmspec takes them as text and writes them into config.yaml.",
        "Hydra's override grammar", DFM,
    ),
    Rule(
        "SEC101", "secret-in-spec", ERROR, _secrets,
        "The spec, the plan and the manifest are written to disk, hashed and shared; a secret in them is public.",
        "the habit of every code host",
    ),
)  # fmt: skip
