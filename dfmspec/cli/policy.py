"""dfmspec policy: what the site's policy says, and whether it does what it is meant to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmspec.errors import FINDINGS, UsageError

if TYPE_CHECKING:
    from dfmspec.check.policy_file import Policy, PolicyRule

app = typer.Typer(
    help="List the rules of the site's policy, and try them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_File = Annotated[
    Path | None,
    typer.Argument(help="A policy's file; without one, the policies that hold here."),
]


@app.command("show")
def show(file: _File = None) -> None:
    """List the rules of the policies that hold here, or of a file.

    Example: dfmspec policy show
    """
    for policy in _chosen(file):
        typer.echo(policy.document.file)
        for rule in policy.rules:
            typer.echo(f"  {_described(rule)}")
        if policy.contact:
            typer.echo(f"  contact: {policy.contact}")


@app.command("test")
def test(file: _File = None) -> None:
    """Try the `tests` of a policy: each a spec, with the keys at which the policy has a finding.

    Rules that no test breaks are told. Exit code 0: all came out as they should. 1: one did not, or the file is
    malformed.

    Example: dfmspec policy test policy.yaml
    """
    failed = 0
    for policy in _chosen(file):
        name = policy.document.file
        broken: set[PolicyRule] = set()
        for number, case in enumerate(policy.tests, 1):
            said = _tried(policy, case, broken)
            title = case.get("name") or f"test {number}"
            failed += bool(said)
            typer.echo(f"{name}: {title}: {said or 'as it should be'}")
        if not policy.tests:
            typer.echo(f"{name}: it has no tests", err=True)
        for rule in policy.rules:
            if rule not in broken:
                typer.echo(f"{name}:{rule.place.line}: no test breaks this: {_described(rule)}", err=True)
    if failed:
        raise typer.Exit(FINDINGS)


def _chosen(file: Path | None) -> list[Policy]:
    """The policy of a file, or those that hold here.

    Raises:
        UsageError: there is none.
    """
    from dfmspec.check.policy_file import VARIABLE, policies, policy_of
    from dfmspec.check.report.text import report

    found = [policy_of(str(file))] if file is not None else policies()
    if not found:
        raise UsageError(f"no policy holds here: there is none in the site's folder, and {VARIABLE} names none")
    problems = [problem for policy in found for problem in policy.problems]
    if problems:
        texts = {policy.document.file: policy.document.text for policy in found}
        typer.echo(report(problems, texts), err=True)
        raise typer.Exit(FINDINGS)
    return found


def _described(rule: PolicyRule) -> str:
    """A rule on one line."""
    from dfmspec.check.rules.base import as_yaml, listed

    limit = rule.limit
    if isinstance(limit, list):
        limit = listed(map(as_yaml, limit))
    elif isinstance(limit, dict):
        limit = "; ".join(f"{folder}: {listed(owners)}" for folder, owners in limit.items())
    words = f"{rule.key} {rule.shape}"
    if limit is not True:
        words += f" {limit}"
    if rule.when:
        words += " when " + ", ".join(f"{key} is {as_yaml(value)}" for key, value in rule.when.items())
    return f"{words} ({rule.severity.label})"


def _tried(policy: Policy, case: Mapping[str, Any], broken: set[PolicyRule]) -> str:
    """What came out otherwise than a test says; the rules that it breaks are added to `broken`."""
    import yaml

    from dfmspec.check.policy import judged_of, violations
    from dfmspec.diagnostics import Severity, dotted
    from dfmspec.read.load import load_spec
    from dfmspec.read.resolve import resolve_spec

    text = yaml.safe_dump(dict(case.get("spec", {})))
    loaded = load_spec(policy.document.file, case.get("overrides", ()), text=text)
    wrong = [problem.message for problem in loaded.problems if problem.severity is Severity.ERROR]
    if wrong:
        return f"its spec has an error: {wrong[0]}"
    found = set()
    for rule, finding in violations(policy, judged_of(resolve_spec(loaded))):
        broken.add(rule)
        found.add(dotted(finding.path))
    wanted = set(case["finds"])
    missed = ", ".join(sorted(wanted - found))
    surplus = ", ".join(sorted(found - wanted))
    said = [f"nothing is found at {missed}"] if missed else []
    if surplus:
        said.append(f"something is found at {surplus}")
    return "; ".join(said)
