"""Views of a data set: some of its samples, or other labels. The pixels stay where they are."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from raykd.data.decoding import Images
from raykd.data.keys import uniform
from raykd.data.sets import DataSet, Labels
from raykd.errors import DataError


class View:
    """Chosen samples of a data set, with its own positions and, if given, its own labels.

    Args:
        base: where the pixels are.
        rows: [m] positions in `base`, in the order of the view.
        labels: [m]; None takes the base's.
    """

    def __init__(self, base: DataSet, rows: NDArray[np.int64], labels: Labels | None = None) -> None:
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(base)):
            raise DataError(f"subset: expected positions 0..{len(base) - 1}, got {rows.min()}..{rows.max()}.")
        self.base, self.rows = base, rows
        self._labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_classes(self) -> int:
        """Of the base."""
        return self.base.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the base."""
        return self.base.shape

    @property
    def labels(self) -> Labels:
        """[m] labels of the view."""
        if self._labels is None:
            self._labels = self.base.labels[self.rows]
        return self._labels

    @property
    def fingerprint(self) -> str:
        """Hash of the base, the rows and the labels."""
        digest = hashlib.blake2b(self.base.fingerprint.encode(), digest_size=16)
        digest.update(self.rows.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def read(self, sample_index: NDArray[np.int64]) -> Images:
        """[k c h w] images at positions of the view."""
        return self.base.read(self.rows[sample_index])

    def where(self, row: int) -> str:
        """Names the row in the base."""
        return self.base.where(int(self.rows[row]))


def subset(
    dataset: DataSet, indices: NDArray[np.int64] | None = None, *, limit: int | None = None, per_class: int | None = None
) -> View:
    """Some samples of `dataset`; exactly one of the three choices.

    Args:
        dataset: any.
        indices: [m] positions, kept in this order.
        limit: the first samples.
        per_class: the first samples of each class, in data set order.

    Raises:
        DataError: not one choice, a position out of range, or a class with fewer samples.
    """
    if sum(choice is not None for choice in (indices, limit, per_class)) != 1:
        raise DataError("subset: expected one of indices, limit, per_class, got none or several.")
    if per_class is not None:
        indices = _balanced(dataset, per_class)
    elif limit is not None:
        indices = np.arange(limit, dtype=np.int64)
    assert indices is not None
    return View(dataset, indices)


def _balanced(dataset: DataSet, per_class: int) -> NDArray[np.int64]:
    labels = dataset.labels
    counts = np.bincount(labels, minlength=dataset.num_classes)
    if counts.min() < per_class:
        raise DataError(
            f"per_class: expected at least {per_class} samples a class, got {counts.min()} in class {counts.argmin()}."
        )
    rows = [np.flatnonzero(labels == label)[:per_class] for label in range(dataset.num_classes)]
    return np.sort(np.concatenate(rows)).astype(np.int64)


def held_out(dataset: DataSet, share: float, seed: int) -> tuple[View, View]:
    """(the rest, the held-out part) of `dataset`: `share` of each class, rounded, at least one sample, chosen by keyed draws.

    Both keep the order of the data set and count their own positions from 0.

    Args:
        dataset: any.
        share: above 0 and below 1.
        seed: keys the choice.

    Raises:
        DataError: a class has too few samples for both parts.
    """
    labels = np.asarray(dataset.labels)
    drawn = uniform(seed, 0, np.arange(len(labels), dtype=np.int64), 1, "holdout")[:, 0]
    held = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(share * len(rows)))
        if count >= len(rows):
            raise DataError(
                f"data.holdout: expected samples of class {label} on both sides of a share of {share:g}, got {len(rows)} in "
                "all. Lower data.holdout, or take more training samples."
            )
        held[rows[np.argsort(drawn[rows], kind="stable")[:count]]] = True
    return View(dataset, np.flatnonzero(~held)), View(dataset, np.flatnonzero(held))


def noisy_labels(dataset: DataSet, seed: int) -> View:
    """`dataset` with labels drawn uniformly, keyed by (seed, position): nothing can be learned from them."""
    rows = np.arange(len(dataset), dtype=np.int64)
    labels = (uniform(seed, 0, rows, 1, "label noise")[:, 0] * dataset.num_classes).astype(np.int64)
    return View(dataset, rows, labels)
