"""Records of activations: mean and covariance of what a model's layers say of images, for those who will not have the images.

record = Records(num_classes=10)
with torch.no_grad(), Taps(model.eval(), ["logits"]) as taps:
    for images, labels in batches:        # as the model was trained on
        model(images)
        record.add([taps["logits"]], labels)
record.save("records.safetensors")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from raykd.errors import ConfigError, DataError, SignalError


class Records:
    """Gathers mean and covariance batch by batch; keeps no activation.

    Args:
        num_classes: a record of each class; None: one of all images.
    """

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = num_classes
        self._count = np.zeros(num_classes or 1)
        self._mean: NDArray[np.float64] = np.zeros((num_classes or 1, 0))
        self._spread: NDArray[np.float64] = np.zeros((num_classes or 1, 0, 0))

    def add(self, activations: Sequence[Tensor], labels: Tensor | None = None) -> None:
        """Takes a batch in.

        Args:
            activations: of each layer, `[b d]` or, averaged over places, `[b d h w]`; the same layers at each call.
            labels: `[b]` int64; read where classes are told apart.

        Raises:
            SignalError: neither vectors nor maps, or other layers than before.
            DataError: no labels, or a label that is no class.
        """
        rows = pooled(activations).detach().double().cpu().numpy()
        if not self._mean.shape[1]:
            size = rows.shape[1]
            self._mean, self._spread = np.zeros((len(self._count), size)), np.zeros((len(self._count), size, size))
        if rows.shape[1] != self._mean.shape[1]:
            raise SignalError(f"records: expected {self._mean.shape[1]} activations as before, got {rows.shape[1]}.")
        for place, own in self._parted(rows, labels):
            before, count = self._count[place], self._count[place] + len(own)
            apart = own.mean(0) - self._mean[place]
            around = own - own.mean(0)
            self._spread[place] += around.T @ around + np.outer(apart, apart) * before * len(own) / count
            self._mean[place] += apart * len(own) / count
            self._count[place] = count

    def _parted(self, rows: NDArray[Any], labels: Tensor | None) -> list[tuple[int, NDArray[Any]]]:
        if self.num_classes is None:
            return [(0, rows)]
        known = None if labels is None else labels.cpu().numpy()
        if known is None or len(known) != len(rows) or known.min() < 0 or known.max() >= self.num_classes:
            got = "none" if known is None else f"{len(known)} from {known.min()} to {known.max()}"
            raise DataError(
                f"records: expected {len(rows)} labels below {self.num_classes}, got {got}. Give each image's class."
            )
        return [(int(label), rows[known == label]) for label in np.unique(known)]

    def save(self, path: str | Path) -> None:
        """Writes `mean` and `covariance` (unbiased), `[t]` and `[t t]`, or `[k t]` and `[k t t]` of k classes.

        Raises:
            DataError: fewer than two images, of all or of a class.
        """
        few = np.flatnonzero(self._count < 2)
        if len(few):
            of = f" of class {few[0]}" if self.num_classes is not None else ""
            raise DataError(f"records: expected at least two images{of}, got {int(self._count[few[0]])}. Add more.")
        covariance = self._spread / (self._count - 1)[:, None, None]
        own = (self._mean, covariance) if self.num_classes is not None else (self._mean[0], covariance[0])
        save_file({"mean": np.ascontiguousarray(own[0]), "covariance": np.ascontiguousarray(own[1])}, str(path))


def load(path: str, where: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of a file of records, as `Records.save` describes them.

    Args:
        path: of the file; absolute, as who reads it may run in another folder.
        where: slug of the loss, for the message.

    Raises:
        ConfigError: no absolute path, no such file, or no record.
    """
    if not Path(path).is_absolute():
        raise ConfigError(
            f"records: expected the absolute path of a file of activation records, got {path!r} ({where}). Make one with "
            "raykd.parts.records."
        )
    try:
        found = load_file(path)
        mean, covariance = found["mean"].astype(np.float64), found["covariance"].astype(np.float64)
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise ConfigError(f"records: {path} cannot be read ({type(error).__name__}: {error}) ({where}).") from None
    if mean.ndim not in (1, 2) or covariance.shape != (*mean.shape, mean.shape[-1]):
        raise ConfigError(
            f"records: expected mean [t] and covariance [t t], or those of each class, got {list(mean.shape)} and "
            f"{list(covariance.shape)} in {path} ({where})."
        )
    return mean, covariance


def pooled(activations: Sequence[Tensor]) -> Tensor:
    """Activations of several layers, one after the other, `[b t]`; of maps the means over places.

    Raises:
        SignalError: a layer has neither vectors nor maps.
    """
    for number, activation in enumerate(activations):
        if activation.ndim not in (2, 4):
            raise SignalError(f"activations[{number}]: expected [b d] or [b d h w], got {list(activation.shape)}.")
    return torch.cat([a.mean((2, 3)) if a.ndim == 4 else a for a in activations], 1)
