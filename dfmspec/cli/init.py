"""dfmspec init: a commented spec to start from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.errors import UsageError
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


def init(
    file: Annotated[Path, typer.Argument(help="The spec to write; it must not exist. - prints it.")] = Path("spec.yaml"),
    recipe: Annotated[str | None, typer.Option(help=f"What to start from: {'; '.join(f'{name}: ' + ', '.join(recipes_of(name)) for name in TARGETS)}.")] = None,
    target: Annotated[str, typer.Option(help=f"What trains: {', '.join(TARGETS)}.")] = DEFAULT_TARGET,
    nodes: Annotated[int, typer.Option(help="Nodes.", min=1)] = 1,
    gpus: Annotated[int, typer.Option(help="GPUs of a node.", min=1)] = 8,
    dataset_path: Annotated[str | None, typer.Option(help="Folder of a WebDataset; without one, dfmspec draws its own butterflies.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a trial on CPUs.")] = False,
) -> None:
    """Write a commented spec that is valid as it stands.

    Example: dfmspec init my_run.yaml --recipe dit_s --gpus 2
    """
    if target not in TARGETS:
        raise UsageError(f"--target {target}: one of {', '.join(TARGETS)}")
    recipe = recipe or TARGETS[target].default_recipe
    if recipe not in recipes_of(target):
        raise UsageError(f"--recipe {recipe}: for target {target}, one of {', '.join(recipes_of(target))}")
    if cpu and not target_module(target).OWN:
        raise UsageError("--cpu: DFM's own script needs GPUs; leave --target out")
    folder = Path() if str(file) == "-" else file.parent
    if is_relative(dataset_path):
        dataset_path = os.path.relpath(dataset_path, folder)
    text = spec_text(str(file), recipe, target, nodes, gpus, dataset_path or None, cpu)
    if str(file) == "-":
        typer.echo(text, nl=False)
        return
    if file.exists():
        raise UsageError(f"{file} exists, and nothing of yours is overwritten; name another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    typer.echo(file)
    if dataset_path is None and "path: null" in text:
        typer.echo("set dataset.path to your WebDataset before you run it", err=True)


def _schema(file: str) -> str:
    """The schema's place for an editor: relative where it lies in this checkout, else where dfmspec is installed."""
    place = resource("schemas/experiment.schema.json")
    near = Path.cwd() in place.parents
    return os.path.relpath(place, Path(file).parent) if near else str(place)


def spec_text(file: str, recipe: str, target: str, nodes: int, gpus: int, dataset_path: str | None, cpu: bool) -> str:
    """The spec."""
    import yaml

    model = yaml.safe_load(recipe_text(recipe))["model"]
    layers = (("num_layers", "layers"), ("num_joint_layers", "joint"), ("num_single_layers", "single layers"))
    named = (*layers, ("hidden_size", "wide"), ("num_attention_heads", "heads"))
    sizes = ", ".join(f"{model[key]} {words}" for key, words in named if key in model)
    world = nodes * gpus
    trained_by = target_module(target)
    data = trained_by.SPEC_DATA
    if dataset_path is not None:
        data = f"dataset:\n  path: {scalar(dataset_path)}\n  num_workers: 4\n"
    trial = "source: mock" in data  # which ends after 1,024 batches a rank
    return _TEMPLATE.format(
        schema=_schema(file), file=file, recipe=recipe, sizes=sizes, target=target, target_words=trained_by.ABOUT, nodes=nodes, gpus=gpus, world=world,
        device="  device: cpu  # a trial without GPUs\n" if cpu else "", data=data, gbs=world if trial else world * max(1, 32 // world),
        iterations=500 if trial else 10000, save=500 if trial else 1000,
        evaluation=trained_by.SPEC_EVALUATION,
    )  # fmt: skip
