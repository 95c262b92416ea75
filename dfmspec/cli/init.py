"""dfmspec init: a commented spec to start from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.errors import UsageError
from dfmspec.files import write_named
from dfmspec.read.fixes import scalar
from dfmspec.resources import resource
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
  nproc_per_node: {gpus}  # one process a GPU; {world} in all
{device}
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
  lr: 1.0e-4  # the decay to a tenth of it over train_iters, and the warm-up, follow by themselves

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
    str,
    typer.Option(help=f"What trains: {_TARGETS}."),
]
_Nodes = Annotated[
    int,
    typer.Option(help="Nodes.", min=1),
]
_Gpus = Annotated[
    int,
    typer.Option(help="GPUs of a node.", min=1),
]
_DatasetPath = Annotated[
    str | None,
    typer.Option(help="Folder of a WebDataset; without one, dfmspec draws its own butterflies."),
]
_Cpu = Annotated[
    bool,
    typer.Option("--cpu", help="For a trial on CPUs."),
]


def init(
    file: _File = Path("spec.yaml"),
    recipe: _Recipe = None,
    target: _Target = DEFAULT_TARGET,
    nodes: _Nodes = 1,
    gpus: _Gpus = 8,
    dataset_path: _DatasetPath = None,
    cpu: _Cpu = False,
) -> None:
    """Write a commented spec that runs as it stands.

    Example: dfmspec init my_run.yaml --recipe dit_s --gpus 2
    """
    # What is asked for.
    if target not in TARGETS:
        raise UsageError(f"--target {target}: one of {_TARGETS}")
    recipe = recipe or TARGETS[target].default_recipe
    if recipe not in recipes_of(target):
        raise UsageError(f"--recipe {recipe}: for target {target}, one of {_listed_recipes(target)}")
    if cpu and not target_module(target).OWN:
        raise UsageError("--cpu: DFM's own script needs GPUs; leave --target out")

    # The spec. A path of the command line is relative to the working directory, one in a spec to that spec.
    is_printed = str(file) == "-"
    folder = Path() if is_printed else file.parent
    if is_relative(dataset_path):
        dataset_path = os.path.relpath(dataset_path, folder)
    text = spec_text(str(file), recipe, target, nodes, gpus, dataset_path or None, cpu)
    if is_printed:
        typer.echo(text, nl=False)
        return

    # A new file.
    if file.exists():
        raise UsageError(f"{file} exists, and nothing of yours is overwritten; name another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_named(file, text)
    typer.echo(file)
    if dataset_path is None and "path: null" in text:
        typer.echo("set dataset.path to your WebDataset before you run it", err=True)


def _schema(file: str) -> str:
    """The schema's place for an editor: relative where it lies in this checkout, else where dfmspec is installed."""
    place = resource("schemas/experiment.schema.json")
    is_near = Path.cwd() in place.parents
    if not is_near:
        return str(place)
    return os.path.relpath(place, Path(file).parent)


def spec_text(
    file: str,
    recipe: str,
    target: str,
    nodes: int,
    gpus: int,
    dataset_path: str | None,
    cpu: bool,
) -> str:
    """A commented spec that is valid as it stands.

    Args:
        file: where it is to be written; - for stdout.
        recipe: what it starts from, one of the target's.
        target: what trains.
        nodes: their number.
        gpus: those of one node.
        dataset_path: a WebDataset, as seen from the file; None: the target's data of a new spec.
        cpu: for a trial on CPUs.
    """
    world = nodes * gpus
    trained_by = target_module(target)
    data = trained_by.SPEC_DATA
    if dataset_path is not None:
        data = f"dataset:\n  path: {scalar(dataset_path)}\n  num_workers: 4\n"

    # A trial on mock data, which ends after 1,024 batches a rank; else about 32 packs an iteration.
    is_trial = "source: mock" in data
    if is_trial:
        global_batch_size = world
        iterations = 500
        save_interval = 500
    else:
        global_batch_size = world * max(1, 32 // world)
        iterations = 10000
        save_interval = 1000

    return _TEMPLATE.format(
        schema=_schema(file),
        file=file,
        recipe=recipe,
        sizes=_sizes_of(recipe),
        target=target,
        target_words=trained_by.ABOUT,
        nodes=nodes,
        gpus=gpus,
        world=world,
        device="  device: cpu  # a trial without GPUs\n" if cpu else "",
        data=data,
        gbs=global_batch_size,
        iterations=iterations,
        save=save_interval,
        evaluation=trained_by.SPEC_EVALUATION,
    )


_SIZES = {
    "num_layers": "layers",
    "num_joint_layers": "joint",
    "num_single_layers": "single layers",
    "hidden_size": "wide",
    "num_attention_heads": "heads",
}


def _sizes_of(recipe: str) -> str:
    """A recipe's network in a few words: `28 layers, 1152 wide, 16 heads`."""
    import yaml

    model = yaml.safe_load(recipe_text(recipe))["model"]
    sizes = [f"{model[key]} {words}" for key, words in _SIZES.items() if key in model]
    return ", ".join(sizes)
