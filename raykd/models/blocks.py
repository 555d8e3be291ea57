"""Pieces several families share. Images are `[b c h w]`, flat features `[b d]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(c_in, c_out, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(c_in, c_out, kernel_size=1, stride=stride, groups=groups, bias=False)


def depthwise3x3(channels: int, stride: int) -> nn.Conv2d:
    """A 3x3 convolution of each channel on its own, without bias."""
    return nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, groups=channels, bias=False)


def pooled(x: Tensor) -> Tensor:
    """Global average pool: `[b c h w]` to `[b c]`."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ChannelShuffle(nn.Module):
    """Interleaves the channels of `groups` groups: channel (g, i) goes to place (i, g). `[b c h w]` to the same."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


@torch.no_grad()
def he_init(model: nn.Module, *, linear: bool = False) -> None:
    """He et al. 2015: convolutions normal with variance 2 / fan_out; batch norms start as the identity.

    `linear=True` also draws linear weights normal with variance 2 / fan_in. Uses the global generator.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif linear and isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
