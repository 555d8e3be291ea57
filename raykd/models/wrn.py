"""Wide ResNets (Zagoruyko & Komodakis 2016, arXiv 1605.07146): pre-activation blocks, BN-ReLU before each convolution.

The blocks add onto a stream that has no activation of its own. `stageN` is that stream after the BN-ReLU that
reads it next (`:pre` is after the BN, before the ReLU); the bare sum is the module `blockN`.
"""

from __future__ import annotations

from torch import Tensor, nn

from raykd.errors import ModelError
from raykd.models.blocks import conv1x1, conv3x3, he_init, pooled


class Block(nn.Module):
    """BN-ReLU-conv twice plus a shortcut: `[b c_in h w]` to `[b c_out h/stride w/stride]`.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(c_out, c_out)
        self.convShortcut = None if c_in == c_out else conv1x1(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class Stage(nn.Module):
    """`depth` blocks, the first with `stride`."""

    def __init__(self, depth: int, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(Block(c_in, c_out, stride), *(Block(c_out, c_out, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`; stages of 16w, 32w, 64w channels at 32, 16, 8 pixels."""

    def __init__(self, blocks: int, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, 16)
        self.block1 = Stage(blocks, 16, 16 * width, 1)
        self.block2 = Stage(blocks, 16 * width, 32 * width, 2)
        self.block3 = Stage(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        he_init(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(pooled(self.relu(self.bn1(x))))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`."""
        active = {"stem": "block1.layer.0.relu1", "stage1": "block2.layer.0.relu1", "stage2": "block3.layer.0.relu1"}
        active["stage3"] = "relu"
        return active | {f"{alias}:pre": f"{path}:in" for alias, path in active.items()} | {"embedding": "fc:in"}


def wrn(depth: int, width: int, num_classes: int, *, in_channels: int = 3) -> WideResNet:
    """WRN-`depth`-`width`; depth = 6n+4."""
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ModelError(f"wrn_{depth}_{width}: expected a depth of 6n+4 (10, 16, 22, 28, 34, 40, ...), got {depth}.")
    return WideResNet((depth - 4) // 6, width, num_classes, in_channels)
