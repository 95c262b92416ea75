"""From a shard's samples to packed samples: Energon's task encoder, and the choice of what shares a pack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.energon import Cooker, SkipSample, edataclass, stateless
from megatron.energon import Sample as EnergonSample
from megatron.energon import TaskEncoder as EnergonTaskEncoder
from torch import Tensor

from dfmspec.data.packing import first_fit
from dfmspec.data.samples import apart_fault, missing, missing_fault
from dfmspec.data.tars import keys
from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.data.decode import load_context, load_latent
from dfmspec.trainer.data.patches import num_tokens


@edataclass
class LatentSample(EnergonSample):
    """One picture or video with its text."""

    latent: Tensor
    context: Tensor


@edataclass
class PackedSample(EnergonSample):
    """Samples that share one packed sequence.

    Their tensors are joined into two, because each costs its way out of a loader process.
    """

    keys: list[str]
    latents: Tensor
    """[values of all latents]"""
    latent_shapes: list[tuple[int, ...]]
    contexts: Tensor
    """[values of all texts]"""
    context_shapes: list[tuple[int, ...]]

    def samples(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Key, latent [C, T, H, W] and text [L, E] of each sample."""
        latents = _apart(self.latents, self.latent_shapes)
        contexts = _apart(self.contexts, self.context_shapes)
        return zip(self.keys, latents, contexts, strict=True)


def packed(keys: list[str], latents: list[Tensor], contexts: list[Tensor], key: str) -> PackedSample:
    """Join samples into one packed sample, under the name `key`."""
    return PackedSample(
        __key__=key,
        __restore_key__=(),
        __subflavors__=None,
        __sources__=None,
        keys=keys,
        latents=_joined(latents),
        latent_shapes=_shapes(latents),
        contexts=_joined(contexts),
        context_shapes=_shapes(contexts),
    )


def _joined(tensors: list[Tensor]) -> Tensor:
    """[values of all tensors]"""
    return torch.cat([tensor.flatten() for tensor in tensors])


def _shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _apart(values: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """The tensors that `_joined` joined, without a copy."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = values.split(sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


@stateless
def _cook(sample: dict[str, Any]) -> LatentSample:
    """A sample from the bytes of its files.

    Raises:
        DataError: a file is missing, or holds no tensor.
    """
    lacking = missing(sample)
    if lacking:
        raise DataError(apart_fault() if _is_apart(sample) else missing_fault(lacking))
    return LatentSample(
        __key__=sample["__key__"],
        __restore_key__=sample["__restore_key__"],
        __subflavors__=sample.get("__subflavors__"),
        __sources__=sample.get("__sources__"),
        latent=load_latent(sample["pth"]),
        context=load_context(sample["pickle"]),
    )


def _is_apart(sample: dict[str, Any]) -> bool:
    """Whether the shard has the rest of a sample in another place; of one that is not on this machine, no."""
    for source in sample.get("__sources__") or ():
        shard = Path(str(source.dataset_path)) / str(source.shard_name)
        if keys(shard).count(sample["__key__"]) > 1:
            return True
    return False


class TaskEncoder(EnergonTaskEncoder):
    """Energon's task encoder: raw bytes in, packs out; everything here is stateless or deterministic."""

    # Bytes: Energon's own decoder would unpickle whatever it is given.
    decoder = None
    cookers = (Cooker(_cook),)

    def __init__(self, experiment: Experiment) -> None:
        self._length = experiment.dataset.task_encoder_seq_length
        self._patch = (experiment.model.patch_temporal, experiment.model.patch_spatial)
        self._channels = experiment.model.in_channels
        self._text_width = experiment.model.crossattn_emb_size

    @stateless
    def preencode_sample(self, sample: LatentSample) -> LatentSample:
        """Refuse what does not fit the network or a pack, instead of dropping it in silence as DFM does.

        Raises:
            DataError: what is wrong with the sample.
        """
        pt, p = self._patch
        shape = list(sample.latent.shape)
        channels, t, h, w = shape
        if channels != self._channels:
            raise DataError(f"its latent {shape} has {channels} channels, and model.in_channels is {self._channels}")
        text = list(sample.context.shape)
        if text[1] != self._text_width:
            raise DataError(f"its text {text} is {text[1]} wide, and model.crossattn_emb_size is {self._text_width}")
        if t % pt or h % p or w % p:
            raise DataError(f"its latent {shape} is not a whole number of {pt}x{p}x{p} patches")
        tokens = num_tokens(shape, pt, p)
        if tokens > self._length:
            raise DataError(f"it has {tokens} tokens, more than dataset.task_encoder_seq_length = {self._length}")
        return sample

    def select_samples_to_pack(self, samples: list[LatentSample]) -> list[list[LatentSample]]:
        """Choose which samples share a pack, as `packing.first_fit` does."""
        sizes = [num_tokens(sample.latent.shape, *self._patch) for sample in samples]
        packs = []
        for indices in first_fit(sizes, self._length):
            packs.append([samples[index] for index in indices])
        return packs

    @stateless
    def pack_selected_samples(self, samples: list[LatentSample]) -> PackedSample:
        """Join the samples of one pack."""
        keys = [sample.__key__ for sample in samples]
        latents = [sample.latent for sample in samples]
        contexts = [sample.context for sample in samples]
        return packed(keys, latents, contexts, ",".join(keys))


class SampleError(DataError, SystemError):
    """A DataError that Energon lets through: it swallows whatever is no SystemError."""


def raise_data_error(error: Exception, sample: Any, sources: Any) -> None:
    """Energon's error handler: stop, and say which sample of which shard is at fault.

    Raises:
        SampleError: always, unless Energon itself wants the sample to be skipped.
    """
    if isinstance(error, SkipSample):
        return
    shards = set()
    for source in sources or ():
        if source.shard_name:
            shards.add(f"{source.dataset_path}/{source.shard_name}")
    where = f"sample {_key_of(sample)}"
    if shards:
        where += f" of {', '.join(sorted(shards))}"
    raise SampleError(f"{where}: {error}") from error


def _key_of(sample: Any) -> Any:
    """The name of a sample as read, or of one as cooked, or of several that share a pack."""
    if isinstance(sample, dict):
        return sample.get("__key__")
    return getattr(sample, "__key__", None)
