"""Samples, packs and microbatches: collating brings latents of any size into one static THD sequence.

Shapes: C, T, H, W of a latent; L text tokens; s tokens of a microbatch, n segments, P values of a patch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import TypeVar

import torch
from megatron.core import parallel_state
from torch import Tensor

from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.spec.limits import FP8_ALIGNMENT
from dfmspec.trainer import edm
from dfmspec.trainer.data.patches import patch_positions, patchify
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

    If there is padding, it is segments after the others: their tokens are zeros, attend only to themselves and to zero text tokens,
    and count nothing in the loss. Under context parallelism a rank has its rows of the sequence, and the whole text.
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
    """[n] what the network is told of it."""
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
        """The same segments with another network input [s, P]: what the sampler evaluates."""
        return dataclasses.replace(self, net_input=net_input)


def collate(packs: Sequence[Pack], experiment: Experiment) -> Microbatch:
    """Concatenate packs into a microbatch, pad it to its static length, and add the noise.

    Raises:
        DataError: a sample is larger than the position tables, or its text has another width than the model's.
    """
    model, sigma_data = experiment.model, experiment.diffusion.sigma_data
    pt, p, length = model.patch_temporal, model.patch_spatial, len(packs) * model.seq_length
    samples = [sample for pack in packs for sample in pack]
    for sample in samples:
        _check_fits(sample, experiment)

    patches = [patchify(sample.latent, pt, p) for sample in samples]
    noises = [patchify(sample.draw.noise, pt, p) for sample in samples]
    counts = [len(patch) for patch in patches]
    used = sum(counts)
    texts = [len(sample.context) for sample in samples]
    sigmas = [sample.draw.sigma for sample in samples]
    multiple = math.lcm(model.tensor_model_parallel_size, FP8_ALIGNMENT if experiment.mixed_precision.fp8 else 1)
    if length > used or sum(texts) % multiple:
        counts, texts, sigmas = _padded(counts, texts, sigmas, length, multiple)

    sigma = torch.tensor(sigmas)
    of_token = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y = torch.zeros(length, patches[0].size(1))
    x = torch.zeros_like(y)
    y[:used] = torch.cat(patches) * sigma_data
    x[:used] = y[:used] + torch.cat(noises) * sigma[of_token[:used], None]
    positions = torch.zeros(length, 3, dtype=torch.long)
    positions[:used] = torch.cat([patch_positions(sample.latent.shape, pt, p) for sample in samples])
    context = torch.zeros(sum(texts), model.crossattn_emb_size, dtype=torch.bfloat16 if experiment.mixed_precision.bf16 else torch.float32)
    for sample, rows in zip(samples, context.split(texts), strict=False):
        if sample.draw.keep_condition:
            rows.copy_(sample.context)

    cut = _rows_of_this_rank(length)
    of_token = of_token[cut]
    return Microbatch(
        x=x[cut], y=y[cut], net_input=edm.c_in(sigma, sigma_data)[of_token, None] * x[cut], sigma=sigma, c_noise=edm.c_noise(sigma),
        positions=positions[cut], context=context, of_token=of_token,
        segments=segments_of(counts, texts, cut, of_token, sequence_parallel=model.sequence_parallel),
        useful=(torch.arange(length) < used)[cut].float(),
        num_tokens=torch.tensor(max(0, min(used, cut.stop) - cut.start), dtype=torch.int32),
    )  # fmt: skip


def _padded(counts: list[int], texts: list[int], sigmas: list[float], length: int, multiple: int) -> tuple[list[int], list[int], list[float]]:
    """With segments of padding, then empty ones, so that few different shapes come up: each is compiled and captured once.

    Padding is cut like the longest sample, for attention works on it too, by the square of its length; each piece meets a
    text token at least. Sequence parallelism cuts the text tokens over TP too, and FP8 products have their own measure, so
    their number is a multiple of both.
    """
    longest, left, text = max(counts), length - sum(counts), sum(texts)
    pieces = [min(longest, left - at) for at in range(0, left, longest)] or [0]
    empty = [0] * (_rounded(len(counts) + len(pieces), 1) - len(counts) - len(pieces))
    keys = [1] * len(pieces)
    keys[-1] += _rounded(text + len(pieces), multiple) - text - len(pieces)
    return [*counts, *pieces, *empty], [*texts, *keys, *empty], [*sigmas, *(1.0 for _ in (*pieces, *empty))]


def _rounded(count: int, multiple: int) -> int:
    """Up to a multiple of `multiple` and of an eighth of the power of two below: at most an eighth more."""
    step = max(1, 1 << (count.bit_length() - 4)) if count >= 8 else 1
    step = step * multiple // math.gcd(step, multiple)
    return -(-count // step) * step


def _rows_of_this_rank(length: int) -> slice:
    """Context parallelism cuts the sequence in equal pieces, wherever segments begin and end."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    return slice(length * rank // size, length * (rank + 1) // size)


Moved = TypeVar("Moved")


def on_device(value: Moved, device: torch.device) -> Moved:
    """A microbatch with its tensors on a GPU, by copies that wait for nothing."""
    if isinstance(value, Tensor):
        return value.pin_memory().to(device, non_blocking=True)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: on_device(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _check_fits(sample: DrawnSample, experiment: Experiment) -> None:
    model = experiment.model
    channels, *axes = sample.latent.shape
    limits = {"max_frames": model.max_frames, "max_img_h": model.max_img_h, "max_img_w": model.max_img_w}
    for size, (field, limit) in zip(axes, limits.items(), strict=True):
        if size > limit:
            raise DataError(f"sample {sample.key}: latent {list(sample.latent.shape)} is larger than model.{field} = {limit}; raise it")
    if channels != model.in_channels:
        raise DataError(f"sample {sample.key}: {channels} channels, but model.in_channels is {model.in_channels}")
    if sample.context.size(1) != model.crossattn_emb_size:
        raise DataError(f"sample {sample.key}: text embedding of width {sample.context.size(1)}, but model.crossattn_emb_size is {model.crossattn_emb_size}")


def loss_sum(F_x: Tensor, batch: Microbatch, sigma_data: float) -> Tensor:  # noqa: N803
    """Sum over the microbatch's useful tokens of the EDM loss, averaged over the values of each token; fp32."""
    error = edm.weighted_error(F_x.float(), batch.x, batch.y, batch.sigma[batch.of_token, None], sigma_data)
    return (error.mean(dim=-1) * batch.useful).sum()


def microbatches(experiment: Experiment, packs: Iterator[Pack]) -> Iterator[Microbatch]:
    """Collate packs into microbatches on this process's device, as they are asked for, by whatever thread."""
    device = torch.device("cuda", torch.cuda.current_device()) if experiment.cluster.device == "cuda" else None
    collated = (collate(list(islice(packs, experiment.train.micro_batch_size)), experiment) for _ in repeat(None))
    return (on_device(batch, device) for batch in collated) if device else collated


def num_microbatches(experiment: Experiment) -> int:
    """Microbatches of one iteration on each rank."""
    train = experiment.train
    return train.global_batch_size // (train.micro_batch_size * parallel_state.get_data_parallel_world_size())
