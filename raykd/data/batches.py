"""Batches: position to samples, samples to pixels, and recipes that any process turns into the same pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raykd.config import Augmentation
from raykd.data.augment import Keys, augment
from raykd.data.decoding import Images
from raykd.data.keys import permutation
from raykd.data.mixing import mix, plan_mix
from raykd.data.sets import DataSet
from raykd.errors import ConfigError, DataError

VIEW = "view_"  # fields view_1, view_2, ...: further augmentations of the same samples
_MAX_EPOCH = 2**31 - 1


class Batch(dict[str, Tensor]):
    """Named fields of one batch, first axis the samples.

    Fields: `images` [b c h w] uint8, `labels` [b] int64, `sample_index` [b] int64 position in the data set; `mask` [b] bool
    where some rows do not count; with mixing `mix_labels` [b] int64 and `mix_weight` [b] float32, the share of `labels`. A
    recipe has `sample_index` and `augmentation_seed` [b] int32 only: 12 bytes a sample.
    """

    def __or__(self, other: Mapping[str, Tensor]) -> Batch:  # type: ignore[override]
        """The batch with more fields."""
        return Batch({**self, **other})

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self["sample_index"])

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(field.numel() * field.element_size() for field in self.values())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its fields on `device`."""
        return Batch({name: field.to(device, non_blocking=non_blocking) for name, field in self.items()})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory."""
        return Batch({name: field.pin_memory() for name, field in self.items()})


@dataclass(frozen=True)
class Plan:
    """Which samples a worker sees at (epoch, step): a pure function.

    The global batch `step` of an epoch is order[step * batch_size : (step + 1) * batch_size]; each worker takes its contiguous
    equal share. With drop_last False the last short batch is split as evenly as possible, and dropped if a worker would get
    fewer than two samples (batch normalisation needs two).

    Attributes:
        num_samples: of the data set.
        batch_size: samples of a global batch, over all workers.
        seed: of the run.
        shuffle: a new order each epoch, keyed by (seed, epoch); else data set order.
        drop_last: leave out the last short batch.
        world: number of workers.
        rank: this worker, 0..world-1.
        augmentation_epochs: epoch e shows the views of epoch e modulo this, in its own order; None: new views in every epoch.
        first_view: which of the independent augmentations of a sample is shown.
        views: how many are shown: `images`, and `view_1`, `view_2`, ... beside them.

    Raises:
        ConfigError: the numbers contradict each other.
        DataError: the data set gives no batch.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    world: int = 1
    rank: int = 0
    augmentation_epochs: int | None = None
    first_view: int = 0
    views: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank: expected 0..{self.world - 1}, got {self.rank}.")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise ConfigError(f"batch_size: expected a multiple of {self.world} workers, got {self.batch_size}. Change either.")
        if self.steps_per_epoch == 0:
            raise DataError(f"data set: expected at least one batch of {self.batch_size}, got {self.num_samples} samples.")

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch, equal for all workers."""
        full, left = divmod(self.num_samples, self.batch_size)
        return full + (not self.drop_last and left // self.world >= 2)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of the step counted from the start of the run."""
        return divmod(step, self.steps_per_epoch)

    def view(self, epoch: int) -> int:
        """The epoch whose views an epoch shows: what keys its augmentation, and what its recipes carry."""
        return epoch if self.augmentation_epochs is None else epoch % self.augmentation_epochs

    def global_batch(self, epoch: int, step: int) -> NDArray[np.int64]:
        """[B] sample_index of all workers together."""
        if not 0 <= step < self.steps_per_epoch:
            raise ConfigError(f"step: expected 0..{self.steps_per_epoch - 1} of epoch {epoch}, got {step}.")
        start = step * self.batch_size
        stop = min(start + self.batch_size, self.num_samples)
        if not self.shuffle:
            return np.arange(start, stop, dtype=np.int64)
        return permutation(self.seed, epoch, self.num_samples)[start:stop].copy()

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        """[b] sample_index of this worker."""
        return np.array_split(self.global_batch(epoch, step), self.world)[self.rank]


def batch_of(dataset: DataSet, plan: Plan, augmentation: Augmentation | None, epoch: int, step: int) -> Batch:
    """The batch of a worker's plan at (epoch, step), with all its views."""
    rows, shown = plan.indices(epoch, step), plan.view(epoch)
    batch = make_batch(dataset, rows, augmentation, plan.seed, shown, plan.first_view)
    for i in range(1, plan.views):
        batch[f"{VIEW}{i}"] = make_batch(dataset, rows, augmentation, plan.seed, shown, plan.first_view + i)["images"]
    return batch


def make_batch(
    dataset: DataSet,
    sample_index: NDArray[np.int64],
    augmentation: Augmentation | None,
    seed: int,
    epoch: int | NDArray[np.int64],
    view: int = 0,
) -> Batch:
    """The batch that its keys name; the same bits in every process.

    Args:
        dataset: where images and labels are.
        sample_index: [b].
        augmentation: None leaves the images as they are.
        seed: of the run.
        epoch: one for all, or [b]; 0 to 2**31 - 1.
        view: 0, or another number for a further independent view of the same samples.

    Returns:
        images, labels, sample_index and, where the augmentation mixes, mix_labels and mix_weight.

    Raises:
        DataError: a sample cannot be read.
    """
    rows = np.array(sample_index, np.int64)
    epochs = np.broadcast_to(np.asarray(epoch, np.int64), rows.shape)
    labels = dataset.labels[rows]
    batch = Batch(labels=torch.from_numpy(labels), sample_index=torch.from_numpy(rows))
    if augmentation is None:
        batch["images"] = torch.from_numpy(dataset.read(rows))
        return batch
    keys = Keys(seed, epochs, rows, view)
    images = augment(dataset.read(rows), keys, augmentation)
    if augmentation.mixes:
        images = _mixed(dataset, images, keys, augmentation, batch)
    batch["images"] = torch.from_numpy(np.ascontiguousarray(images))
    return batch


def _mixed(dataset: DataSet, images: Images, keys: Keys, spec: Augmentation, batch: Batch) -> Images:
    """`images` mixed with their partners' views of the same epoch; adds mix_labels and mix_weight to `batch`."""
    plan = plan_mix(keys, len(dataset), (images.shape[2], images.shape[3]), spec)
    mixed = np.flatnonzero(plan.weight < 1)
    other_keys = Keys(keys.seed, keys.epoch[mixed], plan.partner[mixed], keys.view)
    others = np.zeros_like(images)
    others[mixed] = augment(dataset.read(plan.partner[mixed]), other_keys, spec)
    mix_labels = batch["labels"].numpy().copy()
    mix_labels[mixed] = dataset.labels[plan.partner[mixed]]
    batch["mix_labels"] = torch.from_numpy(mix_labels)
    batch["mix_weight"] = torch.from_numpy(plan.weight)
    return mix(images, others, plan)


def recipe(batch: Batch, epoch: int | NDArray[np.int64]) -> Batch:
    """What another process needs to re-create the images of `batch`: sample_index and augmentation_seed, 12 bytes a sample.

    `augmentation_seed` is the epoch of the views (`Plan.view`): with the run's seed and sample_index it keys every draw.
    (int32, since torch cannot unpickle uint32 tensors.)
    """
    if np.min(epoch) < 0 or np.max(epoch) > _MAX_EPOCH:
        raise ConfigError(f"epoch: expected 0..{_MAX_EPOCH} in a recipe, got {np.max(epoch)}.")
    seeds = np.broadcast_to(np.asarray(epoch, np.int32), (batch.size,)).copy()
    return Batch(sample_index=batch["sample_index"], augmentation_seed=torch.from_numpy(seeds))


def from_recipe(dataset: DataSet, augmentation: Augmentation | None, seed: int, recipe: Batch, view: int = 0) -> Batch:
    """The batch of a recipe, bit for bit the one it was taken from."""
    epochs = recipe["augmentation_seed"].numpy().astype(np.int64)
    return make_batch(dataset, recipe["sample_index"].numpy(), augmentation, seed, epochs, view)


def evaluation_batches(dataset: DataSet, batch_size: int, world: int = 1, rank: int = 0) -> Iterator[Batch]:
    """The data set in order, without augmentation, the last short batch kept; worker r takes batches r, r + world, ...

    Whole batches go to a worker, so that every batch has the same bits with any number of workers.
    """
    for start in range(rank * batch_size, len(dataset), world * batch_size):
        rows = np.arange(start, min(start + batch_size, len(dataset)), dtype=np.int64)
        yield make_batch(dataset, rows, None, 0, 0)
