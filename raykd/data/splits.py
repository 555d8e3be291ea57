"""The splits of a job: opened as the job says, with its limits and label noise."""

from __future__ import annotations

from raykd.config import Data
from raykd.data.sets import DataSet, open_split
from raykd.data.views import noisy_labels, subset


def has_split(spec: Data, split: str) -> bool:
    """Whether the job has this split; digits and torchvision's sets have `eval` of their own, `test` only where it is named."""
    named = getattr(spec, split) is not None
    return named or split == "train" or (split == "eval" and (spec.kind == "digits" or spec.kind.startswith("torchvision:")))


def open_data(spec: Data, split: str, seed: int = 0) -> DataSet:
    """Opens a split: `limit` and `per_class` cut the training set, `eval_limit` the others; `noisy_labels` spoils its labels.

    Args:
        spec: the job's data.
        split: train | eval | test.
        seed: of the job; keys the label noise.

    Raises:
        DataError: the split cannot be read, or is smaller than a limit.
    """
    dataset = open_split(spec, split)
    if split != "train":
        return subset(dataset, limit=spec.eval_limit) if spec.eval_limit and spec.eval_limit < len(dataset) else dataset
    if spec.per_class is not None:
        dataset = subset(dataset, per_class=spec.per_class)
    elif spec.limit is not None:
        dataset = subset(dataset, limit=min(spec.limit, len(dataset)))
    return noisy_labels(dataset, seed) if spec.noisy_labels else dataset
