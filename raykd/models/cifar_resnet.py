"""CIFAR ResNets of He et al. 2015 (arXiv 1512.03385, section 4.2) with parameter-free shortcuts (option A).

Parameter names are those of the weights in wide circulation (conv1, bn1, layer1..3.{i}.conv1, ..., linear).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ModelError
from raykd.models.blocks import conv3x3, he_init, pooled


class PaddedShortcut(nn.Module):
    """Identity across a change of shape: every `stride`-th pixel, zero channels added equally before and after."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, then ReLU: `[b c_in h w]` to `[b c_out h/stride w/stride]`."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(c_out, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else PaddedShortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`; three stages of 16, 32, 64 channels at 32, 16, 8 pixels."""

    def __init__(self, blocks: int, widths: Sequence[int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = self._stage(widths[0], widths[1], 1)
        self.layer2 = self._stage(widths[1], widths[2], 2)
        self.layer3 = self._stage(widths[2], widths[3], 2)
        self.linear = nn.Linear(widths[3], num_classes)
        he_init(self, linear=True)

    def _stage(self, c_in: int, c_out: int, stride: int) -> nn.Sequential:
        first = Block(c_in, c_out, stride)
        return nn.Sequential(first, *(Block(c_out, c_out, 1) for _ in range(self.blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(pooled(x))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`."""
        found = {"stem": "relu", "stem:pre": "relu:in", "embedding": "linear:in"}
        for k in (1, 2, 3):
            found[f"stage{k}"] = f"layer{k}"
            found[f"stage{k}:pre"] = f"layer{k}.{self.blocks - 1}.relu2:in"
        return found


def cifar_resnet(
    depth: int, num_classes: int, *, in_channels: int = 3, widths: Sequence[int] = (16, 16, 32, 64)
) -> CifarResNet:
    """ResNet of `depth` = 6n+2 layers: n blocks a stage; `widths` are the channels of stem and stages."""
    if depth < 8 or (depth - 2) % 6:
        raise ModelError(f"cifar_resnet{depth}: expected a depth of 6n+2 (8, 14, 20, ...), got {depth}. Choose one.")
    if len(widths) != 4 or list(widths) != sorted(widths) or widths[0] < 1:
        raise ModelError(f"cifar_resnet{depth}: expected four widths that do not fall, got {widths!r}. Or use crd_resnet.")
    return CifarResNet((depth - 2) // 6, widths, num_classes, in_channels)
