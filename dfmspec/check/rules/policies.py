"""POL: what a site's policy says of a spec. The rules themselves are the policy's, as data (`check/policy.py`)."""

from __future__ import annotations

from collections.abc import Iterable

from dfmspec.check.rules.base import ERROR, Rule, View
from dfmspec.diagnostics import Finding

_SOURCE = "the policy of the site, or the one that DFMSPEC_POLICY names"


def _judged_elsewhere(view: View) -> Iterable[Finding]:
    return ()


def _rule(code: str, name: str, why: str) -> Rule:
    return Rule(code, name, ERROR, _judged_elsewhere, why, _SOURCE, level="policy")


MALFORMED = _rule(
    "POL100",
    "malformed-policy",
    "A policy of which a part is not understood would let pass what it is there to stop, so no spec passes.",
)
_LIMIT = _rule(
    "POL101",
    "beyond-a-limit-of-the-site",
    "A job that asks for more than the site gives waits for ever, is refused by the scheduler, or takes others' share.",
)
_VALUE = _rule(
    "POL102",
    "value-not-allowed-by-the-site",
    "The site has agreed on a few values: other partitions, images or accounts are not there, or not meant for this.",
)
_REQUIRED = _rule(
    "POL103",
    "key-required-by-the-site",
    "Without it nobody knows who pays for the job, or when it ends.",
)
_FORBIDDEN = _rule(
    "POL104",
    "key-forbidden-by-the-site",
    "The site sets it itself, or its use has harmed others.",
)
_FOLDER = _rule(
    "POL105",
    "place-not-allowed-by-the-site",
    "Checkpoints on a disk that is too small, too slow, or swept stop the job, and others' jobs with it.",
)
_OWNER = _rule(
    "POL106",
    "place-of-somebody-else",
    "What is written there is in the way of those whom the folder belongs to.",
)

RULES = (MALFORMED, _LIMIT, _VALUE, _REQUIRED, _FORBIDDEN, _FOLDER, _OWNER)
RULE_OF = {
    "max": _LIMIT,
    "min": _LIMIT,
    "multiple_of": _LIMIT,
    "allowed": _VALUE,
    "matches": _VALUE,
    "required": _REQUIRED,
    "forbidden": _FORBIDDEN,
    "under": _FOLDER,
    "owners": _OWNER,
}
"""The rule that each shape of a policy's entry is told by."""
