"""From pixels to what one model was trained on: its mean, standard deviation and image size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from raykd.errors import ConfigError, DataError, near

# Mean and standard deviation of each channel over the training images, pixels in 0..1. "imagenet" is what torchvision and
# timm weights expect, "half" what many vision transformers do; "digits" was measured on raykd's own split.
PRESETS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
    "digits": ((0.3054,), (0.3757,)),
    "half": ((0.5,), (0.5,)),
}


@dataclass(frozen=True)
class Normalise:
    """(pixels - mean) / std in one model's size, on the device the images are on; pixels: uint8 / 255, or floats as they are.

    Attributes:
        mean: of each channel, or one for all channels; pixels in 0..1.
        std: likewise.
        size: (h, w) or one side of a square; None keeps the images' own. Bilinear with antialias.
    """

    mean: Sequence[float]
    std: Sequence[float]
    size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ConfigError(f"normalise: expected as many positive std as means, got {self.mean} and {self.std}.")

    @classmethod
    def preset(cls, name: str, size: int | tuple[int, int] | None = None) -> Normalise:
        """The numbers of a data set by name. Raises ConfigError at an unknown one."""
        if name not in PRESETS:
            raise ConfigError(f"normalise: expected a known preset, got '{name}'. {near(name, PRESETS)}")
        return cls(*PRESETS[name], size)

    def __call__(
        self, images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b c y x"]:
        """Normalised images, computed in float32 (of float64 images in float64) and then cast to `dtype`.

        Args:
            images: uint8, 0..255; or floats, 0 black and 1 white (others are not cut off), through which gradients flow.
            dtype: of the result.

        Raises:
            DataError: the images are of another type or shape, or have another number of channels.
        """
        if not (images.dtype == torch.uint8 or images.is_floating_point()) or images.ndim != 4:
            raise DataError(f"images: expected uint8 or floats [b c h w], got {images.dtype} {list(images.shape)}.")
        if len(self.mean) not in (1, images.shape[1]):
            raise DataError(
                f"images: expected {len(self.mean)} channels as the means have, got {images.shape[1]}. "
                "Set in_channels of the data or the model's mean and std."
            )
        own = torch.float32 if images.dtype == torch.uint8 else torch.promote_types(images.dtype, torch.float32)
        pixels = self._resized(images.to(own))
        mean, std = (torch.tensor(v, dtype=own).view(-1, 1, 1) for v in (self.mean, self.std))
        white = 255 if images.dtype == torch.uint8 else 1
        scale, offset = (v.to(pixels.device) for v in (1 / (white * std), -mean / std))
        if images.dtype == torch.uint8:
            return pixels.mul_(scale).add_(offset).to(dtype)
        return (pixels * scale + offset).to(dtype)

    def _resized(self, pixels: Tensor) -> Tensor:
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        if size is None or tuple(pixels.shape[2:]) == tuple(size):
            return pixels
        return torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
