"""dfmspec init: a commented spec to start from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from dfmspec import __version__
from dfmspec.cli.voice import note
from dfmspec.errors import UsageError
from dfmspec.figures import counted
from dfmspec.files import write_named
from dfmspec.read.fixes import scalar
from dfmspec.resources import resource
from dfmspec.spec.gpus import GPUS
from dfmspec.spec.paths import is_relative
from dfmspec.spec.recipes import recipe_text
from dfmspec.targets import DEFAULT_TARGET, TARGETS, recipes_of, target_module

_TEMPLATE = """\
# yaml-language-server: $schema={schema}
# Check it with: dfmspec validate {file}      What a key means: dfmspec explain KEY
spec_version: 1
recipe: {recipe}  # {sizes}
target: {target}  # {target_words}

cluster:
  nnodes: {nodes}
  nproc_per_node: {gpus}  # {what}; {world} in all
{device}{launcher}
{data}
model:
  tensor_model_parallel_size: 1  # TP: ranks that share each layer; the rest is data parallel
  context_parallel_size: 1

train:
  global_batch_size: {gbs}  # packed sequences an iteration, a multiple of the data-parallel size {world}
  micro_batch_size: 1
  train_iters: {iterations}
{evaluation}
optimizer:
  lr: {lr}  # the decay to a tenth of it over train_iters, and the warm-up, follow by themselves

checkpoint:
  save_interval: {save}  # iterations; the last one is always saved

logger:
  log_interval: 10

rng:
  seed: 1234
"""


def _listed_recipes(target: str) -> str:
    """The recipes of a target, separated by commas."""
    return ", ".join(recipes_of(target))


_TARGETS = ", ".join(TARGETS)
_RECIPES = "; ".join(f"{target}: {_listed_recipes(target)}" for target in TARGETS)

_File = Annotated[
    Path,
    typer.Argument(help="The spec to write; it must not exist. - prints it."),
]
_Recipe = Annotated[
    str | None,
    typer.Option(help=f"What to start from: {_RECIPES}."),
]
_Target = Annotated[
    str | None,
    typer.Option(help=f"What trains: {_TARGETS}; by itself {DEFAULT_TARGET}.", show_default=False),
]
_Nodes = Annotated[
    int | None,
    typer.Option(help="Nodes; by itself 1.", min=1, show_default=False),
]
_Gpus = Annotated[
    int | None,
    typer.Option(help="GPUs of a node, or with --cpu its processes; by itself 8, or 2.", min=1, show_default=False),
]
_Gpu = Annotated[
    str | None,
    typer.Option(help=f"Their model: {', '.join(GPUS)}."),
]
_Launcher = Annotated[
    str | None,
    typer.Option(help="What starts several nodes: slurm, or ssh with --hosts."),
]
_Hosts = Annotated[
    str | None,
    typer.Option(help="The nodes, as ssh names them, node 0 first: node0,node1.", metavar="HOST,HOST"),
]
_DatasetPath = Annotated[
    str | None,
    typer.Option(help="Folder of a WebDataset; without one, dfmspec draws its own butterflies."),
]
_Cpu = Annotated[
    bool,
    typer.Option("--cpu", help="For a trial on CPUs: a small network, small pictures, some minutes."),
]
_Yes = Annotated[
    bool,
    typer.Option("--yes", "-y", help="Ask nothing, on a terminal either."),
]


class Wanted(NamedTuple):
    """What a new spec is to be for."""

    recipe: str
    target: str
    nodes: int
    gpus: int
    """GPUs of a node; on the CPU, its processes."""
    gpu: str | None
    launcher: str | None
    hosts: tuple[str, ...]
    dataset_path: str | None
    """As seen from the spec's folder; None: the target's data of a new spec."""
    cpu: bool

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.nodes * self.gpus


def init(
    file: _File = Path("spec.yaml"),
    recipe: _Recipe = None,
    target: _Target = None,
    nodes: _Nodes = None,
    gpus: _Gpus = None,
    gpu: _Gpu = None,
    launcher: _Launcher = None,
    hosts: _Hosts = None,
    dataset_path: _DatasetPath = None,
    cpu: _Cpu = False,
    yes: _Yes = False,
) -> None:
    """Write a commented spec that runs as it stands.

    On a terminal it asks what the options do not say, in at most five questions.

    Example: dfmspec init my_run.yaml --recipe dit_s --gpus 2
    """
    is_printed = str(file) == "-"
    if not is_printed and file.exists():
        raise UsageError(f"{file} exists, and nothing of yours is overwritten; name another file")
    may_ask = not yes and not is_printed and sys.stdin.isatty() and sys.stderr.isatty()
    if may_ask:
        cpu, nodes, gpus, launcher, hosts, dataset_path = _asked(cpu, nodes, gpus, launcher, hosts, dataset_path)
    wanted = _wanted(recipe, target, nodes, gpus, gpu, launcher, hosts, cpu)

    # A path of the command line is relative to the working directory, one in a spec to that spec.
    folder = Path() if is_printed else file.parent
    if is_relative(dataset_path):
        dataset_path = os.path.relpath(dataset_path, folder)
    wanted = wanted._replace(dataset_path=dataset_path or None)
    if is_printed:
        typer.echo(spec_text(str(file), wanted, schema=SCHEMA_URL), nl=False)
        return

    # A new file.
    file.parent.mkdir(parents=True, exist_ok=True)
    text = spec_text(str(file), wanted, schema=schema_beside(file))
    write_named(file, text)
    typer.echo(file)
    if "path: null" in text:
        note("set dataset.path to your WebDataset before you run it")


_Answers = tuple[bool, int | None, int | None, str | None, str | None, str | None]


def _asked(
    cpu: bool,
    nodes: int | None,
    gpus: int | None,
    launcher: str | None,
    hosts: str | None,
    dataset_path: str | None,
) -> _Answers:
    """What the options leave open, asked on the terminal: at most five questions, each with its usual answer."""
    if not cpu and nodes is None and gpus is None:
        answer = ""
        while answer not in ("y", "n", "yes", "no"):
            answer = _ask("Train on GPUs, y or n", "y").lower()
        cpu = answer.startswith("n")
    if gpus is None:
        gpus = _ask_number("Processes", 2) if cpu else _ask_number("GPUs of a node", 8)
    if nodes is None and not cpu:
        nodes = _ask_number("Nodes", 1)
    if (nodes or 1) > 1 and launcher is None:
        answer = _ask("What starts them: slurm, or the hosts for ssh (node0,node1)", "slurm")
        launcher, hosts = ("slurm", None) if answer == "slurm" else ("ssh", answer)
    if dataset_path is None:
        answer = _ask("Folder of your WebDataset, if you have one", "none: drawn butterflies")
        dataset_path = None if answer.startswith("none") else answer
    return cpu, nodes, gpus, launcher, hosts, dataset_path


def _ask(question: str, usual: str) -> str:
    """An answer from the terminal, by stderr, for stdout is data; what is usual for an empty line.

    Raises:
        Abort: the terminal was closed.
    """
    typer.echo(f"{question} [{usual}]: ", nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise typer.Abort
    return line.strip() or usual


def _ask_number(question: str, usual: int) -> int:
    """A number of at least one; asked again until it is one."""
    while True:
        answer = _ask(question, str(usual))
        if answer.isdecimal() and int(answer):
            return int(answer)
        typer.echo("a number, please, of at least 1", err=True)


def _wanted(
    recipe: str | None,
    target: str | None,
    nodes: int | None,
    gpus: int | None,
    gpu: str | None,
    launcher: str | None,
    hosts: str | None,
    cpu: bool,
) -> Wanted:
    """What is asked for, where it goes together.

    Raises:
        UsageError: it does not.
    """
    target = target or DEFAULT_TARGET
    if target not in TARGETS:
        raise UsageError(f"--target {target}: one of {_TARGETS}")
    if cpu and not target_module(target).OWN:
        raise UsageError("--cpu: DFM's own script needs GPUs; leave --target out")
    recipe = recipe or ("dit_tiny" if cpu else TARGETS[target].default_recipe)
    if recipe not in recipes_of(target):
        raise UsageError(f"--recipe {recipe}: for target {target}, one of {_listed_recipes(target)}")
    if gpu is not None and gpu not in GPUS:
        raise UsageError(f"--gpu {gpu}: one of {', '.join(GPUS)}")
    if cpu and gpu is not None:
        raise UsageError(f"--cpu and --gpu {gpu} exclude each other; leave one out")

    # Several nodes are started by something.
    nodes = nodes or 1
    named = tuple(filter(None, (hosts or "").split(",")))
    if launcher is None and named:
        launcher = "ssh"
    if nodes > 1 and launcher is None and not cpu:
        raise UsageError(f"--nodes {nodes}: name what starts them: --launcher slurm, or --hosts node0,node1 for ssh")
    if launcher not in (None, "slurm", "ssh"):
        raise UsageError(
            f"--launcher {launcher}: slurm or ssh; Kubernetes needs an image and volumes, which "
            "https://dfmspec.dev/howto/kubernetes.html tells of"
        )
    if launcher == "ssh" and len(named) != nodes:
        raise UsageError(f"--launcher ssh needs --hosts with {counted(nodes, 'name')}, node 0 first, as in node0,node1")
    if named and launcher != "ssh":
        raise UsageError(f"--hosts is for launcher ssh; leave it or --launcher {launcher} out")
    usual = 2 if cpu else min(8, GPUS[gpu].per_node if gpu else 8)
    return Wanted(recipe, target, nodes, gpus or usual, gpu, launcher, named, None, cpu)


SCHEMA_URL = f"https://dfmspec.dev/schemas/{__version__}/experiment.schema.json"
"""Where the schema of this version is published."""
_SCHEMA_BESIDE = Path(".dfmspec") / "experiment.schema.json"


def schema_beside(file: Path) -> str:
    """The schema's place for an editor, as seen from a spec: in this checkout, or else a copy beside the spec.

    A colleague who has the folder has it too, and the editor needs no network.
    """
    place = resource("schemas/experiment.schema.json")
    if Path.cwd() in place.parents:
        return os.path.relpath(place, file.parent)
    copy = file.parent / _SCHEMA_BESIDE
    copy.parent.mkdir(exist_ok=True)
    text = place.read_text()
    if not copy.exists() or copy.read_bytes() != text.encode():
        write_named(copy, text)
    return _SCHEMA_BESIDE.as_posix()


def spec_text(file: str, wanted: Wanted, *, schema: str) -> str:
    """A commented spec that is valid as it stands.

    Args:
        file: where it is to be written; - for stdout.
        wanted: what it is for.
        schema: the place of the schema, for an editor.
    """
    world = wanted.world
    trained_by = target_module(wanted.target)
    data = trained_by.SPEC_DATA
    evaluation = trained_by.SPEC_EVALUATION
    if wanted.dataset_path is not None:
        data = f"dataset:\n  path: {scalar(wanted.dataset_path)}\n  num_workers: 4\n"

    # A trial ends after some minutes; on mock data after 1,024 batches a rank. Else about 32 packs an iteration.
    is_mock = "source: mock" in data
    if wanted.cpu:
        global_batch_size, iterations, save_interval = world, 320, 160
        data = data.replace("resolution: 256", "resolution: 64\n  num_samples: 1024")
        evaluation = "  eval_interval: 80\n  eval_iters: 4  # 0: never evaluate\n"
    elif is_mock:
        global_batch_size, iterations, save_interval = world, 500, 500
    else:
        global_batch_size, iterations, save_interval = world * max(1, 32 // world), 10000, 1000

    return _TEMPLATE.format(
        schema=schema,
        file=file,
        recipe=wanted.recipe,
        sizes=sizes_of(wanted.recipe),
        target=wanted.target,
        target_words=trained_by.ABOUT,
        nodes=wanted.nodes,
        gpus=wanted.gpus,
        what="processes" if wanted.cpu else "one process a GPU",
        world=world,
        device=_device_lines(wanted),
        launcher=_launcher_lines(wanted),
        data=data,
        gbs=global_batch_size,
        iterations=iterations,
        lr="5.0e-3" if wanted.cpu else "1.0e-4",
        save=save_interval,
        evaluation=evaluation,
    )


def _device_lines(wanted: Wanted) -> str:
    if wanted.cpu:
        return "  device: cpu  # a trial without GPUs\n"
    return f"  gpu: {wanted.gpu}\n" if wanted.gpu else ""


def _launcher_lines(wanted: Wanted) -> str:
    """The launcher of several nodes."""
    if wanted.launcher == "slurm":
        return "\nlauncher:\n  kind: slurm  # partition, account and time_limit are keys of this section too\n"
    if wanted.launcher == "ssh":
        return f"\nlauncher:\n  kind: ssh\n  hosts: [{', '.join(map(scalar, wanted.hosts))}]\n"
    return ""


_SIZES = {
    "num_layers": "layers",
    "num_joint_layers": "joint",
    "num_single_layers": "single layers",
    "hidden_size": "wide",
    "num_attention_heads": "heads",
}


def sizes_of(recipe: str) -> str:
    """A recipe's network in a few words: `28 layers, 1152 wide, 16 heads`."""
    import yaml

    model = yaml.safe_load(recipe_text(recipe))["model"]
    sizes = [f"{model[key]} {words}" for key, words in _SIZES.items() if key in model]
    return ", ".join(sizes)
