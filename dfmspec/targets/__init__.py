"""Targets, which are what trains: how each derives values, what command starts it, and all else that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple, Protocol

from dfmspec.diagnostics import Severity
from dfmspec.spec.catalogue import Catalogue, catalogue_of
from dfmspec.spec.recipes import RECIPES

Values = Mapping[str, Any]


class Reading(Protocol):
    """A configuration as a script sees it."""

    tree: dict[str, Any]
    """Section -> field -> value."""
    skipped: list[str]
    """Keys that it dropped."""

    def __getitem__(self, key: str) -> Any:
        """A value by its dotted key."""


def _never(values: Values) -> bool:
    return False


class Derived(NamedTuple):
    """A value that follows from others, unless the user sets it."""

    key: str
    sources: tuple[str, ...]
    value: Callable[[Values], Any]
    formula: str
    """How, in words: shown as the value's origin."""
    differing: Severity | None = None
    """What another value of the user's is, when a source is the user's too; None: their choice."""
    alone: bool = False
    """Another value is a finding also where no source is the user's: nothing legal can mean it."""
    meant: Callable[[Values], bool] = _never
    """When another value is plainly meant, and no finding."""


class Work(NamedTuple):
    """What training on one pack is."""

    tokens: int
    flops: float
    """Forward and backward, without recomputation; a multiply-add counts two."""
    held: str
    """What the pack was taken to hold, in words."""


class Told(NamedTuple):
    """What a line of a script's log says."""

    kind: str
    """started, iteration, evaluation, saving, saved, trained, stopped, nothing_to_load or random_weights."""
    iteration: int | None = None
    time: float | None = None
    """In seconds since the epoch, by this machine's zone; None: the line does not say."""
    fields: Mapping[str, Any] = {}
    """Of an iteration: loss (None: it is no number), seconds, samples (the global batch), nan and skipped (iterations
    without a step), and where the line has them lr, grad_norm, loss_scale. Of an evaluation: loss, split. Of what was
    saved: path.
    """


class Source(NamedTuple):
    """Code that a target is known by."""

    name: str
    revision: str
    module: str
    """The package; or, with a suffix, a file in the checkout."""
    digest: str
    """sha256 over the names and contents of its Python files."""


class Together(NamedTuple):
    """Versions that do not go together."""

    name: str
    """A distribution."""
    versions: str
    """The beginning of the versions of which this holds; "": of all."""
    needs: tuple[str, ...]
    """Another distribution that must be older, as `name<version`; or modules that it must find."""
    mends: str
    """The words of pip that mend it."""
    why: str
    with_data: bool = False
    """It matters for data that is read, and not for random data."""


class Upstream(NamedTuple):
    """What is known of a script that knows nothing of dfmspec."""

    name: str
    variable: str
    """The variable that says where its checkout is."""
    root: str
    """Where it is otherwise."""
    sources: tuple[Source, ...]
    together: tuple[Together, ...]
    handler: str
    """`module:class` of its handler of a signal, a context that nothing of it enters."""
    told: Callable[[str], Told | None]
    """What a line of its log says; None: nothing that a run is judged by."""


class Target(Protocol):
    """A module of this package: all that differs from one target to another."""

    DERIVED: tuple[Derived, ...]
    ENTRY: str
    """Its training script, in its checkout."""
    UPSTREAM: Upstream | None
    """Whose script that is; None: this package's, and it travels in the bundle."""
    OWN: bool
    """Whether this package's trainer trains: its code is guarded, and its configuration read by our loader."""
    LAYOUTS_AGREE: bool
    """Whether every layout and number of loader processes gives the same numbers, up to rounding."""
    HAS_PIPELINE: bool
    """Whether pipeline stages work."""
    ENERGON: int
    """The major version of Energon that reads its data."""
    LATENT_CHANNELS: int | None
    """The channels that its task encoder takes; None: those of model.in_channels."""
    TEXT_TOKENS: int | None
    """The tokens to which its task encoder cuts a text; None: any number."""
    TEXT_MULTIPLE: int
    """What a text's tokens are a multiple of under context parallelism."""
    DETERMINISTIC_ENV: Mapping[str, str]
    """The variables without which its script refuses model.deterministic_mode."""
    SCRIPT_FLAGS: tuple[str, ...]
    """The flags of its script that `dfmspec import` knows."""
    OWN_FILE: str | None
    """A file of overrides that its script reads where no --config-file is given."""
    ABOUT: str
    """What it is, for the comment of a new spec."""
    SUBJECT: str
    """What it is, for the manual, in Markdown."""
    SPEC_DATA: str
    """The data of a new spec that is given no dataset, as YAML."""
    SPEC_EVALUATION: str
    """The keys of evaluation in a new spec, as YAML."""

    def config(self, values: Values) -> dict[str, Any]:
        """What the plan's config.yaml holds."""

    def arguments(self, values: Values, origins: Mapping[str, Any]) -> list[str]:
        """The script's arguments, with CONFIG for the configuration's file."""

    def read_back(self, values: Values, text: str) -> Reading | None:
        """What the script makes of the text of config.yaml, where it has a reader of its own."""

    def parameters(self, values: Values) -> int:
        """Trained parameters of the network."""

    def work(self, values: Values) -> Work:
        """What training on one pack is."""


# The table of targets is read at every start; a target's module is imported when a spec names it.


class Entry(NamedTuple):
    """A line of TARGETS: what is needed of a target before its module is imported."""

    module: str
    schema: str
    """Its catalogue, a JSON Schema among the package's files."""
    revision: str
    """Of the code that the catalogue is of: a version, or the beginning of a commit. A spec may pin it."""
    code: str
    """Whose code trains; rules about that code hold for all of its targets."""
    network: str
    """What is trained; rules of a network hold for all of its targets."""
    recipes: tuple[str, ...]
    """The families of recipes that it takes, of RECIPES."""
    default_recipe: str
    """What a spec starts from that names no recipe."""


TARGETS = {
    "megatron_core": Entry(
        module="dfmspec.targets.megatron_core",
        schema="schemas/targets/megatron_core-0.16.1.schema.json",
        revision="0.16.1",
        code="dfmspec",
        network="dit",
        recipes=("dit", "dit_of_wide_heads"),
        default_recipe="dit_xl",
    ),
    "dfm": Entry(
        module="dfmspec.targets.dfm.dit",
        schema="schemas/targets/dfm-7cb7634.schema.json",
        revision="7cb7634",
        code="NVIDIA DFM",
        network="dit",
        recipes=("dit",),
        default_recipe="dit_xl",
    ),
    "dfm_wan": Entry(
        module="dfmspec.targets.dfm.wan",
        schema="schemas/targets/dfm-7cb7634-wan.schema.json",
        revision="7cb7634",
        code="NVIDIA DFM",
        network="wan",
        recipes=("wan",),
        default_recipe="wan_1_3b",
    ),
    "dfm_flux": Entry(
        module="dfmspec.targets.dfm.flux",
        schema="schemas/targets/dfm-7cb7634-flux.schema.json",
        revision="7cb7634",
        code="NVIDIA DFM",
        network="flux",
        recipes=("flux",),
        default_recipe="flux_schnell",
    ),
}
"""What a spec may name as its target. A new one is a file here, its schema, and a line in this table."""
DEFAULT_TARGET = "megatron_core"
"""What a spec is for that names no target."""
DEFAULT_UPSTREAM = "dfm"
"""What an override file or a command is taken to be for, where its script does not tell."""
CONFIG = "config.yaml"
"""The configuration's file in a bundle."""


def unpinned(text: str) -> tuple[str, bool]:
    """The target of `dfm@7cb7634`, and whether that is a revision which its catalogue knows; a commit may be longer."""
    name, at, revision = text.partition("@")
    if not at or name not in TARGETS:
        return text, True
    known = TARGETS[name].revision
    is_longer = len(known) >= 7 and "." not in known and revision.startswith(known)
    return name, revision == known or is_longer


@lru_cache
def target_module(name: str) -> Target:
    """The module of a target."""
    module: Any = import_module(TARGETS[name].module)
    return module  # type: ignore[no-any-return]


def targets_of(*, code: str | None = None, network: str | None = None) -> tuple[str, ...]:
    """The targets whose trainer is of some code, whose network is of some kind, or both."""
    found = []
    for name, entry in TARGETS.items():
        has_code = code in (None, entry.code)
        has_network = network in (None, entry.network)
        if has_code and has_network:
            found.append(name)
    return tuple(found)


def catalogue(target: str) -> Catalogue:
    """The legal keys of a target."""
    return catalogue_of(TARGETS[target].schema)


def recipes_of(target: str) -> tuple[str, ...]:
    """The recipes that a target takes."""
    families = (RECIPES[family] for family in TARGETS[target].recipes)
    return tuple(chain.from_iterable(families))


# Numbers, as more than one target writes them.


def round_float(value: float) -> float:
    """A float to 12 digits: 0.1 * 9e-5 as 9e-06, not 9.000000000000001e-06."""
    return float(f"{value:.12g}")


def minutes_of(text: str | None) -> float | None:
    """Minutes of a time limit as Slurm writes it; None where there is none, which 0 means too.

    That is minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]].
    """
    if text is None:
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]

    # After the days: hours, and what is left out at the end is 0.
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + minutes + seconds / 60 or None

    # Without days: the hours are left out first, then the seconds.
    if len(parts) < 3:
        parts = [0, *parts]
    if len(parts) < 3:
        parts = [*parts, 0]
    hours, minutes, seconds = parts
    return hours * 60 + minutes + seconds / 60 or None
