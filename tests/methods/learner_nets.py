"""The tracing nets as a user would bring them to raykd: `learner_nets:student`, `learner_nets:teacher`."""

import torch
import tracing
from torch import nn


class Tappable(tracing.TinyNet):
    """TinyNet with its ReLUs as modules, so that taps find them; the same state_dict and the same numbers."""

    def __init__(self, widths, strides, classes, norms=False):
        super().__init__(widths, strides, classes, norms)
        self.relus = nn.ModuleList(nn.ReLU() for _ in widths)
        self.stage3.bias.data.abs_()  # no sample's embedding is zero

    def layer_aliases(self):
        return {f"stage{i + 1}": f"relus.{i}" for i in range(3)} | {"embedding": "classifier:in"}

    def forward(self, images):
        for number, (stage, relu) in enumerate(zip((self.stage1, self.stage2, self.stage3), self.relus)):
            images = stage(images)
            images = relu(self.norms[number](images) if self.norms else images)
        return self.classifier(torch.mean(images, (2, 3)))


def student(num_classes, strides=(1, 2, 2), widths=tracing.STUDENT_WIDTHS):
    assert num_classes == tracing.CLASSES
    return Tappable(widths, strides, num_classes)


def teacher(num_classes, widths=tracing.TEACHER_WIDTHS[0], strides=(1, 2, 2), norms=False):
    return Tappable(widths, strides, num_classes, norms)
