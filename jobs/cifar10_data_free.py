"""CIFAR-10 without CIFAR-10: a trained ResNet-20 teaches a ResNet-8 on images that a generator makes.

    raykd run jobs/cifar10_data_free.py:fastdfkd --arg root=path/to/cifar10 --arg weights=path/to/resnet20.th
    raykd run jobs/cifar10_data_free.py:dfad ... --arg teacher=cifar_resnet32      # weights of the same

No image is read to learn from: `data.test` alone is opened, to measure teacher and student. The settings are small ones for a
CPU, `--set launch.backend=local` for one process; they were written down, not tuned, and what they reach is in
docs/results.md: little more than chance. The papers train for hours on a GPU. Grids of what the generator makes are in the run
folder, `images/`.
"""

from raykd import Data, Job, Loss, Student, Teacher, Training
from raykd.config import Synthesis


def _job(name: str, root: str, weights: str, teacher: str) -> Job:
    """What both have in common."""
    return Job(
        name=f"cifar10-{name}",
        data=Data(kind="parquet", root=root, test="test_first1000.parquet", num_classes=10, size=(32, 32), normalise="cifar10"),
        student=Student(model="crd_resnet8"),
        # These weights were trained on images normalised as ImageNet's.
        teachers={"resnet": Teacher(model=teacher, weights=weights, normalise="imagenet", placement="inline")},
        losses={name: Loss(name)},
        training=Training(optimizer="sgd", lr=0.1, weight_decay=5e-4, scheduler="cosine", epochs=10, batch_size=128),
    )


def fastdfkd(root: str = "data/cifar10", weights: str = "data/resnet20.th", teacher: str = "cifar_resnet20") -> Job:
    """Fang et al. 2022: a generator that learns where to begin; its images fill a bank, from which the student draws.

    Ten steps of the student for each batch made, which takes five passes through the teacher and back.
    """
    return _job("fastdfkd", root, weights, teacher).replace(
        synthesis=Synthesis(options={"width": 16}, capacity=200, pace=10, steps_per_epoch=150)
    )


def dfad(root: str = "data/cifar10", weights: str = "data/resnet20.th", teacher: str = "cifar_resnet20") -> Job:
    """Fang et al. 2019: images on which teacher and student differ; five steps of the student a round, as in the paper."""
    return _job("dfad", root, weights, teacher).replace(
        synthesis=Synthesis(options={"width": 16, "last": "tanh_norm"}, steps_per_epoch=150)
    )
