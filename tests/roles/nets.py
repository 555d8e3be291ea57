"""Tiny networks for the roles' tests, as a user would bring them: `tests.roles.nets:tiny`."""

from torch import nn
from torch.nn import functional as F


class Tiny(nn.Module):
    """Three stages, a pooled embedding, a linear classifier; batch norm where asked for."""

    def __init__(self, num_classes, widths=(4, 5, 6), in_channels=3, norm=False, dropout=0.0):
        super().__init__()

        def stage(c_in, c_out, stride):
            layers = [
                nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1),
                *([nn.BatchNorm2d(c_out)] if norm else []),
                nn.ReLU(),
            ]
            return nn.Sequential(*layers)

        self.stage1 = stage(in_channels, widths[0], 1)
        self.stage2 = stage(widths[0], widths[1], 2)
        self.stage3 = stage(widths[1], widths[2], 2)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(widths[2], num_classes)

    def layer_aliases(self):
        return {"stage1": "stage1", "stage2": "stage2", "stage3": "stage3", "embedding": "classifier:in"}

    def forward(self, images):
        return self.classifier(self.dropout(self.stage3(self.stage2(self.stage1(images)))).mean((2, 3)))


class Silent(Tiny):
    """Its stages and its classifier never fire: the forward takes their parameters and goes around the modules."""

    def forward(self, images):
        for stage, stride in ((self.stage1, 1), (self.stage2, 2), (self.stage3, 2)):
            images = F.relu(F.conv2d(images, stage[0].weight, stage[0].bias, stride=stride, padding=1))
        return F.linear(images.mean((2, 3)), self.classifier.weight, self.classifier.bias)


def tiny(num_classes, **options):
    return Tiny(num_classes, **options)


def silent(num_classes, **options):
    return Silent(num_classes, **options)
