"""Samples, packs and microbatches: from latents of any size to one static THD sequence.

Shapes: C, T, H, W of a latent; L text tokens; s tokens of a microbatch, n segments, P values of a patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer import edm
from dfmspec.trainer.block import Segments
from dfmspec.trainer.noise import Draw
from dfmspec.trainer.patches import patch_positions, patchify


@dataclass(frozen=True)
class DrawnSample:
    """A sample with the noise of its turn."""

    key: str
    latent: Tensor
    """[C, T, H, W], unit variance, fp32."""
    context: Tensor
    """[L, E] text embedding, fp32."""
    draw: Draw


Pack = tuple[DrawnSample, ...]
"""The samples of one packed sequence."""


@dataclass(frozen=True)
class Microbatch:
    """`micro_batch_size` packs as one sequence of static length, with everything that loss and network need, in fp32.

    The last segment is the padding: its tokens are zeros, attend only to themselves and to one zero text token, and
    count nothing in the loss.
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
    """[c, E] text tokens of all segments."""
    of_token: Tensor
    """[s] segment of each token."""
    cu_seqlens_q: Tensor
    """[n + 1] first token of each segment, and the end."""
    cu_seqlens_kv: Tensor
    """[n + 1] first text token of each segment, and the end."""
    num_tokens: int
    """Tokens that are not padding."""

    def with_input(self, net_input: Tensor) -> Microbatch:
        """The same segments with another network input [s, P]: what the sampler evaluates."""
        return dataclasses.replace(self, net_input=net_input)

    def segments(self, sequence_parallel: bool) -> Segments:
        """What TransformerBlock needs to know of the segments, for this rank's tokens."""

        def params(q: Tensor, kv: Tensor) -> PackedSeqParams:
            return PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=q, cu_seqlens_kv=kv,
                max_seqlen_q=int(q.diff().max()), max_seqlen_kv=int(kv.diff().max()),
            )  # fmt: skip

        of_token = self.of_token
        if sequence_parallel:
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            of_token = of_token.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        return Segments(params(self.cu_seqlens_q, self.cu_seqlens_q), params(self.cu_seqlens_q, self.cu_seqlens_kv), of_token)


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
    # Sequence parallelism cuts the text tokens over TP too, so their number is a multiple of it.
    texts = [len(sample.context) for sample in samples]
    multiple = model.tensor_model_parallel_size
    counts, texts = [*counts, length - used], [*texts, multiple - sum(texts) % multiple]

    sigma = torch.tensor([*(sample.draw.sigma for sample in samples), 1.0])
    of_token = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    y = torch.zeros(length, patches[0].size(1))
    x = torch.zeros_like(y)
    y[:used] = torch.cat(patches) * sigma_data
    x[:used] = y[:used] + torch.cat(noises) * sigma[of_token[:used], None]
    positions = torch.zeros(length, 3, dtype=torch.long)
    positions[:used] = torch.cat([patch_positions(sample.latent.shape, pt, p) for sample in samples])
    context = torch.zeros(sum(texts), model.crossattn_emb_size)
    context[: sum(texts[:-1])] = torch.cat([sample.context * sample.draw.keep_condition for sample in samples])

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to("cuda")

    tensors = {
        "x": x, "y": y, "net_input": edm.c_in(sigma, sigma_data)[of_token, None] * x, "sigma": sigma,
        "c_noise": edm.c_noise(sigma), "positions": positions, "context": context, "of_token": of_token,
    }  # fmt: skip
    on_device = {name: tensor.to("cuda") for name, tensor in tensors.items()}
    return Microbatch(**on_device, cu_seqlens_q=starts(counts), cu_seqlens_kv=starts(texts), num_tokens=used)


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
        raise DataError(
            f"sample {sample.key}: text embedding of width {sample.context.size(1)}, "
            f"but model.crossattn_emb_size is {model.crossattn_emb_size}"
        )


def loss_sum(F_x: Tensor, batch: Microbatch, sigma_data: float) -> Tensor:  # noqa: N803
    """Sum over the microbatch's useful tokens of the EDM loss, averaged over the values of each token; fp32."""
    used = batch.num_tokens
    error = edm.weighted_error(
        F_x[:used].float(), batch.x[:used], batch.y[:used], batch.sigma[batch.of_token[:used], None], sigma_data
    )
    return error.mean(dim=-1).sum()
