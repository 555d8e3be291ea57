"""MNIST without MNIST: a LeNet-5 that was trained on it teaches one of half its width on images that a generator makes.

    raykd run jobs/mnist_data_free.py:dafl --arg root=path/to/mnist --arg weights=path/to/lenet5_mnist.pth.tar
    raykd run jobs/mnist_data_free.py:dfad ...       # or zskt

No image is read to learn from: `data.test` alone is opened, to measure teacher and student. Minutes on two cores; with
`--set launch.backend=local` in one process. Grids of what the generator makes are in the run folder, `images/`.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from raykd import Data, Job, Loss, Student, Teacher, Training
from raykd.config import Synthesis

LENET5 = "jobs.mnist_data_free:lenet5"  # the folder's parent is where a job file's modules are looked for


class LeNet5(nn.Module):
    """`[b in_channels 32 32]` to `[b num_classes]`: three convolutions 5x5, two linear layers; 61,706 parameters at width 1."""

    def __init__(self, num_classes: int, width: float, in_channels: int) -> None:
        super().__init__()
        c1, c2, c3, hidden = (max(1, round(width * n)) for n in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(in_channels, c1, 5)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        self.conv3 = nn.Conv2d(c2, c3, 5)
        self.fc1 = nn.Linear(c3, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()  # where the stages are tapped
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.pool(self.relu2(self.conv2(x)))
        x = torch.relu(self.conv3(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))

    def layer_aliases(self) -> dict[str, str]:
        """Stages are `[b c1 28 28]` and `[b c2 10 10]`; the third convolution leaves one pixel."""
        return OrderedDict(stage1="relu1", stage2="relu2", embedding="fc2:in")


def lenet5(num_classes: int, *, width: float = 1.0, in_channels: int = 1) -> LeNet5:
    """LeNet-5 with ReLU and max pooling; `width` is a factor of all its layers."""
    return LeNet5(num_classes, width, in_channels)


def _job(name: str, root: str, weights: str) -> Job:
    """What the three have in common."""
    return Job(
        name=f"mnist-{name}",
        data=Data(kind="parquet", root=root, test="test.parquet", in_channels=1, normalise="mnist"),
        student=Student(model=LENET5, options={"width": 0.5}, input_size=(32, 32)),
        teachers={
            "lenet5": Teacher(model=LENET5, weights=weights, input_size=(32, 32), placement="inline"),
        },
        losses={name: Loss(name)},
        training=Training(optimizer="adam", lr=2e-3, weight_decay=0.0, scheduler="cosine", epochs=8, batch_size=128),
    )


def dafl(root: str = "data/mnist", weights: str = "data/lenet5_mnist.pth.tar") -> Job:
    """Chen et al. 2019: images of which the teacher is sure, of all classes alike.

    Four steps of the student for each of the generator, where the paper has one: the generator's cost the most.
    """
    return _job("dafl", root, weights).replace(
        **{
            "synthesis": Synthesis(options={"width": 8, "last": "tanh_norm"}, lr=0.01, student_steps=4, steps_per_epoch=400),
            "training.lr": 4e-3,
        }
    )


def dfad(root: str = "data/mnist", weights: str = "data/lenet5_mnist.pth.tar") -> Job:
    """Fang et al. 2019: images on which teacher and student differ."""
    return _job("dfad", root, weights).replace(
        synthesis=Synthesis(options={"width": 16, "last": "tanh_norm"}, steps_per_epoch=300)
    )


def zskt(root: str = "data/mnist", weights: str = "data/lenet5_mnist.pth.tar") -> Job:
    """Micaelli and Storkey 2019: images on which the student believes other things than the teacher."""
    return _job("zskt", root, weights).replace(
        **{
            "synthesis": Synthesis(options={"width": 16, "last": "norm"}, steps_per_epoch=300),
            "training.clip_norm": 5.0,
        }
    )
