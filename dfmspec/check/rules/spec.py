"""SPC3xx: values that follow from others, that have no effect, or that something overwrites; secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dfmspec.check.rules.base import DFM, DFM_DIT, ERROR, HINT, LAYERS, WARNING, Rule, View, as_yaml, excludes, path
from dfmspec.diagnostics import Edit, Finding, Path, dotted
from dfmspec.read.document import Document
from dfmspec.read.interpolation import SYNTAX, variables
from dfmspec.redaction import REFERENCE, is_a_switch, names_a_secret, secrets_in, secrets_of
from dfmspec.spec.paths import PATH_KEYS, RUN_DIR
from dfmspec.targets import Derived, catalogue, target_module
from dfmspec.targets.dfm.script import OVERLAPS

_DECAY = "scheduler.lr_decay_iters"
_SIGMA = "model.sigma_data"
_DEVIATION = "model.init_method_std"
_PRECISION = "mixed_precision.recipe"

_NOT_PASSING = ("spec", "profile", "extends", "config file", "default", "derived")
"""Layers that stay; what a flag or an override sets holds for one run."""
_TOLD_ELSEWHERE = (_SIGMA, _DEVIATION)
"""Keys without effect of which SPC305 and SPC307 say more."""
_HYDRA_QUOTED = r"[=,{}#()~]|^\s|\s$"
"""What Hydra's grammar takes for more than text."""
_OURS = ("cluster", "launcher", "run", "data", "name", "recipe", "target", "spec_version")
"""Sections and words of a spec that upstream's command line never sees."""


def _stale_derived(view: View) -> Iterator[Finding]:
    derived = view.resolved.derived
    for derivation in target_module(view.target).DERIVED:
        key = derivation.key
        if derivation.differing is None or key not in derived or not view.set_by_user(key):
            continue
        sources = [source for source in derivation.sources if view.is_set_by_user(source)]
        value = view[key]
        if derivation.meant(view.resolved.values):
            continue
        # A person set both; or nothing legal can mean the other value. Where nothing is derived, nothing differs.
        is_judged = bool(sources) or derivation.alone
        if is_judged and derived[key] is not None and value != derived[key]:
            yield _stale(view, derivation, sources)


def _stale(view: View, derivation: Derived, users: Sequence[str]) -> Finding:
    """That a value is not what the sources make it; a fix, where the sources stand in files like the value itself."""
    key = derivation.key
    value = view[key]
    expected = view.resolved.derived[key]
    because = _reason(users or derivation.sources, derivation.formula)

    # A decay that ends before the run does may be meant.
    severity = derivation.differing
    if key == _DECAY and value < expected:
        severity = HINT

    # What holds for one run alone is no reason to edit a file.
    origins = view.resolved.origins
    is_passing = any(origins[source].layer not in _NOT_PASSING for source in users)
    fix = () if is_passing else (Edit("set", path(key), expected),)
    message = f"{key} is {as_yaml(value)}, but {because} makes it {as_yaml(expected)}"
    return Finding(path(key), message, f"remove {key} to have it derived", severity, fix)


def _reason(sources: Sequence[str], formula: str) -> str:
    named = ", ".join(sources)
    return named if formula.startswith(sources[0]) else f"{named} ({formula})"


def _null_kept(view: View) -> Iterator[Finding]:
    resolved = view.resolved
    for derivation in target_module(view.target).DERIVED:
        key = derivation.key
        derived = resolved.derived.get(key)
        is_kept = view.is_set_by_user(key) and key not in resolved.unknown and resolved.values[key] is None
        if is_kept and derived is not None:
            message = f"{key}: null is kept, where {as_yaml(derived)} would be derived ({derivation.formula})"
            yield Finding(path(key), message, "nothing to do if that is meant; leave the key out to have it derived")


class _Written(NamedTuple):
    """A value that the plan writes out although nobody set it."""

    words: str
    at: str
    """The key."""


def _derived_for_upstream(view: View) -> Iterator[Finding]:
    written = [*_written_values(view), *_written_classes(view)]
    if written:
        words = ", ".join(value.words for value in written)
        yield Finding(
            path(written[0].at),
            f"derived, where upstream would keep its recipe's value or fail: {words}",
            "the plan writes these out; set them to differ",
        )


def _written_values(view: View) -> Iterator[_Written]:
    """Values that follow from the user's, and that upstream would leave at its recipe's."""
    legal = catalogue(view.target)
    resolved = view.resolved
    for derivation in target_module(view.target).DERIVED:
        key = derivation.key
        if key in resolved.unknown or key not in resolved.values:
            continue
        value = resolved.values[key]
        if resolved.origins[key].is_set_by_user:
            continue
        field: dict[str, Any] = legal.field(key) or {}
        kept = field.get("x-upstream")
        # A null of the user's stands for the derived value.
        is_nulled = resolved.spec.origins[key].is_set_by_user
        users = [source for source in derivation.sources if view.is_set_by_user(source)]
        differs = kept is not None and value != kept
        if is_nulled or (users and differs):
            words = f"{key} {as_yaml(value)}"
            if kept is not None:
                words += f" (not {as_yaml(kept)})"
            yield _Written(words, key)


def _written_classes(view: View) -> Iterator[_Written]:
    """The classes of sections that upstream's recipe leaves out, and of which the user gives a value."""
    sections = {key.partition(".")[0] for key in view.set_by_user(*view.resolved.spec.set_by_user)}
    for section in sorted(sections):
        key = f"{section}._target_"
        if key in view.resolved.values and not view.is_set_by_user(key):
            yield _Written(key, key)


def _marked(view: View) -> Iterator[tuple[str, dict[str, object]]]:
    """The user's keys that have a value, or a null that is kept, each with its entry in the catalogue."""
    legal = catalogue(view.target)
    resolved = view.resolved
    for key in resolved.spec.set_by_user:
        if key in resolved.unknown:
            continue
        field = legal.field(key)
        if field and resolved.origins[key].is_set_by_user:
            yield key, field


def _without_effect(view: View) -> Iterator[Finding]:
    for key, field in _marked(view):
        reason = field.get("x-no-effect")
        if not reason or key in _TOLD_ELSEWHERE:
            continue
        # What upstream has anyway, or what follows from other keys, does no harm.
        kept = field.get("x-upstream", field.get("default"))
        derived = view.resolved.derived.get(key)
        if view.or_null(key) not in (kept, derived):
            yield Finding(path(key), f"{key} has no effect: {reason}", "remove it")


def _overwritten(view: View) -> Iterator[Finding]:
    resolved = view.resolved
    for key, field in _marked(view):
        source = str(field.get("x-overwritten-by", ""))
        if source not in resolved.values or source in resolved.unknown:
            continue
        # Without a recipe there is no precision section to be copied.
        if view.or_null(_PRECISION) is None:
            continue
        kept = view.or_null(source)
        if view[key] != kept:
            message = f"{key} {as_yaml(view[key])} is overwritten at start by {source} {as_yaml(kept)}"
            yield Finding(path(key), message, f"set {source} instead")


def _overwritten_by_overlap(view: View) -> Iterator[Finding]:
    for key in view.set_by_user(*(derivation.key for derivation in OVERLAPS)):
        name = key.split(".")[1]
        value = view[key]
        kept = view.resolved.derived.get(key, value)
        if value != kept:
            message = (
                f"with a comm_overlap section, {key} {as_yaml(value)} is overwritten: upstream has {as_yaml(kept)}"
            )
            yield Finding(path(key), message, f"set comm_overlap.{name} instead")


def _changes_what_initialisers_follow(view: View) -> bool:
    """Whether a person set the layers or the deviation to other values than upstream's initialisers were made for."""
    if not view.set_by_user(LAYERS, _DEVIATION):
        return False
    return bool(view[LAYERS] != 28 or view[_DEVIATION] != 0.02)


def _interpolations(view: View) -> Iterator[Finding]:
    # Most specs have nothing of the kind, nor a variable that could hold it.
    if not any("$" in document.text or "???" in document.text for document in view.resolved.spec.documents):
        return
    for key, _ in _marked(view):
        for place, text in _texts_at(path(key), view.or_null(key)):
            hint = "write the value itself"
            if text == "???":
                what = "the marker ??? keeps the default in silence"
            elif "${" in text.replace(RUN_DIR, ""):
                what = f"a spec refers by {SYNTAX}, and to {RUN_DIR}"
                hint = _meant_reference(text, view) or hint
            elif key in PATH_KEYS and (variable := re.search(r"\$([A-Za-z_]\w*)", text)):
                what = "no shell fills it in, and the folder would have that name"
                hint = f"write ${{env:{variable[1]}}}"
            else:
                continue
            yield Finding(place, f"{key} {text}: {what}", hint)


def _texts_at(place: Path, value: object) -> Iterator[tuple[Path, str]]:
    """The texts in a value, each with its path."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts_at((*place, name), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts_at((*place, index), inner)


def _meant_reference(text: str, view: View) -> str | None:
    """What was probably meant by OmegaConf's own kinds of interpolation, or by a shell's."""
    for key in re.findall(r"\$\{([A-Za-z_][\w.]*)\}", text):
        if key in view.resolved.values:
            return f"write ${{spec.{key}}}"
        if "." not in key:
            return f"write ${{env:{key}}} to have it filled in here; ${key} is left to a shell"
    variable = re.search(r"\$\{oc\.env:(\w+)", text)
    return f"write ${{env:{variable[1]}}}" if variable else None


def _secrets(view: View) -> Iterator[Finding]:
    told: set[str] = set()
    # Few specs have anything that looks like one, and need not be gone through value by value.
    # What is written over several lines is whole in its value alone.
    values = {key: view.or_null(key) for key, _ in _marked(view)}
    texts = [text for key, value in values.items() for _, text in _texts_at(path(key), value)]
    is_suspect = has_secrets(view.resolved.spec.documents) or bool(secrets_in("\n".join(texts)))
    for key, value in values.items():
        # What a variable held is in the value by now, and its name says what it was.
        for name in variables(view.resolved.origins[key].note):
            if names_a_secret(name):
                message = (
                    f"{key} takes the value of {name}, a secret by its name, and a spec's values are kept and shared"
                )
                yield Finding(path(key), message, _instead(key, name))
        for place, text in _texts_at(path(key), value):
            # A reference names where the secret is.
            is_reference = place[-1] == REFERENCE and len(place) > 2
            if is_reference or not _is_secret(place, text, is_suspect=is_suspect):
                continue
            told.add(text)
            name = dotted(place)
            if len(place) > 2 and isinstance(value, dict):
                name = str(place[2])
            message = f"{name} looks like a secret, and a spec is kept, hashed and shared"
            yield Finding(place, message, _instead(key, str(place[-1])))
    yield from _secrets_beside(view, told)


def has_secrets(documents: Iterable[Document]) -> bool:
    """Whether what was read may have a secret: by its look, or filled in from a variable."""
    return any("${env:" in document.text or secrets_of(document.text) for document in documents)


def _is_secret(place: Path, text: str, *, is_suspect: bool) -> bool:
    """Whether a text is a secret by the name before it, or has one in it."""
    if is_a_switch(text) or text.startswith("$"):
        return False
    if names_a_secret(str(place[-1]).rpartition(".")[2]):
        return True
    return is_suspect and bool(secrets_in(text))


def _instead(key: str, name: str) -> str:
    """How a run gets a secret that is not in its spec."""
    if not key.startswith("launcher."):
        return "remove it here and renew it; a run is given its secrets by launcher.env: NAME: {secret: env:NAME}"
    if key == "launcher.env":
        return f"write {name}: {{secret: env:{name}}} (or file:PATH, cmd:COMMAND); remove it here and renew it"
    return "give it by launcher.env: NAME: {secret: env:NAME}; remove it here and renew it"


def _secrets_beside(view: View, told: set[str]) -> Iterator[Finding]:
    """Secrets in comments, or in what another layer lies over: a bundle holds the spec's text."""
    for document in view.resolved.spec.documents:
        for secret in secrets_of(document.text):
            text = document.text[secret.start : secret.end]
            if any(text in known for known in told):
                continue
            line = document.text.count("\n", 0, secret.start) + 1
            message = f"line {line} of {document.file} has what looks like a secret, and a spec is kept and shared"
            yield Finding((), message, "remove it, in a comment too, and renew it")


def _quoting(view: View) -> Iterator[Finding]:
    for override in view.resolved.spec.overrides:
        key, _, value = override.partition("=")
        if key.partition(".")[0] in _OURS or value == "~":
            continue
        is_quoted = value.startswith(("[", "{", "'", '"'))
        if re.search(_HYDRA_QUOTED, value) and not is_quoted:
            message = f"upstream's command line would refuse {value!r} unquoted; the plan puts it into config.yaml"
            yield Finding(path(key), message, "nothing to do with dfmspec; for torchrun by hand, quote it")


def _other_dataset(view: View) -> Iterator[Finding]:
    if view.is_mock:
        mark = "x-energon-only"
        message = "this key belongs to a WebDataset, and data.source is mock"
        hint = "remove it"
    else:
        mark = "x-mock-only"
        message = "this key belongs to random data, and data.source is webdataset"
        hint = "remove it, or set data.source: mock"
    # The first key stands for all.
    for key, field in _marked(view):
        if mark in field:
            yield Finding(path(key), message, hint)
            return


RULES = (
    # Values that follow from others.
    Rule(
        "SPC301",
        "stale-derived-value",
        WARNING,
        _stale_derived,
        (
            "A value that follows from another was set to something else; "
            "one of the two is not what was meant. Upstream keeps both in silence."
        ),
        "NVIDIA DFM recipes/dit/dit.py copies these values once, when the recipe is built",
    ),
    Rule(
        "SPC302",
        "derived-for-upstream",
        HINT,
        _derived_for_upstream,
        (
            "Upstream derives these once, inside its recipe, and never again: "
            "after an override they would keep the recipe's values, fail, or train another model than was asked for. "
            "The plan writes the derived values out."
        ),
        (
            "NVIDIA DFM recipes/dit/dit.py; "
            "megatron-core TransformerConfig.__post_init__ fills only what is null; "
            "Megatron-Bridge omegaconf_utils needs _target_ for a section that the recipe leaves out"
        ),
        targets=DFM,
    ),
    # Values that upstream drops or replaces.
    Rule(
        "SPC303",
        "key-without-effect",
        WARNING,
        _without_effect,
        "Nothing on the path of this training reads the key: the run is not what the file says, in silence.",
        "found by reading every reader of the field at the pinned revision",
        targets=DFM,
    ),
    Rule(
        "SPC304",
        "key-overwritten",
        ERROR,
        _overwritten,
        (
            "The precision section is copied over model, optimizer and ddp before training starts; "
            "the value set here is lost in silence, but for a line at debug level."
        ),
        "Megatron-Bridge training/mixed_precision.py, setup",
        targets=DFM,
    ),
    Rule(
        "SPC305",
        "fixed-sigma-data",
        ERROR,
        excludes(
            lambda v: v[_SIGMA] != 0.5,
            at=_SIGMA,
            message="DFM trains with sigma_data 0.5 whatever the key says, and samples with the key's value",
            hint="set it to 0.5; target: megatron_core has diffusion.sigma_data",
        ),
        (
            "Training hard-codes 0.5 and inference rescales with the configured value, "
            "so samples come out wrong without an error."
        ),
        "NVIDIA DFM model/dit/dit_step.py and inference_dit_model.py",
        targets=DFM_DIT,
    ),
    Rule(
        "SPC306",
        "overlap-overwritten",
        ERROR,
        _overwritten_by_overlap,
        (
            "comm_overlap writes its own values, or its defaults, over model, ddp and optimizer; "
            "what stands there is lost in silence."
        ),
        "Megatron-Bridge training/comm_overlap.py, setup",
        targets=DFM,
    ),
    Rule(
        "SPC307",
        "initialisation-not-rescaled",
        HINT,
        excludes(
            _changes_what_initialisers_follow,
            at=lambda v: v.set_by_user(LAYERS, _DEVIATION)[0],
            message="upstream built its initialisers for 28 layers and a standard deviation of 0.02, and keeps them",
            hint="no key mends it; target: megatron_core scales with the model that is asked for",
        ),
        (
            "The initialisers are functions made in the recipe; "
            "an override changes the numbers they were made from, not the functions."
        ),
        "megatron-core TransformerConfig.__post_init__, init_method and output_layer_init_method",
        targets=DFM_DIT,
    ),
    # Words that mean something else than themselves.
    Rule(
        "SPC308",
        "interpolation-in-spec",
        ERROR,
        _interpolations,
        (
            "OmegaConf resolves, keeps or refuses such text by rules of its own, "
            "in silence and depending on the environment of each rank."
        ),
        "OmegaConf's interpolation and missing-value syntax",
    ),
    Rule(
        "SPC309",
        "key-of-the-other-dataset",
        ERROR,
        _other_dataset,
        (
            "The two kinds of data have different classes upstream: in a file the key is dropped in silence, "
            "on the command line it is an error."
        ),
        "NVIDIA DFM recipes/dit/dit.py, DiffusionDataModuleConfig and DiTMockDataModuleConfig",
        targets=DFM,
    ),
    Rule(
        "SPC310",
        "override-needs-quotes",
        HINT,
        _quoting,
        (
            "Hydra's grammar gives these characters a meaning, so upstream refuses the words as they stand; "
            "dfmspec takes them as text and writes them into config.yaml."
        ),
        "Hydra's override grammar",
        targets=DFM,
    ),
    # A null, which is a value to some keys.
    Rule(
        "SPC311",
        "null-kept",
        HINT,
        _null_kept,
        (
            "To some keys null is a value like others: no checkpoints, no FP8, no packing. "
            "The plan has it, and a spec that left it to be derived by writing null trains something else."
        ),
        "the types of upstream's dataclasses, and what its script was seen to do with null",
        targets=DFM,
    ),
    # What must not stand in a file.
    Rule(
        "SEC101",
        "secret-in-spec",
        ERROR,
        _secrets,
        "The spec, the plan and the manifest are written to disk, hashed and shared; a secret in them is public.",
        "the habit of every code host",
    ),
)
