"""VGG with batch norm for 32x32 images as in the CRD comparison (Simonyan & Zisserman 2015; Tian et al. 2020).

Five blocks; 2x2 max pooling after the first three, global average pooling after the last, so stages are at
32, 16, 8, 4, 4 pixels (64x64 images are pooled once more). One linear layer.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from raykd.models.blocks import pooled

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def _block(count: int, c_in: int, c_out: int) -> nn.Sequential:
    """`count` times conv-BN-ReLU without the last ReLU: `[b c_in h w]` to `[b c_out h w]`."""
    parts: list[nn.Module] = []
    for i in range(count):
        parts += [nn.Conv2d(c_in if i == 0 else c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class Vgg(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`."""

    def __init__(self, counts: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        for k, (count, c_in, c_out) in enumerate(zip(counts, (in_channels, *WIDTHS), WIDTHS)):
            self.add_module(f"block{k}", _block(count, c_in, c_out))
            self.add_module(f"relu{k}", nn.ReLU())
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        large = x.shape[-1] >= 64
        for k in range(len(WIDTHS)):
            x = self.get_submodule(f"relu{k}")(self.get_submodule(f"block{k}")(x))
            if k < 3 or (k == 3 and large):
                x = F.max_pool2d(x, 2)
        return self.classifier(pooled(x))

    def layer_aliases(self) -> dict[str, str]:
        """Alias to address; see `raykd.models.addresses`. The stem is the first convolution with its BN."""
        found = {"stem": "block0.1", "embedding": "classifier:in"}
        for k in range(len(WIDTHS)):
            found[f"stage{k + 1}"] = f"relu{k}"
            found[f"stage{k + 1}:pre"] = f"relu{k}:in"
        return found


def vgg(depth: int, num_classes: int, *, in_channels: int = 3) -> Vgg:
    """VGG-8, 11, 13, 16 or 19."""
    return Vgg(CONVOLUTIONS[depth], num_classes, in_channels)
