"""ShuffleNet V2 at 1x (Ma et al. 2018, arXiv 1807.11164) for 32x32 images as in the CRD comparison.

1x1 stem at full size, three stages of 116, 232, 464 channels at 16, 8, 4 pixels, a 1x1 convolution to 1024.
Stages are shuffled concatenations of activated halves (post-activation); no `:pre`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raykd.models.blocks import ChannelShuffle, conv1x1, depthwise3x3, pooled

STEM = 24
WIDTHS = (116, 232, 464)
REPEATS = (3, 7, 3)
LAST = 1024


class Basic(nn.Module):
    """Half of the channels passes, the other goes through 1x1, depthwise 3x3, 1x1. `[b c h w]` to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = depthwise3x3(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, y = x.chunk(2, dim=1)
        y = self.relu1(self.bn1(self.conv1(y)))
        y = self.bn2(self.conv2(y))
        y = self.relu3(self.bn3(self.conv3(y)))
        return self.shuffle(torch.cat([kept, y], dim=1))


class Down(nn.Module):
    """Two branches of stride 2 side by side: `[b c_in h w]` to `[b c_out h/2 w/2]`."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        half = c_out // 2
        self.conv1 = depthwise3x3(c_in, 2)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv2 = conv1x1(c_in, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(c_in, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = depthwise3x3(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.relu3(self.bn3(self.conv3(x)))
        right = self.relu5(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return self.shuffle(torch.cat([left, right], dim=1))


class ShuffleNetV2(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu1 = nn.ReLU()
        self.layer1 = self._stage(STEM, WIDTHS[0], REPEATS[0])
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], REPEATS[1])
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], REPEATS[2])
        self.conv2 = conv1x1(WIDTHS[2], LAST)
        self.bn2 = nn.BatchNorm2d(LAST)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(LAST, num_classes)

    @staticmethod
    def _stage(c_in: int, c_out: int, repeats: int) -> nn.Sequential:
        return nn.Sequential(Down(c_in, c_out), *(Basic(c_out) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(pooled(self.relu2(self.bn2(self.conv2(x)))))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`."""
        stages = {f"stage{k}": f"layer{k}" for k in (1, 2, 3)}
        return {"stem": "relu1", "stem:pre": "relu1:in", **stages, "embedding": "linear:in"}


def shufflenetv2(num_classes: int, *, in_channels: int = 3) -> ShuffleNetV2:
    """ShuffleNet V2 1x for 32x32 images."""
    return ShuffleNetV2(num_classes, in_channels)
