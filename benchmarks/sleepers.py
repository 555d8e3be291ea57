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


class Napper(nn.Module):
    """A student: `[b 3 h w]` to logits `[b 1000]`, noise made once plus a bias, after a sleep of `seconds` in training.

    `weights` more numbers are its parameters and do nothing.
    """

    def __init__(self, num_classes: int, seconds: float, weights: int) -> None:
        super().__init__()
        self.seconds = seconds
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.rest = nn.Parameter(torch.zeros(weights))
        self.register_buffer("answers", torch.randn(BATCH, num_classes), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and images.device.type != "meta":
            time.sleep(self.seconds)
        return self.answers[: len(images)] + self.bias


def napper(num_classes: int, *, seconds: float, weights: int = 0) -> Napper:
    """The factory."""
    return Napper(num_classes, seconds, weights)


def listen_loss(student_logits: Tensor, peers_logits: list[Tensor]) -> Tensor:
    """Takes `[b 1000]` of each neighbour and computes next to nothing with it: a loss would run on the device."""
    return student_logits[:, 0] * sum(logits[:, 0] for logits in peers_logits) / len(peers_logits)


class Noise:
    """Images of noise."""

    num_classes, fingerprint = CLASSES, "noise"
    labels = np.arange(SAMPLES, dtype=np.int64) % CLASSES

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._images = np.random.default_rng(0).integers(0, 256, (SAMPLES, *shape), dtype=np.uint8)

    def __len__(self) -> int:
        return SAMPLES

    def read(self, sample_index: np.ndarray) -> np.ndarray:
        """Images at `sample_index`."""
        return self._images[sample_index]

    def where(self, row: int) -> str:
        """Names a sample."""
        return f"noise {row}"


def noise(spec: Any, split: str) -> Noise:  # noqa: ARG001
    """The factory: of ImageNet's size, or the spec's."""
    return Noise((SHAPE[0], *spec.size) if spec.size else SHAPE)
