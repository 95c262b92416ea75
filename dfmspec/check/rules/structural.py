"""SPC1xx, SPC2xx, SPC4xx, SPC501, CKP101: what is found while a spec is read.

The codes are given out by `document`, `load`, `structure` and `suppressions`.
"""

from __future__ import annotations

from collections.abc import Iterable

from dfmspec.check.rules.base import ALL, DFM, ERROR, HINT, WARNING, Rule, View
from dfmspec.diagnostics import FAULT, UNASKED, Finding, Severity


def _found_earlier(view: View) -> Iterable[Finding]:
    return ()


def _rule(code: str, name: str, severity: Severity, why: str, source: str, targets: tuple[str, ...] = ALL) -> Rule:
    return Rule(
        code,
        name,
        severity,
        _found_earlier,
        why,
        source,
        targets=targets,
        level="load",
    )


FAULT_RULE = Rule(
    FAULT,
    "fault-of-dfmspec",
    ERROR,
    _found_earlier,
    (
        "A rule, or the derivation of a value, failed on this spec. What the others find is shown; "
        "what this one would have found is not known, so the exit code is 70."
    ),
    "dfmspec itself",
    level="fault",
)

UNASKED_RULE = Rule(
    UNASKED,
    "rules-not-asked",
    HINT,
    _found_earlier,
    (
        "A value that a rule needs is broken, or follows from one that is: what the rule would say is not known until "
        "that is mended."
    ),
    "dfmspec itself",
    level="load",
)

_MERGE = "Megatron-Bridge training/utils/omegaconf_utils.py"

RULES = (
    # The text.
    _rule(
        "SPC101",
        "malformed-yaml",
        ERROR,
        (
            "Nothing can be said of a file that is no YAML mapping of sections; "
            "upstream stops with a parser's traceback on every rank."
        ),
        "YAML 1.2",
    ),
    _rule(
        "SPC102",
        "duplicate-key",
        ERROR,
        "PyYAML keeps the last of two in silence, other readers stop: what trains depends on who reads the file.",
        "YAML 1.2, section 3.2.1",
    ),
    _rule(
        "SPC103",
        "ambiguous-scalar",
        WARNING,
        (
            "YAML 1.1 readers take on, 010 and 1:30 for true, 8 and 90, "
            "and upstream takes y, none and None for truthy text, all in silence."
        ),
        "YAML 1.1 and 1.2 core schemas",
    ),
    # Files that a spec builds on, and overrides.
    _rule(
        "SPC104",
        "unreadable-base",
        ERROR,
        "What the spec builds on is not there, so its values are missing.",
        "extends and config_file",
    ),
    _rule(
        "SPC105",
        "circular-extends",
        ERROR,
        "A file that lies under itself has no lowest layer.",
        "extends and config_file",
    ),
    _rule(
        "SPC110",
        "unknown-profile",
        ERROR,
        "The machines, the account and the paths of the profile are missing, and defaults would stand in for them.",
        "profile and --profile",
    ),
    _rule(
        "SPC111",
        "key-not-for-profiles",
        ERROR,
        "A profile is laid under many specs: a name or a matrix in it would be of all of them.",
        "profile and --profile",
    ),
    # What values refer to.
    _rule(
        "SPC106",
        "unresolved-reference",
        ERROR,
        "A reference that leads nowhere would be text, and the run would have a folder or a number by that name.",
        "${env:NAME}, ${env:NAME:-default} and ${spec.KEY}",
    ),
    _rule(
        "SPC108",
        "circular-reference",
        ERROR,
        "A key that refers to itself, by whatever way, has no value.",
        "${spec.KEY}",
    ),
    _rule(
        "SPC109",
        "malformed-matrix",
        ERROR,
        "What the cells of a matrix are is not certain, so none is planned.",
        "matrix",
    ),
    _rule(
        "SPC107",
        "malformed-override",
        ERROR,
        (
            "Upstream's command line either stops, or does nothing in silence: "
            "~key deletes a copy, +key adds a key that is dropped later."
        ),
        "Hydra's override grammar; " + _MERGE,
    ),
    # Keys and their values.
    _rule(
        "SPC201",
        "unknown-key",
        ERROR,
        (
            "In a file, upstream drops a key that it does not know with one log line a rank "
            "and trains with the default, in silence for most; on the command line it stops."
        ),
        _MERGE,
    ),
    _rule(
        "SPC202",
        "wrong-type",
        ERROR,
        (
            "Upstream's merge checks no types: a quoted number fails in the middle of arithmetic, "
            'quoted "false" is true in silence, a null or a word may replace a whole section.'
        ),
        _MERGE,
    ),
    _rule(
        "SPC203",
        "value-not-allowed",
        ERROR,
        (
            "Upstream checks few of its choices when it starts; "
            "an unknown word fails late, or counts as another choice in silence."
        ),
        "the field's declared choices",
    ),
    _rule(
        "SPC204",
        "value-out-of-range",
        ERROR,
        (
            "Upstream accepts many impossible numbers: a model without layers, a pack without tokens, "
            "no iterations, all in silence."
        ),
        "the field's meaning",
    ),
    _rule(
        "SPC205",
        "key-not-settable",
        ERROR,
        "The key holds a function. Upstream puts its own back after the merge, in silence.",
        _MERGE,
        targets=DFM,
    ),
    _rule(
        "SPC206",
        "key-of-another-target",
        ERROR,
        "The key means something to another target only; upstream would drop it in silence.",
        "schemas/targets",
    ),
    # Comments that suppress.
    _rule(
        "SPC401",
        "unused-suppression",
        WARNING,
        "A comment that suppresses nothing hides the next fault of its kind.",
        "# dfmspec: ignore[CODE] reason",
    ),
    _rule(
        "SPC402",
        "malformed-suppression",
        WARNING,
        "A suppression without a known code, or without a reason, is one that nobody can judge later.",
        "# dfmspec: ignore[CODE] reason",
    ),
    # What is none of the spec's.
    FAULT_RULE,
    UNASKED_RULE,
    # Names that only the how-to knows.
    _rule(
        "CKP101",
        "documented-alias",
        HINT,
        (
            "The how-to names keys that upstream does not have: "
            "there they are dropped in silence (a file) or refused (the command line). "
            "dfmspec takes them as meant."
        ),
        "the how-to",
    ),
)
