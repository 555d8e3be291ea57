"""RandAugment on a uint8 batch: images are grouped by operation and sign, so each operation runs once a group.

The operations are torchvision's. The magnitude is one number for all, as in the paper; only its sign is drawn.

References:
    Cubuk et al., RandAugment: practical automated data augmentation with a reduced search space. arXiv 1909.13719
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from raykd.data.decoding import Images

BINS = 31
Apply: TypeAlias = Callable[[Tensor, float], Tensor]


class Operation(NamedTuple):
    """One operation of the paper.

    Attributes:
        name: the paper's.
        apply: (uint8 [k c h w], strength) to uint8 [k c h w].
        strength: (level in 0..1, width in pixels) to the unsigned strength.
        signed: whether the strength's sign is drawn.
    """

    name: str
    apply: Apply
    strength: Callable[[float, int], float]
    signed: bool


def _affine(
    images: Tensor, *, degrees: float = 0.0, shift: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    center = [0.0, 0.0] if any(shear) else None
    return F.affine(images, angle=degrees, translate=list(shift), scale=1.0, shear=list(shear), center=center)


def _degrees(slope: float) -> float:
    return float(np.degrees(np.arctan(slope)))


OPERATIONS = (
    Operation("identity", lambda x, _: x, lambda *_: 0.0, False),
    Operation("shear-x", lambda x, s: _affine(x, shear=(_degrees(s), 0.0)), lambda level, _: 0.3 * level, True),
    Operation("shear-y", lambda x, s: _affine(x, shear=(0.0, _degrees(s))), lambda level, _: 0.3 * level, True),
    Operation("translate-x", lambda x, s: _affine(x, shift=(int(s), 0)), lambda level, w: 150 / 331 * w * level, True),
    Operation("translate-y", lambda x, s: _affine(x, shift=(0, int(s))), lambda level, w: 150 / 331 * w * level, True),
    Operation("rotate", lambda x, s: F.rotate(x, s), lambda level, _: 30.0 * level, True),
    Operation("brightness", lambda x, s: F.adjust_brightness(x, 1.0 + s), lambda level, _: 0.9 * level, True),
    Operation("color", lambda x, s: F.adjust_saturation(x, 1.0 + s), lambda level, _: 0.9 * level, True),
    Operation("contrast", lambda x, s: F.adjust_contrast(x, 1.0 + s), lambda level, _: 0.9 * level, True),
    Operation("sharpness", lambda x, s: F.adjust_sharpness(x, 1.0 + s), lambda level, _: 0.9 * level, True),
    Operation("posterize", lambda x, s: F.posterize(x, int(s)), lambda level, _: 8 - round(4 * level), False),
    Operation("solarize", lambda x, s: F.solarize(x, s), lambda level, _: 255.0 * (1 - level), False),
    Operation("autocontrast", lambda x, _: F.autocontrast(x), lambda *_: 0.0, False),
    Operation("equalize", lambda x, _: F.equalize(x), lambda *_: 0.0, False),
)


def randaugment(images: Images, draws: NDArray[np.float64], magnitude: int) -> Images:
    """Applies operations to each image, chosen and signed by its own draws.

    Args:
        images: [b c h w] uint8.
        draws: [b, 2 * operations an image] in [0, 1): operation and sign in turn.
        magnitude: 0..30 of every operation.

    Returns:
        [b c h w] uint8, a new array.
    """
    pixels = torch.from_numpy(images).clone()
    level, width = magnitude / (BINS - 1), images.shape[3]
    for turn in range(draws.shape[1] // 2):
        chosen = (draws[:, 2 * turn] * len(OPERATIONS)).astype(np.int64)
        negative = draws[:, 2 * turn + 1] < 0.5
        for number in np.unique(chosen).tolist():
            operation = OPERATIONS[number]
            for sign in (1.0, -1.0) if operation.signed else (1.0,):
                of_sign = (negative == (sign < 0)) if operation.signed else True
                group = torch.from_numpy(np.flatnonzero((chosen == number) & of_sign))
                if len(group):
                    pixels[group] = operation.apply(pixels[group], sign * operation.strength(level, width))
    return pixels.numpy()
