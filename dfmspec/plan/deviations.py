"""What dfmspec's trainer does otherwise than NVIDIA DFM's with the same spec, and when that is met.

docs/deviations.md is written from here (`tools/generate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Values = Mapping[str, Any]


def _always(values: Values) -> bool:
    return True


def _in_no_plan(values: Values) -> bool:
    """A plan writes out what the two would otherwise have differently, or it is of something before a training."""
    return False


def _is_not(key: str, usual: Any) -> Callable[[Values], bool]:
    """When a key has another value; one that is missing, as in a plan of another version, has the usual one."""
    return lambda values: values.get(key, usual) != usual


def _is_cut(values: Values) -> bool:
    sizes = ("model.tensor_model_parallel_size", "model.pipeline_model_parallel_size")
    return any(_is_not(size, 1)(values) for size in sizes)


class Deviation(NamedTuple):
    """A row of the table; texts in Markdown."""

    subject: str
    there: str
    here: str
    reason: str
    applies: Callable[[Values], bool] = _always
    """Whether a plan meets it, by the values of dfmspec's trainer."""


DEVIATIONS = (
    Deviation(
        "noise level in a pack",
        "one sigma for all packed samples",
        "one for each sample",
        "the gradient's variance does not grow with the pack ([measured](measurements/upstream.md))",
    ),
    Deviation(
        "condition dropout",
        "the whole pack",
        "each sample",
        "the same",
    ),
    Deviation(
        "x_t, sigma, loss",
        "bf16",
        "fp32; only the network's input is cast",
        "rounding noise of x_t is 57 % of sigma at 0.002",
    ),
    Deviation(
        "sampler",
        'its "second order" step evaluates at the old point: Euler at twice the price',
        "Heun of EDM, Algorithm 1",
        "order 2: the error falls 3.8 times and more when the steps double",
    ),
    Deviation(
        "final projection",
        "random",
        "zero",
        "the loss starts at 1 at every noise level, which can be checked; the how-to's 0.456 cannot be had",
    ),
    Deviation(
        "q/k norms, adaLN, embedders under TP, SP, PP",
        "some gradients are not reduced",
        "all are",
        "replicas stay bitwise equal",
        _is_cut,
    ),
    Deviation(
        "final gather under sequence parallelism",
        "multiplies gradients by TP",
        "does not",
        "the same",
        _is_not("model.sequence_parallel", False),
    ),
    Deviation(
        "frame-rate embedding",
        "present",
        "absent",
        "the samples have none",
    ),
    Deviation(
        "order of a position's axes",
        "time, width, height; mixed up where the table is not square",
        "time, height, width",
        "weights are exchanged in the other's order, exactly ([measured](measurements/network.md))",
    ),
    Deviation(
        "GELU",
        "exact",
        "by tanh",
        "the kernels fuse it; 2.3e-4 of the output ([measured](measurements/network.md))",
    ),
    Deviation(
        "positions past the table",
        "alias other positions in silence",
        "an error that names the field to raise",
        "",
    ),
    Deviation(
        "samples that do not fit or cannot be read",
        "dropped in silence",
        "an error that names sample and shard",
        "",
    ),
    Deviation(
        "sigma_data",
        "a field and a literal",
        "one field",
        "",
        _is_not("diffusion.sigma_data", 0.5),
    ),
    Deviation(
        "noise after a resume",
        "replays",
        "continues",
        "drawn from counters",
    ),
    Deviation(
        "data after a resume",
        "starts over",
        "continues",
        "state by stream, in the checkpoint",
    ),
    Deviation(
        "averaged weights",
        "none",
        "EMA, saved, resumed, sampled from",
        "",
    ),
    Deviation(
        "layer norm's epsilon",
        "1e-5 by accident of a class attribute",
        "1e-6, as written there",
        "",
    ),
    Deviation(
        "weight decay",
        "optimizer.weight_decay is overwritten with 0.033",
        "optimizer.weight_decay, default 0.033, is used",
        "",
        _is_not("optimizer.weight_decay", 0.033),
    ),
    Deviation(
        "learning-rate schedule",
        "keeps the recipe's 10,000 iterations when train_iters changes",
        "follows train_iters",
        "",
        _in_no_plan,
    ),
    Deviation(
        "micro_batch_size above 1",
        "drops packs in silence",
        "so many packs in one THD sequence",
        "",
        _is_not("train.micro_batch_size", 1),
    ),
    Deviation(
        "context parallelism",
        "segments cut in 2 x CP chunks each, p2p ring",
        "the pack cut in equal pieces, keys and values gathered",
        "no padding inside a pack, and the same numbers as without ([measured](measurements/parity.md))",
        _is_not("model.context_parallel_size", 1),
    ),
    Deviation(
        "checkpoint's files",
        "the how-to lists model_weights.pt and optimizer_states.pt",
        "torch_dist shards, `streams/`, `manifest.json` under the how-to's directory names",
        "every layout can read them",
    ),
    Deviation(
        "iteration lines",
        "the how-to's, with `Loss` and `LR`",
        "the same, with gradient norm and tokens/s after them",
        "",
    ),
    Deviation(
        "loader processes",
        "the how-to edits line 143 of the script",
        "`dataset.num_workers`",
        "",
        _in_no_plan,
    ),
    Deviation(
        "dataset preparation",
        "Cosmos tokenizer and T5-11B",
        "those are not wired yet; the embedded codec and encoder have their shapes",
        "nothing can be downloaded where this was built",
        _in_no_plan,
    ),
)


def met(values: Values) -> list[Deviation]:
    """Those that a plan meets.

    Args:
        values: of dfmspec's trainer, by key.
    """
    return [deviation for deviation in DEVIATIONS if deviation.applies(values)]
