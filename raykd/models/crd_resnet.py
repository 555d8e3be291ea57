"""CIFAR ResNets of the CRD comparison (Tian et al. 2020, arXiv 1910.10699, appendix): 1x1 convolutions as shortcuts.

`crd_resnet<depth>` has 16, 16, 32, 64 channels (stem and stages), `crd_resnet<depth>x4` 32, 64, 128, 256;
`crd_resnet50` is the ImageNet ResNet-50 with a 3x3 stem of stride 1 and no pooling before the first stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raykd.errors import ModelError
from raykd.models.blocks import conv1x1, conv3x3, he_init, pooled


def _projection(c_in: int, c_out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(conv1x1(c_in, c_out, stride), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, projected shortcut, ReLU: `[b c_in h w]` to `[b c_out h/stride w/stride]`."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(c_out, c_out)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.downsample = _projection(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + (x if self.downsample is None else self.downsample(x)))


class CrdResNet(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`; three stages at 32, 16, 8 pixels."""

    def __init__(self, blocks: int, channels: tuple[int, int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.conv1 = conv3x3(in_channels, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.layer1 = self._stage(channels[0], channels[1], 1)
        self.layer2 = self._stage(channels[1], channels[2], 2)
        self.layer3 = self._stage(channels[2], channels[3], 2)
        self.fc = nn.Linear(channels[3], num_classes)
        he_init(self)

    def _stage(self, c_in: int, c_out: int, stride: int) -> nn.Sequential:
        first = BasicBlock(c_in, c_out, stride)
        return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(self.blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(pooled(x))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`."""
        found = {"stem": "relu", "stem:pre": "relu:in", "embedding": "fc:in"}
        for k in (1, 2, 3):
            found[f"stage{k}"] = f"layer{k}"
            found[f"stage{k}:pre"] = f"layer{k}.{self.blocks - 1}.relu2:in"
        return found


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with four times the width at the end: `[b c_in h w]` to `[b 4*width h/s w/s]`."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(c_in, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = conv1x1(width, 4 * width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu3 = nn.ReLU()
        self.shortcut = _projection(c_in, 4 * width, stride) or nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu3(y + self.shortcut(x))


class CrdResNet50(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`; four stages of 256..2048 channels at 32, 16, 8, 4 pixels."""

    DEPTHS = (3, 4, 6, 3)

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(64, 64, 1, self.DEPTHS[0])
        self.layer2 = self._stage(256, 128, 2, self.DEPTHS[1])
        self.layer3 = self._stage(512, 256, 2, self.DEPTHS[2])
        self.layer4 = self._stage(1024, 512, 2, self.DEPTHS[3])
        self.linear = nn.Linear(2048, num_classes)
        he_init(self)

    @staticmethod
    def _stage(c_in: int, width: int, stride: int, depth: int) -> nn.Sequential:
        first = Bottleneck(c_in, width, stride)
        return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(pooled(x))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`."""
        found = {"stem": "relu", "stem:pre": "relu:in", "embedding": "linear:in"}
        for k, depth in enumerate(self.DEPTHS, 1):
            found[f"stage{k}"] = f"layer{k}"
            found[f"stage{k}:pre"] = f"layer{k}.{depth - 1}.relu3:in"
        return found


def crd_resnet(
    depth: int, num_classes: int, *, wide: bool = False, in_channels: int = 3, widths: Sequence[int] | None = None
) -> CrdResNet:
    """ResNet of `depth` = 6n+2 layers; `wide` is the x4 variant; `widths` are other channels of stem and stages."""
    if depth < 8 or (depth - 2) % 6:
        raise ModelError(f"crd_resnet{depth}: expected a depth of 6n+2 (8, 14, 20, ...), got {depth}. Choose one.")
    channels = tuple(widths) if widths is not None else (32, 64, 128, 256) if wide else (16, 16, 32, 64)
    if len(channels) != 4 or min(channels) < 1:
        raise ModelError(f"crd_resnet{depth}: expected widths of stem and three stages, got {widths!r}. Give four numbers.")
    return CrdResNet((depth - 2) // 6, (channels[0], channels[1], channels[2], channels[3]), num_classes, in_channels)


def crd_resnet50(num_classes: int, *, in_channels: int = 3) -> CrdResNet50:
    """ResNet-50 for 32x32 images."""
    return CrdResNet50(num_classes, in_channels)
