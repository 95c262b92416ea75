"""Samples, packs and microbatches: collating brings latents of any size into one static THD sequence.

Shapes: C, T, H, W of a latent; L text tokens; s tokens of a microbatch, n segments, P values of a patch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import TypeVar

import torch
from megatron.core import parallel_state
from torch import Tensor

from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.spec.limits import FP8_ALIGNMENT
from dfmspec.trainer import edm
from dfmspec.trainer.data.patches import num_tokens, patch_positions, patchify
from dfmspec.trainer.data.segments import Segments, segments_of
from dfmspec.trainer.noise import Draw


@dataclass(frozen=True)
class DrawnSample:
    """A sample with the noise of its turn."""

    key: str
    latent: Tensor
    """[C, T, H, W], unit variance, fp32."""
    context: Tensor
    """[L, E] text embedding."""
    draw: Draw


Pack = tuple[DrawnSample, ...]
"""The samples of one packed sequence."""


@dataclass(frozen=True)
class Microbatch:
    """`micro_batch_size` packs as one sequence of static length, with everything that loss and network need, in fp32.

    If there is padding, it is segments after the others: their tokens are zeros, attend only to themselves and to zero
    text tokens, and count nothing in the loss. Under context parallelism a rank has its rows of the sequence, and the
    whole text.
    """

    x: Tensor
    """[s, P] noisy input y + n."""
    y: Tensor
    """[s, P] clean data, in the scale of sigma_data."""
    net_input: Tensor
    """[s, P] c_in x."""
    sigma: Tensor
    """[n] noise level of each segment."""
    c_noise: Tensor
    """[n] what the network is told of each noise level."""
    positions: Tensor
    """[s, 3] patch positions."""
    context: Tensor
    """[c, E] text tokens of all segments, in the network's precision."""
    of_token: Tensor
    """[s] segment of each token."""
    segments: Segments
    """What the blocks need to know of the segments, for this rank's tokens."""
    useful: Tensor
    """[s] fp32: 1 for a token, 0 for padding."""
    num_tokens: Tensor
    """int32: tokens of these rows that are not padding."""

    def with_input(self, net_input: Tensor) -> Microbatch:
        """A copy whose network input is another one, [s, P]: what the sampler evaluates."""
        return dataclasses.replace(self, net_input=net_input)


def collate(packs: Sequence[Pack], experiment: Experiment, *, seq_length: int | None = None) -> Microbatch:
    """Concatenate packs into a microbatch, pad it to its static length, and add the noise.

    Args:
        packs: samples by pack, on the CPU.
        experiment: sizes of the model, scale of the data, number formats.
        seq_length: tokens of a pack; None: model.seq_length.

    Raises:
        DataError: a sample is larger than the position tables, or its text has another width than the model's.
    """
    model = experiment.model
    samples = list(chain.from_iterable(packs))
    for sample in samples:
        _check_fits(sample, experiment)

    # Segments: the samples, and padding up to the static length.
    length = len(packs) * (seq_length or model.seq_length)
    counts, texts, sigmas = _segment_lengths(samples, experiment, length)
    sigma = torch.tensor(sigmas)
    numbers = torch.arange(len(counts))
    of_token = torch.repeat_interleave(numbers, torch.tensor(counts))

    # Latents as tokens, clean and with their noise.
    used = sum(counts[: len(samples)])
    clean, noisy, positions = _tokens(samples, experiment, sigma[of_token[:used], None])

    # This rank's rows of the whole sequence.
    rows = _rows_of_this_rank(length)
    of_token = of_token[rows]
    x = _zero_padded(noisy, length)[rows]
    c_in = edm.c_in(sigma, experiment.diffusion.sigma_data)
    segments = segments_of(counts, texts, rows, of_token, sequence_parallel=model.sequence_parallel)
    is_useful = torch.arange(length) < used
    num_useful = max(0, min(used, rows.stop) - rows.start)
    return Microbatch(
        x=x,
        y=_zero_padded(clean, length)[rows],
        net_input=c_in[of_token, None] * x,
        sigma=sigma,
        c_noise=edm.c_noise(sigma),
        positions=_zero_padded(positions, length)[rows],
        context=_context(samples, texts, experiment),
        of_token=of_token,
        segments=segments,
        useful=is_useful[rows].float(),
        num_tokens=torch.tensor(num_useful, dtype=torch.int32),
    )


def _tokens(
    samples: Sequence[DrawnSample],
    experiment: Experiment,
    sigma: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The latents as tokens, one sample after the other, with noise of the level `sigma` [tokens, 1] of each token.

    Returns:
        Clean data in the scale of sigma_data [tokens, P], noisy data [tokens, P], and patch positions [tokens, 3].
    """
    pt = experiment.model.patch_temporal
    p = experiment.model.patch_spatial
    latents = [patchify(sample.latent, pt, p) for sample in samples]
    noises = [patchify(sample.draw.noise, pt, p) for sample in samples]
    positions = [patch_positions(sample.latent.shape, pt, p) for sample in samples]
    clean = torch.cat(latents) * experiment.diffusion.sigma_data
    noisy = clean + torch.cat(noises) * sigma
    return clean, noisy, torch.cat(positions)


def _zero_padded(rows: Tensor, length: int) -> Tensor:
    """[rows, P] -> [length, P], with zeros after the rows."""
    padded = rows.new_zeros(length, rows.size(1))
    padded[: len(rows)] = rows
    return padded


def _context(samples: Sequence[DrawnSample], texts: Sequence[int], experiment: Experiment) -> Tensor:
    """[c, E] text tokens of segments of `texts` tokens each, in the network's precision.

    Zeros stand for the text of padding, and of a sample whose draw leaves its text out.
    """
    width = experiment.model.crossattn_emb_size
    dtype = torch.bfloat16 if experiment.mixed_precision.bf16 else torch.float32
    context = torch.zeros(sum(texts), width, dtype=dtype)
    for sample, rows in zip(samples, context.split(texts), strict=False):  # padding has no sample
        if sample.draw.keep_condition:
            rows.copy_(sample.context)
    return context


_Lengths = tuple[list[int], list[int], list[float]]
"""Tokens, text tokens and noise level of each segment."""


def _segment_lengths(samples: Sequence[DrawnSample], experiment: Experiment, length: int) -> _Lengths:
    """The samples as segments, then padding where the sequence or the number of text tokens needs it."""
    model = experiment.model
    pt = model.patch_temporal
    p = model.patch_spatial
    counts = [num_tokens(sample.latent.shape, pt, p) for sample in samples]
    texts = [len(sample.context) for sample in samples]
    sigmas = [sample.draw.sigma for sample in samples]
    alignment = FP8_ALIGNMENT if experiment.mixed_precision.fp8 else 1
    multiple = math.lcm(model.tensor_model_parallel_size, alignment)
    if length > sum(counts) or sum(texts) % multiple:
        return _padded(counts, texts, sigmas, length, multiple)
    return counts, texts, sigmas


def _padded(
    counts: list[int],
    texts: list[int],
    sigmas: list[float],
    length: int,
    multiple: int,
) -> _Lengths:
    """The segments with padding, then empty ones, so that few shapes come up: each is compiled and captured once.

    Padding is cut like the longest sample, for attention works on it too, by the square of its length; each piece meets
    a text token at least. Sequence parallelism cuts the text tokens over TP too, and FP8 products have their own
    measure, so their number is a multiple of both.

    Example: samples of 5 and 3 tokens leave 8 of a sequence of 16. These are cut into pieces of 5 and 3, since no piece
    is longer than the longest sample: `counts` [5, 3] becomes [5, 3, 5, 3], and `texts` [2, 1] becomes [2, 1, 1, 1].
    """
    # What is left of the sequence, in pieces; one empty piece takes the text tokens if nothing is.
    longest = max(counts)
    left = length - sum(counts)
    pieces = [min(longest, left - at) for at in range(0, left, longest)] or [0]

    # Text tokens: one for each piece, and on the last what the rounded number lacks.
    keys = [1] * len(pieces)
    given = sum(texts) + len(pieces)
    keys[-1] += _rounded(given, multiple) - given

    # Empty segments, up to the rounded number of segments.
    segments = len(counts) + len(pieces)
    empty = [0] * (_rounded(segments, 1) - segments)
    added = len(pieces) + len(empty)
    return (
        [*counts, *pieces, *empty],
        [*texts, *keys, *empty],
        [*sigmas, *([1.0] * added)],
    )


def _rounded(count: int, multiple: int) -> int:
    """Up to a multiple of `multiple` and of an eighth of the power of two below.

    At most an eighth more, where `multiple` is no larger than that.
    """
    step = 1
    if count >= 8:
        step = 1 << (count.bit_length() - 4)
    step = math.lcm(step, multiple)
    return -(-count // step) * step


def _rows_of_this_rank(length: int) -> slice:
    """Context parallelism cuts the sequence in equal pieces, wherever segments begin and end."""
    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    first = length * rank // size
    end = length * (rank + 1) // size
    return slice(first, end)


Moved = TypeVar("Moved")


def on_device(value: Moved, device: torch.device) -> Moved:
    """A microbatch, or what is in it, with its tensors on a GPU: by copies from pinned memory that wait for nothing."""
    if isinstance(value, Tensor):
        pinned = value.pin_memory()
        return pinned.to(device, non_blocking=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = {}
        for field in dataclasses.fields(value):
            part = getattr(value, field.name)
            moved[field.name] = on_device(part, device)
        return dataclasses.replace(value, **moved)
    return value


def _check_fits(sample: DrawnSample, experiment: Experiment) -> None:
    """Refuse a sample that the model has no place for."""
    model = experiment.model
    channels, *axes = sample.latent.shape
    limits = {
        "max_frames": model.max_frames,
        "max_img_h": model.max_img_h,
        "max_img_w": model.max_img_w,
    }
    for size, (field, limit) in zip(axes, limits.items(), strict=True):
        if size > limit:
            shape = list(sample.latent.shape)
            raise DataError(f"sample {sample.key}: latent {shape} is larger than model.{field} = {limit}; raise it")
    if channels != model.in_channels:
        raise DataError(f"sample {sample.key}: {channels} channels, but model.in_channels is {model.in_channels}")
    width = sample.context.size(1)
    if width != model.crossattn_emb_size:
        raise DataError(
            f"sample {sample.key}: text embedding of width {width}, "
            f"but model.crossattn_emb_size is {model.crossattn_emb_size}"
        )


def loss_sum(F_x: Tensor, batch: Microbatch, sigma_data: float) -> Tensor:  # noqa: N803
    """The EDM loss of the network's output F_x [s, P], averaged over the values of each token.

    Returns:
        Its sum [] over the microbatch's useful tokens, fp32.
    """
    sigma = batch.sigma[batch.of_token, None]
    error = edm.weighted_error(F_x.float(), batch.x, batch.y, sigma, sigma_data)
    return (error.mean(dim=-1) * batch.useful).sum()


def microbatches(
    experiment: Experiment,
    packs: Iterator[Pack],
    *,
    micro_batch_size: int | None = None,
    seq_length: int | None = None,
) -> Iterator[Microbatch]:
    """Collate packs into microbatches on this process's device, as they are asked for, by whatever thread.

    Args:
        experiment: what `collate` needs, and the device.
        packs: without end, or as many as will be asked for.
        micro_batch_size: packs of a microbatch; None: train.micro_batch_size.
        seq_length: tokens of a pack; None: model.seq_length.
    """
    size = micro_batch_size or experiment.train.micro_batch_size
    groups = (list(islice(packs, size)) for _ in repeat(None))
    collated = (collate(group, experiment, seq_length=seq_length) for group in groups)
    if experiment.cluster.device != "cuda":
        return collated
    # The GPU of the thread that calls this: another thread, which may ask for a microbatch, has another current one.
    device = torch.device("cuda", torch.cuda.current_device())
    return (on_device(batch, device) for batch in collated)


def num_microbatches(experiment: Experiment) -> int:
    """Microbatches of one iteration on each data-parallel rank."""
    train = experiment.train
    at_once = train.micro_batch_size * parallel_state.get_data_parallel_world_size()
    return train.global_batch_size // at_once
