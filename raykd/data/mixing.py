"""Mixup and cutmix whose partners are a keyed permutation of the data set, so that a mixed image is a function of its keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv

from raykd.config import Augmentation
from raykd.data.augment import Floats, Keys, rectangles
from raykd.data.decoding import Images
from raykd.data.keys import permutation


@dataclass(frozen=True)
class Mix:
    """How the samples of a batch are mixed.

    Attributes:
        partner: [b] positions in the data set.
        weight: [b] share of the sample itself, 1/2 to 1; 1 where it is not mixed.
        boxes: [b, 4] top, left, bottom, right of the partner's patch; empty where the sample takes mixup or nothing.
    """

    partner: NDArray[np.int64]
    weight: NDArray[np.float32]
    boxes: NDArray[np.int64]


def plan_mix(keys: Keys, num_samples: int, size: tuple[int, int], spec: Augmentation) -> Mix:
    """Partners, weights and patches of a batch.

    The weight is max(lam, 1 - lam), lam from Beta(alpha, alpha), so that `labels` names the greater part. A patch is cut off
    at the border, and its weight is by the pixels that are left of it.

    Args:
        keys: of the b samples.
        num_samples: of the data set.
        size: (h, w) of the views.
        spec: alphas and probability.
    """
    draws = keys.uniform(5, "mix")
    mixed = draws[:, 0] < spec.mix_probability
    cut = (draws[:, 1] < 0.5) if spec.mixup > 0 and spec.cutmix > 0 else np.full(len(draws), spec.cutmix > 0)
    lam = np.where(cut, _beta(draws[:, 2], spec.cutmix), _beta(draws[:, 2], spec.mixup))
    lam = np.maximum(lam, 1 - lam)
    boxes = np.where((mixed & cut)[:, None], _boxes(lam, draws[:, 3:], size), 0)
    patch = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (size[0] * size[1])
    weight = np.where(mixed, np.where(cut, 1 - patch, lam), 1.0)
    return Mix(partners(keys, num_samples), weight.astype(np.float32), boxes)


def partners(keys: Keys, num_samples: int) -> NDArray[np.int64]:
    """[b] partner of each sample: its image under the permutation of its epoch."""
    out = np.empty(len(keys.sample_index), np.int64)
    for epoch in np.unique(keys.epoch).tolist():
        chosen = keys.epoch == epoch
        out[chosen] = permutation(keys.seed, epoch, num_samples, f"mix partners/{keys.view}")[keys.sample_index[chosen]]
    return out


def mix(images: Images, others: Images, plan: Mix) -> Images:
    """round(weight * images + (1 - weight) * others), or `others` within the patch; all [b c h w] uint8."""
    patched = plan.boxes[:, 2] > plan.boxes[:, 0]
    blended = np.flatnonzero((plan.weight < 1) & ~patched)
    out = images
    if len(blended):
        weight = torch.from_numpy(plan.weight[blended])[:, None, None, None]
        mine, theirs = torch.from_numpy(images[blended]).float(), torch.from_numpy(others[blended]).float()
        out[blended] = (mine.mul_(weight) + theirs.mul_(1 - weight)).round_().to(torch.uint8).numpy()
    if patched.any():
        inside = rectangles(plan.boxes, (images.shape[2], images.shape[3]))
        out = np.where(inside[:, None], others, out)
    return out


def _beta(draws: Floats, alpha: float) -> Floats:
    """Quantiles of Beta(alpha, alpha)."""
    if alpha <= 0:
        return np.ones_like(draws)
    return draws if alpha == 1 else np.asarray(betaincinv(alpha, alpha, draws), np.float64)


def _boxes(lam: Floats, centre: Floats, size: tuple[int, int]) -> NDArray[np.int64]:
    """[b, 4] patches of area (1 - lam), around uniform centres, cut off at the border."""
    sides = np.sqrt(1 - lam)[:, None] * np.array(size)
    half = (sides / 2).astype(np.int64)
    middle = (centre * np.array(size)).astype(np.int64)
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half, np.array(size))
    return np.concatenate([low, high], 1)
