"""Simulated devices: models that sleep instead of computing, and a data set of noise, both as a user would bring them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SHAPE = (3, 224, 224)
SAMPLES = 256
BATCH = 32
CLASSES, WIDTH, PIXELS = 1000, 2048, 7  # of a ResNet-50 on ImageNet


class Sleeper(nn.Module):
    """A ResNet-50's outputs after a sleep of `seconds`: `[b 3 h w]` to logits `[b 1000]`, noise made once."""

    def __init__(self, num_classes: int, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.stage4, self.pool = nn.Identity(), nn.Identity()
        self.register_buffer("maps", torch.randn(BATCH, WIDTH, PIXELS, PIXELS), persistent=False)
        self.register_buffer("embeddings", torch.randn(BATCH, WIDTH), persistent=False)
        self.register_buffer("answers", torch.randn(BATCH, num_classes), persistent=False)

    def layer_aliases(self) -> dict[str, str]:
        """raykd's names for its layers."""
        return {"stage4": "stage4", "embedding": "pool"}

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type != "meta":
            time.sleep(self.seconds)
        self.stage4(self.maps[: len(images)])
        self.pool(self.embeddings[: len(images)])
        return self.answers[: len(images)]


def sleeper(num_classes: int, *, seconds: float) -> Sleeper:
    """The factory."""
    return Sleeper(num_classes, seconds)


class Noise:
    """ImageNet-sized images of noise."""

    num_classes, shape, fingerprint = CLASSES, SHAPE, "noise"
    labels = np.arange(SAMPLES, dtype=np.int64) % CLASSES

    def __init__(self) -> None:
        self._images = np.random.default_rng(0).integers(0, 256, (SAMPLES, *SHAPE), dtype=np.uint8)

    def __len__(self) -> int:
        return SAMPLES

    def read(self, sample_index: np.ndarray) -> np.ndarray:
        """Images at `sample_index`."""
        return self._images[sample_index]

    def where(self, row: int) -> str:
        """Names a sample."""
        return f"noise {row}"


def noise(spec: Any, split: str) -> Noise:  # noqa: ARG001
    """The factory."""
    return Noise()
