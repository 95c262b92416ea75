"""A container around the script of a node: the script enters it by itself, and goes on there where it left off.

The bundle, the run directory and the paths of the configuration are mounted where they are; of the machine's other
places, what launcher.container_mounts names.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator

from dfmspec.plan.plan import Plan
from dfmspec.plan.shell import shell_path
from dfmspec.spec import containers
from dfmspec.spec.containers import is_file
from dfmspec.spec.paths import PATH_KEYS, SPEC_DIR, SPEC_DIR_UPSTREAM, in_run_dir, scheme

INSIDE = "DFMSPEC_INSIDE"
"""The variable by which a script knows that it is in its container already."""
_PASSED = (
    *("DFMSPEC_BASE", "DFMSPEC_SPEC_DIR", "DFMSPEC_RUN_DIR", "DFMSPEC_ATTEMPT_DIR", "DFMSPEC_RDZV_ID"),
    *("DFMSPEC_MASTER_PORT", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "TQDM_DISABLE"),
    *("WANDB_RUN_ID", "WANDB_API_KEY", "WANDB_MODE", "HF_TOKEN", "HF_HUB_OFFLINE"),
)
"""Variables that a script has in the container as around it, where they are set."""
START = "DFMSPEC_START"
"""The variable that names a folder of checkpoints to start from, which the plan does not know."""
_OF_THE_MACHINE = "DFM_ROOT PYTHONPATH"
"""Variables that say where something is on the machine, and not in the container."""
_READ = frozenset({"dataset.path", "checkpoint.load", "checkpoint.pretrained_checkpoint", "run.output_dir"})
"""Paths that a run does not write to, or that is made anyway."""
_BUNDLE = '"$DFMSPEC_BUNDLE"'
_RUN_DIR = '"$DFMSPEC_RUN_DIR"'


def engine_of(plan: Plan) -> str | None:
    """The engine of a plan's container; None: it has none. Earlier plans have no such key."""
    launcher = plan.launcher
    return containers.engine_of(launcher["kind"], launcher.get("container"), launcher.get("container_engine"))


def container_name(run: str, node: object) -> str:
    """What docker and podman call the container of a run's node: one at a time."""
    return f"dfmspec-{run}-node{node}"


def outside(plan: Plan, lines: list[str]) -> list[str]:
    """Lines that a script runs around its container alone."""
    if not lines or engine_of(plan) is None:
        return lines
    return [f'if [ -z "${{{INSIDE}:-}}" ]; then', *(f"    {line}" for line in lines), "fi"]


def entering(plan: Plan, node: int | None, script: str) -> list[str]:
    """Lines by which a script enters its container; none, where it has none, or its scheduler enters it.

    Args:
        plan: the plan.
        node: the rank of the node; None: the script takes it.
        script: the script's name in the bundle, and its words.
    """
    engine = engine_of(plan)
    if engine is None or engine == "pyxis":
        return []
    command = f"bash {_BUNDLE}/{script}"
    lines = [f"unset {_OF_THE_MACHINE}  # of this machine, not of the container", *_made(plan)]
    if engine == "apptainer":
        lines += _by_apptainer(plan, command)
    else:
        lines += _by_docker(plan, engine, "$NODE_RANK" if node is None else str(node), command)
    return [
        f'if [ -z "${{{INSIDE}:-}}" ]; then  # enter the container, and go on there',
        *(f"    {line}" for line in lines),
        "fi",
    ]


def srun_words(plan: Plan) -> list[str]:
    """The words of srun by which pyxis enters a container, as the shell has them; none, where it does not."""
    if engine_of(plan) != "pyxis":
        return []
    mounts = [f"{place}:{place}" for place in _places(plan)]
    mounts += [f"{source}:{target}" for source, target in _asked(plan)]
    started = f'"${{{START}:+,${START}:${START}}}"'
    return [
        "--container-image=" + _image(plan, _enroot_name),
        "--container-mounts=" + ",".join(mounts) + started,
        "--no-container-mount-home",
        *map(shlex.quote, plan.launcher["container_options"]),
    ]


def _enroot_name(image: str) -> str:
    """`nvcr.io/nvidia/dfm@sha256:...` as enroot has it: with # after the registry."""
    registry, slash, rest = image.partition("/")
    has_registry = registry and slash and re.search("[.:]", registry)
    return f"{registry}#{rest}" if has_registry else image


def _by_docker(plan: Plan, program: str, node: str, command: str) -> list[str]:
    """How docker and podman enter: a container with the run's name, which ends with the script around it."""
    name = container_name('$(basename "$DFMSPEC_RUN_DIR")', node)
    options = ["--network host", "--ipc host"]
    if plan.gpus_per_node:
        options.append("--gpus all" if program == "docker" else "--device nvidia.com/gpu=all")
    if program == "docker":  # whose containers are root's, with limits of their own
        options.append('--ulimit memlock=-1 --user "$(id -u):$(id -g)" --env HOME=/tmp')
    options += map(shlex.quote, plan.launcher["container_options"])
    image = _image(plan, str)
    passed = " ".join([*_PASSED, *sorted(set(plan.secrets) - set(_PASSED))])
    return [
        f'name="{name}"',
        f"trap '{program} kill \"$name\" > /dev/null 2>&1 || true' EXIT",
        "trap 'exit 143' HUP INT TERM",
        f"words=(--env {INSIDE}=1)",
        f'for name_of in {passed}; do words+=(--env "$name_of"); done',
        *_mounted(plan, "--volume"),
        f'{program} run --rm --init --name "$name" {" ".join(options)} \\',
        f'    --workdir {_RUN_DIR} "${{words[@]}}" {image} \\',
        f"    {command} &",
        "code=0",
        'wait "$!" || code=$?',
        "trap - EXIT",
        'exit "$code"',
    ]


def _by_apptainer(plan: Plan, command: str) -> list[str]:
    """How apptainer enters: as a process like any other, with the variables that are around it."""
    options = ["--nv"] if plan.gpus_per_node else []
    options += map(shlex.quote, plan.launcher["container_options"])
    named = _image(plan, "docker://{}".format)
    return [
        f"export {INSIDE}=1",
        "words=()",
        *_mounted(plan, "--bind"),
        " ".join(["exec apptainer exec", *options, f'--pwd {_RUN_DIR} "${{words[@]}}"', named, "\\"]),
        f"    {command}",
    ]


def _mounted(plan: Plan, option: str) -> list[str]:
    """Lines that put what is mounted into `words`, each place once."""
    places = " ".join([*_places(plan), f'${{{START}:+"${START}"}}'])
    return [
        f"for place in {places}; do",
        f'    case "${{words[*]}} " in *" $place:$place "*) ;; *) words+=({option} "$place:$place") ;; esac',
        "done",
        *(f"words+=({option} {source}:{target})" for source, target in _asked(plan)),
    ]


def _places(plan: Plan) -> Iterator[str]:
    """What is mounted where it is, as the shell has it."""
    yield _BUNDLE
    yield _RUN_DIR
    yield from (_on_the_machine(path) for path in sorted(set(_paths(plan))))


def _asked(plan: Plan) -> Iterator[tuple[str, str]]:
    """What the spec asks to be mounted, and where, as the shell has it."""
    for mount in plan.launcher["container_mounts"]:
        source, _, target = mount.partition(":")
        yield shlex.quote(source), shlex.quote(target or source)


def _image(plan: Plan, name_of: Callable[[str], str]) -> str:
    """The image as the shell has it: a file, or a name as the engine has it."""
    image: str = plan.launcher["container"]
    return shell_path(image) if is_file(image) else shlex.quote(name_of(image))


def _made(plan: Plan) -> list[str]:
    """Folders that a run writes to, and that must be there to be mounted."""
    written = sorted(set(_paths(plan, PATH_KEYS - _READ)))
    return ["mkdir -p " + " ".join(_on_the_machine(path) for path in written)] if written else []


def _paths(plan: Plan, keys: frozenset[str] = PATH_KEYS) -> Iterator[str]:
    """The paths of the configuration that lie outside of the run directory."""
    for key in keys:
        section, _, name = key.partition(".")
        value = plan.config.get(section, {}).get(name)
        if isinstance(value, str) and value and not in_run_dir(value) and scheme(value) is None:
            yield value


def _on_the_machine(path: str) -> str:
    """A path of the configuration as a script finds it, by the name that the configuration has."""
    written = shell_path(path.replace(SPEC_DIR_UPSTREAM, SPEC_DIR))
    return f'"$(realpath -ms -- {written})"'
