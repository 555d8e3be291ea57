"""A small convolutional student without batch norm, as a user would bring it."""

from torch import nn


class Plain(nn.Module):
    """Three stages, a pooled embedding, a linear classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.stage3 = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(32, num_classes)

    def layer_aliases(self) -> dict[str, str]:
        """raykd's names for these layers."""
        return {"stage1": "stage1", "stage2": "stage2", "stage3": "stage3", "embedding": "classifier:in"}

    def forward(self, images):
        return self.classifier(self.pool(self.stage3(self.stage2(self.stage1(images)))).flatten(1))


def plain(num_classes: int) -> Plain:
    """The factory."""
    return Plain(num_classes)
