"""Training images beside images that are made: read by keys, so that a resumed run and any number of workers read the same."""

from __future__ import annotations

import numpy as np
import torch

from raykd.config import Job
from raykd.data.batches import Batch, make_batch
from raykd.data.keys import permutation
from raykd.data.sets import DataSet


class Beside:
    """Batches of training images as a generator's images are: floats, 0 black and 1 white.

    For each purpose the set is gone through in an order of its own for each pass, so that each image is read as often as
    others; of a batch of all workers each reads its part.

    Args:
        train: the images.
        job: resolved; its seed, augmentation and views.
        rank: of this worker.
        world: number of workers.
        dtype: of the images.
    """

    def __init__(self, train: DataSet, job: Job, rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.train, self.job, self.rank, self.world, self.dtype = train, job, rank, world, dtype

    def read(self, purpose: str, number: int, count: int, augmented: bool = False) -> Batch:
        """This worker's part of a batch: images, labels, sample_index, and the pass as augmentation_seed.

        Args:
            purpose: its name.
            number: of the batch; those before it had as many images.
            count: images of this worker.
            augmented: as the job says; else as they are.
        """
        n, spec = len(self.train), self.job.data
        passes, places = np.divmod(np.arange(count) + (number * self.world + self.rank) * count, n)
        orders = {int(k): permutation(self.job.data_seed, int(k), n, f"beside {purpose}") for k in np.unique(passes)}
        rows = np.array([orders[int(k)][place] for k, place in zip(passes, places)], np.int64)
        shown = passes if spec.augmentation_epochs is None else passes % spec.augmentation_epochs
        found = make_batch(self.train, rows, spec.augmentation if augmented else None, self.job.data_seed, shown, spec.view)
        found["images"] = found["images"].to(self.dtype) / 255
        return found | {"augmentation_seed": torch.from_numpy(shown.astype(np.int32))}
