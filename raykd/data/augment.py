"""Augmentation of a uint8 batch, every parameter keyed by (seed, epoch, sample_index).

All roles re-create the same view. A sample's view depends on its own key only, never on the batch it stands in. Order:
crop or resized crop, flip, RandAugment, erasing; then `raykd.data.mixing` mixes two such views.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from raykd.data.decoding import Images
from raykd.data.keys import uniform
from raykd.data.randaugment import BINS, randaugment
from raykd.errors import ConfigError, near

Floats: TypeAlias = NDArray[np.float64]
PAD_MODES = ("zero", "reflect")
_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """What happens to the pixels of a training batch.

    Attributes:
        crop: pixels of padding at each side before a random crop of the old size; 0 is none (He et al. 2015 use 4 on CIFAR).
        pad_mode: "zero" or "reflect".
        flip: mirror half of the images, left to right.
        randaugment: (operations an image, magnitude 0..30), None is none (arXiv 1909.13719; (2, 9) is common).
        resized_crop: side of the square that a random part is resized to, None is none (ImageNet: 224).
        scale: least and greatest share of the area of that part.
        ratio: least and greatest width / height of it.
        erase: probability that a rectangle gets one random colour (arXiv 1708.04896).
        mixup: alpha of Beta(alpha, alpha), 0 is off (arXiv 1710.09412).
        cutmix: alpha of Beta(alpha, alpha), 0 is off (arXiv 1905.04899); with mixup too, each image takes either with 1/2.
        mix_probability: share of the images that are mixed at all.
    """

    crop: int = 0
    pad_mode: str = "zero"
    flip: bool = False
    randaugment: tuple[int, int] | None = None
    resized_crop: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0

    @property
    def mixes(self) -> bool:
        """Whether batches carry mix_labels and mix_weight."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0

    def validate(self) -> list[str]:
        """Faults of the settings, empty when there are none."""
        faults = []
        if self.crop < 0:
            faults.append(f"augment.crop: expected 0 or more pixels, got {self.crop}.")
        if self.pad_mode not in PAD_MODES:
            faults.append(
                f"augment.pad_mode: expected zero or reflect, got '{self.pad_mode}'. {near(self.pad_mode, PAD_MODES)}"
            )
        if self.crop and self.resized_crop:
            faults.append("augment.resized_crop: expected either crop or resized_crop, got both. Set one of them.")
        if self.resized_crop is not None and self.resized_crop < 1:
            faults.append(f"augment.resized_crop: expected a side of 1 or more pixels, got {self.resized_crop}.")
        if self.randaugment is not None and not _is_policy(self.randaugment):
            faults.append(f"augment.randaugment: expected (operations >= 1, magnitude 0..{BINS - 1}), got {self.randaugment}.")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "scale" and high > 1):
                faults.append(
                    f"augment.{name}: expected 0 < least <= greatest{' <= 1' * (name == 'scale')}, got {low}, {high}."
                )
        for name in ("erase", "mix_probability"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"augment.{name}: expected a probability, got {getattr(self, name)}.")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                faults.append(f"augment.{name}: expected an alpha of 0 or more, got {getattr(self, name)}.")
        return faults

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Augmentation:
        """The inverse of `to_dict`. Raises ConfigError at an unknown name."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"augment: expected a known setting, got '{key}'. {near(key, names)}")
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**settings)

    def out_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(c, h, w) of augmented images."""
        return (shape[0], self.resized_crop, self.resized_crop) if self.resized_crop else shape


def _is_policy(policy: tuple[int, int]) -> bool:
    return len(policy) == 2 and policy[0] >= 1 and 0 <= policy[1] < BINS


@dataclass(frozen=True)
class Keys:
    """What every draw of a batch is keyed by: seed, view, and for each sample its epoch [b] and index [b]."""

    seed: int
    epoch: NDArray[np.int64]
    sample_index: NDArray[np.int64]
    view: int = 0

    def uniform(self, draws: int, purpose: str) -> Floats:
        """[b, draws] in [0, 1)."""
        return uniform(self.seed, self.epoch, self.sample_index, draws, f"{purpose}/{self.view}")


def augment(images: Images, keys: Keys, spec: Augmentation) -> Images:
    """The views of `images` that `keys` name; `images` may be changed in place.

    Args:
        images: [b c h w] uint8.
        keys: of the b samples.
        spec: what to do.

    Returns:
        [b c h' w'] uint8, where (h', w') is the old size, or resized_crop's.
    """
    if spec.resized_crop:
        images = resized_crop(images, keys, spec.resized_crop, spec.scale, spec.ratio)
    if spec.crop:
        images = crop(images, keys, spec.crop, spec.pad_mode)
    if spec.flip:
        mirrored = keys.uniform(1, "flip")[:, 0] < 0.5
        images[mirrored] = images[mirrored][..., ::-1]
    if spec.randaugment:
        operations, magnitude = spec.randaugment
        images = randaugment(images, keys.uniform(2 * operations, "randaugment"), magnitude)
    return erase(images, keys, spec.erase) if spec.erase else images


def crop(images: Images, keys: Keys, padding: int, pad_mode: str = "zero") -> Images:
    """Crops of the old size out of padded images, at offsets uniform over 0..2*padding in both directions."""
    b, _, h, w = images.shape
    edges = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    padded = np.pad(images, edges, mode="reflect") if pad_mode == "reflect" else _zero_pad(images, padding)
    offsets = (keys.uniform(2, "crop") * (2 * padding + 1)).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (h, w), axis=(2, 3))
    return np.ascontiguousarray(windows[np.arange(b), :, offsets[:, 0], offsets[:, 1]])


def _zero_pad(images: Images, padding: int) -> Images:
    b, c, h, w = images.shape
    padded = np.zeros((b, c, h + 2 * padding, w + 2 * padding), np.uint8)
    padded[:, :, padding : padding + h, padding : padding + w] = images
    return padded


def resized_crop(
    images: Images, keys: Keys, size: int, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Images:
    """A random part of each image resized to [size size], bilinear with antialias.

    The part's share of the area is uniform in `scale`, the logarithm of its width / height uniform in `ratio`; of ten draws
    the first that fits counts, else the largest centre part (Szegedy et al., arXiv 1409.4842).
    """
    top, left, height, width = crop_boxes(keys, images.shape[2:], scale, ratio).T.tolist()
    pixels = torch.from_numpy(images)
    out = torch.empty((len(images), images.shape[1], size, size), dtype=torch.uint8)
    for i in range(len(images)):
        part = pixels[i : i + 1, :, top[i] : top[i] + height[i], left[i] : left[i] + width[i]]
        out[i] = resize(part, (size, size))[0]
    return out.numpy()


def resize(images: UInt8[Tensor, "b c h w"], size: tuple[int, int]) -> UInt8[Tensor, "b c y x"]:
    """Bilinear with antialias, in uint8."""
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def crop_boxes(keys: Keys, size: tuple[int, ...], scale: tuple[float, float], ratio: tuple[float, float]) -> NDArray[np.int64]:
    """[b, 4] top, left, height, width of `resized_crop`'s parts in images of `size` (h, w)."""
    h, w = size
    draws = keys.uniform(2 * _TRIES + 2, "resized crop")
    area = (scale[0] + draws[:, :_TRIES] * (scale[1] - scale[0])) * (h * w)
    aspect = np.exp(np.log(ratio[0]) + draws[:, _TRIES : 2 * _TRIES] * (np.log(ratio[1]) - np.log(ratio[0])))
    widths = np.round(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.round(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths > 0) & (widths <= w) & (heights > 0) & (heights <= h)
    rows, first = np.arange(len(draws)), fits.argmax(1)
    whole_width = min(w, round(h * ratio[1]))
    whole_height = min(h, round(w / ratio[0]))
    found = fits.any(1)
    width = np.where(found, widths[rows, first], whole_width)
    height = np.where(found, heights[rows, first], whole_height)
    top = np.where(found, (draws[:, -2] * (h - height + 1)).astype(np.int64), (h - height) // 2)
    left = np.where(found, (draws[:, -1] * (w - width + 1)).astype(np.int64), (w - width) // 2)
    return np.stack([top, left, height, width], 1)


def erase(images: Images, keys: Keys, probability: float) -> Images:
    """Fills a rectangle of 2 to 33 % of the area, 0.3 to 3.3 wide to high, with one random colour (cut at h, w)."""
    _, c, h, w = images.shape
    draws = keys.uniform(5 + c, "erase")
    area = (0.02 + draws[:, 1] * 0.31) * (h * w)
    aspect = np.exp(np.log(0.3) + draws[:, 2] * (np.log(3.3) - np.log(0.3)))
    height = np.clip(np.round(np.sqrt(area / aspect)), 1, h).astype(np.int64)
    width = np.clip(np.round(np.sqrt(area * aspect)), 1, w).astype(np.int64)
    top = (draws[:, 3] * (h - height + 1)).astype(np.int64)
    left = (draws[:, 4] * (w - width + 1)).astype(np.int64)
    inside = rectangles(np.stack([top, left, top + height, left + width], 1), (h, w))
    inside &= (draws[:, 0] < probability)[:, None, None]
    colour = (draws[:, 5:] * 256).astype(np.uint8)[:, :, None, None]
    return np.where(inside[:, None], colour, images)


def rectangles(boxes: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.bool_]:
    """[b h w] true within top, left, bottom, right (ends excluded) of `boxes` [b, 4]."""
    ys, xs = np.arange(size[0]), np.arange(size[1])
    rows = (ys >= boxes[:, :1]) & (ys < boxes[:, 2:3])
    columns = (xs >= boxes[:, 1:2]) & (xs < boxes[:, 3:4])
    return rows[:, :, None] & columns[:, None, :]
