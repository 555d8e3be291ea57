"""ShuffleNet V1 (Zhang et al. 2018, arXiv 1707.01083) for 32x32 images as in the CRD comparison: three groups.

1x1 stem at full size, then three stages of 240, 480, 960 channels at 16, 8, 4 pixels. Unlike the paper there is a
ReLU after the depthwise convolution, as in the CIFAR networks the published figures belong to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raykd.models.blocks import ChannelShuffle, conv1x1, depthwise3x3, pooled

STEM = 24
WIDTHS = (240, 480, 960)
DEPTHS = (4, 8, 4)
GROUPS = 3


class Unit(nn.Module):
    """1x1 by groups, shuffle, depthwise 3x3, 1x1 by groups; added to the input, or at stride 2 appended to it."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        groups = 1 if c_in == STEM else GROUPS  # too few channels come from the stem to split them
        added = c_out - c_in if stride == 2 else c_out
        middle = added // 4
        self.stride = stride
        self.conv1 = conv1x1(c_in, middle, groups=groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.relu1 = nn.ReLU()
        self.shuffle = ChannelShuffle(groups)
        self.conv2 = depthwise3x3(middle, stride)
        self.bn2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(middle, added, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(added)
        self.relu3 = nn.ReLU()
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        kept = self.shortcut(x)
        return self.relu3(torch.cat([y, kept], dim=1) if self.stride == 2 else y + kept)


class ShuffleNetV1(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(STEM, WIDTHS[0], DEPTHS[0])
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], DEPTHS[1])
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], DEPTHS[2])
        self.linear = nn.Linear(WIDTHS[2], num_classes)

    @staticmethod
    def _stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
        return nn.Sequential(Unit(c_in, c_out, 2), *(Unit(c_out, c_out, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(pooled(x))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`."""
        found = {"stem": "relu", "stem:pre": "relu:in", "embedding": "linear:in"}
        for k, depth in enumerate(DEPTHS, 1):
            found[f"stage{k}"] = f"layer{k}"
            found[f"stage{k}:pre"] = f"layer{k}.{depth - 1}.relu3:in"
        return found


def shufflenetv1(num_classes: int, *, in_channels: int = 3) -> ShuffleNetV1:
    """ShuffleNet V1 with three groups for 32x32 images."""
    return ShuffleNetV1(num_classes, in_channels)
