"""A net with batch norms, as a user would bring it to raykd, and what images that are made may hear of it."""

import torch
from torch import nn

CLASSES, SIZE = 3, 8


class Normed(nn.Module):
    """Two convolutions, each with batch norm and ReLU, a pooled embedding, a linear classifier."""

    def __init__(self, widths, classes=CLASSES):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, padding=1), nn.BatchNorm2d(widths[0])
        self.conv2, self.bn2 = nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1), nn.BatchNorm2d(widths[1])
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.classifier = nn.Linear(widths[1], classes)

    def layer_aliases(self):
        return {"stage1": "relu1", "stage2": "relu2", "embedding": "classifier:in"}

    def forward(self, images):
        images = self.relu1(self.bn1(self.conv1(images)))
        images = self.relu2(self.bn2(self.conv2(images)))
        return self.classifier(torch.mean(images, (2, 3)))


def net(num_classes, widths=(4, 5)):
    return Normed(widths, num_classes)


def remembering(widths, seed):
    """A net whose batch norms have seen something."""
    torch.manual_seed(seed)
    found = Normed(widths).double()
    for norm in (found.bn1, found.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return found.eval().requires_grad_(False)


def signals(model, images):
    """Logits, what enters each batch norm, and the means and variances that these keep."""
    entering = [model.conv1(images)]
    first = torch.relu(model.bn1(entering[0]))
    entering.append(model.conv2(first))
    logits = model.classifier(torch.relu(model.bn2(entering[1])).mean((2, 3)))
    norms = [model.bn1, model.bn2]
    kept = {"means": [n.running_mean for n in norms], "variances": [n.running_var for n in norms]}
    return {"logits": logits, "entering": entering, **kept}
