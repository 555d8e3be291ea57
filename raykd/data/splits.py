"""The splits of a job: opened as the job says, with its limits, held-out part and label noise."""

from __future__ import annotations

import numpy as np

from raykd.config import NO_DATA, Data
from raykd.data.sets import DataSet, open_split
from raykd.data.views import held_out, noisy_labels, subset
from raykd.errors import DataError

HOLDOUT = "holdout"  # a split cut from the training set; `data.eval = "holdout"` measures on it


def has_split(spec: Data, split: str) -> bool:
    """Whether the job has this split; digits and torchvision's sets have `eval` of their own, `test` only where it is named."""
    if split == HOLDOUT or (split == "eval" and spec.eval == HOLDOUT):
        return spec.holdout > 0
    if split == "train" and spec.train == NO_DATA:
        return False
    named = getattr(spec, split) is not None
    return named or split == "train" or (split == "eval" and (spec.kind == "digits" or spec.kind.startswith("torchvision:")))


def open_data(spec: Data, split: str, seed: int | None = None) -> DataSet:
    """Opens a split: `limit` and `per_class` cut the training set, `eval_limit` the others; `noisy_labels` spoils its labels.

    With `holdout`, that share of the training set is the split `holdout`, with its labels as they are, and `train` is the rest,
    with positions of its own. `shard` takes every n-th sample of what is left; all shards are alike in size.

    Args:
        spec: the job's data.
        split: train | eval | test | holdout; `eval` is the split `holdout` where `data.eval` says so.
        seed: of the job; keys the label noise and the choice of what is held out, and is needed for these only.

    Raises:
        DataError: the split cannot be read, or is smaller than a limit.
    """
    if split == "eval" and spec.eval == HOLDOUT:
        split = HOLDOUT
    if split not in ("train", HOLDOUT):
        dataset = open_split(spec, split)
        return subset(dataset, limit=spec.eval_limit) if spec.eval_limit and spec.eval_limit < len(dataset) else dataset
    if spec.train == NO_DATA:
        raise DataError("data.train: this job makes its own images and reads none to learn from.")
    dataset = open_split(spec, "train")
    if spec.per_class is not None:
        dataset = subset(dataset, per_class=spec.per_class)
    elif spec.limit is not None:
        dataset = subset(dataset, limit=min(spec.limit, len(dataset)))
    if spec.holdout or split == HOLDOUT:
        _require_share(spec.holdout)
        assert seed is not None, "what is held out is keyed by the job's seed"
        rest, held = held_out(dataset, spec.holdout, seed)
        if split == HOLDOUT:
            return held
        dataset = rest
    if spec.shard is not None:
        part, parts = spec.shard
        if not part < parts <= len(dataset):
            raise DataError(f"data.shard: expected (i, n) with i < n, n at most {len(dataset)} samples, got ({part}, {parts}).")
        dataset = subset(dataset, indices=np.arange(part, len(dataset) // parts * parts, parts))
    return noisy_labels(dataset, seed or 0) if spec.noisy_labels else dataset


def _require_share(share: float) -> None:
    if not 0 < share < 1:
        raise DataError(f"data.holdout: expected a share above 0 and below 1, got {share:g}. Set it, for example to 0.1.")
