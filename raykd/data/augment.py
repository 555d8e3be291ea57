"""Augmentation of a uint8 batch, every parameter keyed by (seed, epoch, sample_index).

All roles re-create the same view. A sample's view depends on its own key only, never on the batch it stands in. Order:
crop or resized crop, flip, RandAugment, erasing; then `raykd.data.mixing` mixes two such views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from raykd.config import Augmentation
from raykd.data.decoding import Images
from raykd.data.keys import uniform

Floats: TypeAlias = NDArray[np.float64]
_TRIES = 10


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
        from raykd.data.randaugment import randaugment  # torchvision takes a second to import

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
