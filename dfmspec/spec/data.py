"""`dataset` and `data`: where samples come from and how they become packed sequences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfmspec.spec.base import Count, NonNegativeInt, Section, derived


class Dataset(Section):
    """The WebDataset and its packing; names of DFM's data module."""

    path: str | None = None
    (
        "Folder of shards with Energon's .nv-meta, or a metadataset's .yaml, which blends some; "
        "the how-to's --dataset-path."
    )
    task_encoder_seq_length: Count = 8192
    """Tokens of one packed sequence."""
    packing_buffer_size: Count = derived()
    (
        "Samples from which packs are chosen; "
        "derived: 40, and of drawn samples, whose size is known, as many more as make whole packs."
    )
    shuffle_buffer_size: Count = 100
    """Samples from which the next one is drawn."""
    num_workers: NonNegativeInt = 4
    """Loader processes of one data-parallel rank, one for each of its streams; 0: load in the trainer's process."""
    micro_batch_size: Count = derived()
    """Copy of train.micro_batch_size; derived."""
    global_batch_size: Count = derived()
    """Copy of train.global_batch_size; derived."""
    use_train_split_for_val: bool = False
    """Evaluate on the training split, for a dataset without a validation split."""


class Data(Section):
    """What the dataset is made of."""

    source: Literal["webdataset", "embedded", "mock"] = "webdataset"
    """webdataset: dataset.path. embedded: drawn by dfmspec when absent. mock: random latents, never on disk."""
    resolution: Literal[64, 128, 256, 512] = 64
    """Pixels on a side of an embedded picture."""
    num_samples: Annotated[int, Field(ge=8)] = 2048
    """Embedded pictures."""
    seed: NonNegativeInt = 0
    """Seed of the embedded pictures."""
    num_streams: Count = derived()
    (
        "Independent sample streams, a multiple of every data-parallel size the run may have; "
        "derived: the data-parallel size x max(1, dataset.num_workers)."
    )
