"""Small networks for the embedded 8x8 digits and for tests."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from raykd.errors import ModelError
from raykd.models.blocks import conv3x3, he_init, pooled


class Mlp(nn.Module):
    """`[b in_channels size size]` (or anything of as many elements) to `[b num_classes]`; a stage a hidden layer."""

    def __init__(self, in_features: int, hidden: Sequence[int], num_classes: int) -> None:
        super().__init__()
        sizes = [in_features, *hidden]
        parts = (OrderedDict(linear=nn.Linear(a, b), relu=nn.ReLU()) for a, b in itertools.pairwise(sizes))
        self.hidden = nn.Sequential(*(nn.Sequential(part) for part in parts))
        self.linear = nn.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.hidden(x.flatten(1)))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`. Stages are `[b hidden]`; there is no stem."""
        found = {"embedding": "linear:in"}
        for k in range(len(self.hidden)):
            found[f"stage{k + 1}"] = f"hidden.{k}"
            found[f"stage{k + 1}:pre"] = f"hidden.{k}.relu:in"
        return found


class DigitsCnn(nn.Module):
    """`[b in_channels h w]` to `[b num_classes]`; stages of w, 2w, 4w channels at 8, 4, 2 pixels for 8x8 digits."""

    def __init__(self, num_classes: int, width: int, in_channels: int) -> None:
        super().__init__()
        self.stem = self._unit(in_channels, width, 1)
        self.layer1 = self._unit(width, width, 1)
        self.layer2 = self._unit(width, 2 * width, 2)
        self.layer3 = self._unit(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        he_init(self)

    @staticmethod
    def _unit(c_in: int, c_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            OrderedDict(conv=conv3x3(c_in, c_out, stride), bn=nn.BatchNorm2d(c_out), relu=nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.linear(pooled(x))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`."""
        paths = {"stem": "stem", "stage1": "layer1", "stage2": "layer2", "stage3": "layer3"}
        return paths | {f"{alias}:pre": f"{path}.relu:in" for alias, path in paths.items()} | {"embedding": "linear:in"}


def mlp(num_classes: int, *, hidden: Sequence[int] = (256, 256), in_channels: int = 3, image_size: int = 32) -> Mlp:
    """Perceptron with ReLU over flattened images of `in_channels` x `image_size` x `image_size`."""
    sizes = [hidden] if isinstance(hidden, int) else list(hidden)
    if not sizes or min(sizes) < 1:
        raise ModelError(f"mlp: expected hidden as a list of positive layer sizes, got {hidden!r}. Give at least one.")
    return Mlp(in_channels * image_size**2, sizes, num_classes)


def digits_cnn(num_classes: int, *, width: int = 16, in_channels: int = 1) -> DigitsCnn:
    """Four 3x3 convolutions for 8x8 one-channel digits; `width` channels in the first stage."""
    return DigitsCnn(num_classes, width, in_channels)
