"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) for 32x32 images as in the CRD comparison: width 0.5.

Stem of stride 2, expansion 6 in every block (the first, too, has its expanding convolution), ReLU instead of
ReLU6, 1280 features. A block ends in a linear bottleneck: stages have no activation, so there is no `:pre`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raykd.models.blocks import conv1x1, conv3x3, depthwise3x3, pooled

# expansion, channels at width 1, blocks, stride of the first block
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STAGE_ENDS = (1, 2, 4, 6)  # the last group at 16, 8, 4 and 2 pixels


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project: `[b c_in h w]` to `[b c_out h/stride w/stride]`."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = c_in * expansion
        self.conv = nn.Sequential(
            conv1x1(c_in, width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            depthwise3x3(width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv1x1(width, c_out),
            nn.BatchNorm2d(c_out),
        )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`; four stages at 16, 8, 4, 2 pixels."""

    def __init__(self, num_classes: int, width: float, in_channels: int) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(conv3x3(in_channels, channels, 2), nn.BatchNorm2d(channels), nn.ReLU())
        groups = []
        for expansion, base, count, stride in GROUPS:
            out = int(base * width)
            first = InvertedResidual(channels, out, stride, expansion)
            groups.append(nn.Sequential(first, *(InvertedResidual(out, out, 1, expansion) for _ in range(count - 1))))
            channels = out
        self.blocks = nn.ModuleList(groups)
        last = max(1280, int(1280 * width))
        self.conv2 = nn.Sequential(conv1x1(channels, last), nn.BatchNorm2d(last), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        self._init()

    @torch.no_grad()
    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for group in self.blocks:
            x = group(x)
        return self.classifier(pooled(self.conv2(x)))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`."""
        found = {f"stage{k}": f"blocks.{end}" for k, end in enumerate(STAGE_ENDS, 1)}
        return {"stem": "conv1", "stem:pre": "conv1.2:in", **found, "embedding": "classifier.0:in"}


def mobilenetv2(num_classes: int, *, width: float = 0.5, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2 for 32x32 images; `width` multiplies the channels of stem and blocks."""
    return MobileNetV2(num_classes, width, in_channels)
