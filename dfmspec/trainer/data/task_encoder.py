"""From a shard's samples to packed samples: Energon's task encoder, and the choice of what shares a pack."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.energon import Cooker, SkipSample, edataclass, stateless
from megatron.energon import Sample as EnergonSample
from megatron.energon import TaskEncoder as EnergonTaskEncoder
from torch import Tensor

from dfmspec.data.packing import first_fit
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
    """Samples that share one packed sequence; their tensors in two, because each costs its way out of a loader process."""

    keys: list[str]
    latents: Tensor
    """[values of all latents]"""
    latent_shapes: list[tuple[int, ...]]
    contexts: Tensor
    """[values of all texts]"""
    context_shapes: list[tuple[int, ...]]

    def samples(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Key, latent and text of each."""
        return zip(self.keys, _apart(self.latents, self.latent_shapes), _apart(self.contexts, self.context_shapes), strict=True)


def packed(keys: list[str], latents: list[Tensor], contexts: list[Tensor], key: str) -> PackedSample:
    """Samples as one, under the name `key`."""
    return PackedSample(
        __key__=key, __restore_key__=(), __subflavors__=None, __sources__=None, keys=keys,
        latents=torch.cat([x.flatten() for x in latents]), latent_shapes=[tuple(x.shape) for x in latents],
        contexts=torch.cat([x.flatten() for x in contexts]), context_shapes=[tuple(x.shape) for x in contexts],
    )  # fmt: skip


def _apart(values: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [piece.view(shape) for piece, shape in zip(values.split([math.prod(shape) for shape in shapes]), shapes, strict=True)]


@stateless
def _cook(sample: dict[str, Any]) -> LatentSample:
    missing = [part for part in ("pth", "pickle") if part not in sample]
    if missing:
        raise DataError(f"it has no .{missing[0]} file")
    return LatentSample(
        __key__=sample["__key__"],
        __restore_key__=sample["__restore_key__"],
        __subflavors__=sample.get("__subflavors__"),
        __sources__=sample.get("__sources__"),
        latent=load_latent(sample["pth"]),
        context=load_context(sample["pickle"]),
    )


class TaskEncoder(EnergonTaskEncoder):
    """Energon's task encoder: raw bytes in, packs out; everything here is stateless or deterministic."""

    decoder = None  # bytes: Energon's own decoder would unpickle whatever it is given
    cookers = (Cooker(_cook),)

    def __init__(self, experiment: Experiment) -> None:
        self._length = experiment.dataset.task_encoder_seq_length
        self._patch = experiment.model.patch_temporal, experiment.model.patch_spatial

    @stateless
    def preencode_sample(self, sample: LatentSample) -> LatentSample:
        """Refuse what cannot be patched or does not fit a pack, instead of dropping it in silence as DFM does."""
        shape = tuple(sample.latent.shape)
        (pt, p), (_, t, h, w) = self._patch, shape
        if t % pt or h % p or w % p:
            raise DataError(f"its latent {list(shape)} is not a whole number of {pt}x{p}x{p} patches")
        if (tokens := num_tokens(shape, pt, p)) > self._length:
            raise DataError(f"it has {tokens} tokens, more than dataset.task_encoder_seq_length = {self._length}")
        return sample

    def select_samples_to_pack(self, samples: list[LatentSample]) -> list[list[LatentSample]]:
        """As `packing.first_fit` has it."""
        sizes = [num_tokens(tuple(sample.latent.shape), *self._patch) for sample in samples]
        return [[samples[index] for index in pack] for pack in first_fit(sizes, self._length)]

    @stateless
    def pack_selected_samples(self, samples: list[LatentSample]) -> PackedSample:
        """One packed sequence."""
        keys = [sample.__key__ for sample in samples]
        return packed(keys, [sample.latent for sample in samples], [sample.context for sample in samples], ",".join(keys))


class SampleError(DataError, SystemError):
    """A DataError that Energon lets through: it swallows whatever is no SystemError."""


def raise_data_error(error: Exception, sample: Any, sources: Any) -> None:
    """Energon's error handler: stop, and say which sample of which shard is at fault."""
    if isinstance(error, SkipSample):
        return
    places = sorted({f"{source.dataset_path}/{source.shard_name}" for source in sources or () if source.shard_name})
    keys = sample.get("__key__") if isinstance(sample, dict) else getattr(sample, "__key__", None)
    where = f"sample {keys}" + (f" of {', '.join(places)}" if places else "")
    raise SampleError(f"{where}: {error}") from error
