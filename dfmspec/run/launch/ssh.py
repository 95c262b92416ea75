"""Launcher ssh: the system's ssh, one connection and one torchrun a node.

The run directory is on a file system that all nodes share. A terminal is asked for, so that a node's processes end
(SIGHUP) when the connection does.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from functools import partial

from dfmspec.errors import PreflightError
from dfmspec.plan.plan import Plan
from dfmspec.plan.scripts import MASTER_PORT
from dfmspec.processes import die_with_parent
from dfmspec.run.launch import Place
from dfmspec.run.launch.remote import ask_to_stop, port_of, start_script, variables

OUTLIVES = False
RUNS_SCRIPTS = True
check = None
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=4", "LogLevel=ERROR")
"""No question, no endless wait; after the user's own options, which ssh prefers."""
_SSH_FAILED = 255
"""What ssh itself ends with; any other code is the command's."""
_UNRESOLVED = 3
"""What the question to a node ends with when it does not know the address of node 0."""
_QUESTION = f"""test -r "$1" || exit 1
test -z "$2" || ! command -v getent > /dev/null || getent ahosts "$2" > /dev/null || exit {_UNRESOLVED}"""
"""What a node is asked: whether it sees its script, and where it has getent, whether it resolves a name."""


def files(plan: Plan) -> dict[str, str]:
    """None: the scripts of the nodes are all."""
    return {}


def attach(plan: Plan, place: Place) -> None:
    """None: the processes end with their connection, so there is nothing to go on watching."""
    return


def launch(plan: Plan, place: Place) -> SshRun:
    """Start one ssh a node.

    Raises:
        PreflightError: there is no ssh, or a node cannot be reached, does not see the run directory or cannot resolve
            the name of node 0.
    """
    if shutil.which("ssh") is None:
        raise PreflightError("ssh is not installed")
    hosts = plan.launcher["hosts"]
    env = variables(plan, place)
    port = str(port_of(place))
    if plan.nnodes > 1:
        env["MASTER_ADDR"] = hosts[0].rpartition("@")[2]  # without the user
        env["MASTER_PORT"] = port
    else:
        env[MASTER_PORT] = port

    # What each node runs lies in the run directory.
    starts = [str(start_script(plan, place, node, env)) for node in range(plan.nnodes)]
    commands = [_ssh(plan, host, "bash", start) for host, start in zip(hosts, starts, strict=True)]
    head = plan.env.get("MASTER_ADDR") or env.get("MASTER_ADDR", "")
    _require_reachable(plan, starts, head)
    return SshRun(place, hosts, commands, sorted(env))


def _ssh(plan: Plan, host: str, *command: str) -> list[str]:
    """The words by which a host runs a command."""
    words = ["ssh", "-tt", *plan.launcher["ssh_options"]]
    for option in _OPTIONS:
        words += ["-o", option]
    return [*words, "--", host, shlex.join(command)]


def _require_reachable(plan: Plan, starts: list[str], head: str) -> None:
    """Ask every node at once whether it can be reached, sees its script and knows the address of node 0.

    Args:
        plan: the plan.
        starts: the script of each node.
        head: the name of node 0 by which the others find it; "" where nobody looks for it.

    Raises:
        PreflightError: a node cannot be reached, or does not see it, or cannot resolve the name.
    """
    hosts = plan.launcher["hosts"]
    probes = []
    for host, start in zip(hosts, starts, strict=True):
        probe = subprocess.Popen(
            _ssh(plan, host, "sh", "-c", _QUESTION, "sh", start, head),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        probes.append(probe)

    for host, start, probe in zip(hosts, starts, probes, strict=True):
        _, errors = probe.communicate()
        said = errors.decode(errors="replace").strip() or "the connection failed"
        if probe.returncode == _SSH_FAILED:
            raise PreflightError(f"{host} cannot be reached by ssh: {said}; try: ssh {host} true")
        if probe.returncode == _UNRESOLVED:
            raise PreflightError(_unresolved(host, head, is_set="MASTER_ADDR" in plan.env))
        if probe.returncode:
            raise PreflightError(
                f"{host} does not see {start}; run.output_dir must be on a file system that every node shares"
            )


def _unresolved(host: str, head: str, *, is_set: bool) -> str:
    """The error of a node that does not know where node 0 is.

    Args:
        host: the node.
        head: the name of node 0.
        is_set: the spec names it; otherwise it is the first of launcher.hosts.
    """
    if is_set:
        return f"{host} cannot resolve cluster.master_addr {head}; set it to an address of node 0 that every node knows"
    return (
        f"{host} cannot resolve {head}, where the nodes are to meet: it may be a name that ssh alone knows; "
        "set cluster.master_addr to the address of node 0"
    )


class SshRun:
    """The connections of a run."""

    def __init__(self, place: Place, hosts: list[str], commands: list[list[str]], names: list[str]) -> None:
        self.attempt = place.attempt
        self._attempt_dir = place.attempt_dir
        self._hosts = hosts
        self._commands = commands
        self._names = names
        self._processes: list[subprocess.Popen[bytes]] = []
        for node, command in enumerate(commands):
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=place.attempt_dir.node(node).ssh_log.open("wb"),
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  one thread here
            )
            self._processes.append(process)

    def poll(self) -> list[int | None]:
        """Exit code of each node's torchrun, which ssh passes on; None while it runs."""
        return [process.poll() for process in self._processes]

    def stop(self, number: int) -> None:
        """Ask the ranks to save and stop."""
        ask_to_stop(self._attempt_dir, number)

    def kill(self) -> None:
        """Close the connections; the nodes end what they run."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.terminate()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)

    def described(self) -> list[tuple[str, list[str], list[str]]]:
        """(host, argv, names of the variables set) of each node."""
        return [(host, command, self._names) for host, command in zip(self._hosts, self._commands, strict=True)]

    def again(self) -> bool:
        """Nobody starts it again."""
        return False

    def last_word(self) -> str:
        """Nothing beyond the logs."""
        return ""
