"""CIFAR-10: a teacher that knows animals and one that knows vehicles make a student of all ten classes, without labels.

    raykd run jobs/cifar10_amalgamation.py --arg root=path/to/cifar10
    raykd run jobs/cifar10_amalgamation.py --arg root=path/to/cifar10 --arg method=ka-customize
    raykd run jobs/cifar10_amalgamation.py:short --arg root=path/to/cifar10       # minutes on two cores

`root` is an argument and not `--set data.root`, because the teachers are trained here too, as stages with data of their own:
their classes only, numbered from 0. A teacher's `label_map` says which of the student's classes these are. The student's
cross-entropy has no weight; labels serve the evaluation alone. `root` holds Parquet shards (`image`, `label`).
"""

import dataclasses

import numpy as np

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training
from raykd.data.sets import open_split
from raykd.data.views import View

CLASSES = {"animals": (2, 3, 4, 5, 6, 7), "vehicles": (0, 1, 8, 9)}
OPTIONS = {"ka-common-feature": {"alpha": 0.5}, "ka-customize": {"temperature": 2.0, "lam": 0.1}}


class Part(View):
    """Images of some classes, numbered anew from 0."""

    def __init__(self, spec: Data, split: str, classes: tuple[int, ...]) -> None:
        base = open_split(dataclasses.replace(spec, kind="parquet", num_classes=10), split)
        labels = np.asarray(base.labels)
        rows = np.flatnonzero(np.isin(labels, classes))
        super().__init__(base, rows, np.searchsorted(classes, labels[rows]).astype(np.int64))
        self.classes = classes

    @property
    def num_classes(self) -> int:
        """Of this part."""
        return len(self.classes)


def animals(spec: Data, split: str) -> Part:
    """The data of one teacher."""
    return Part(spec, split, CLASSES["animals"])


def vehicles(spec: Data, split: str) -> Part:
    """The data of the other."""
    return Part(spec, split, CLASSES["vehicles"])


def cifar10(root: str) -> Data:
    """All ten classes."""
    return Data(
        kind="parquet",
        root=root,
        train="train-0000[0-3]-of-00005.parquet",
        eval="train-00004-of-00005.parquet",
        test="test_first1000.parquet",
        normalise="cifar10",
        augmentation=Augmentation(crop=4, flip=True),
    )


def training(epochs: int) -> Training:
    """Of every stage."""
    return Training(recipe="crd", epochs=epochs, batch_size=128, lr=0.1, scheduler="cosine", warmup_epochs=epochs / 20)


def job(method: str = "ka-common-feature", root: str = "data/cifar10", epochs: int = 100) -> Job:
    """Two ResNet-20s of some classes, trained from scratch, and a ResNet-20 of all."""
    data, network = cifar10(root), {"model": "cifar_resnet20"}
    stages, teachers = {}, {}
    for name, classes in CLASSES.items():
        own = dataclasses.replace(data, kind=f"jobs.cifar10_amalgamation:{name}", num_classes=len(classes))
        stages[name] = Job(name=name, data=own, student=Student(**network), training=training(epochs))
        teachers[name] = Teacher(**network, weights=f"stage:{name}", label_map=classes)
    return Job(
        name=f"cifar10-{method}",
        data=data,
        stages=stages,
        teachers=teachers,
        student=Student(**network),
        losses={"ka": Loss(method, **OPTIONS[method])},
        training=dataclasses.replace(training(epochs), lr=0.05, clip_norm=5.0),
    )


def short(method: str = "ka-common-feature", root: str = "data/cifar10") -> Job:
    """Few images, small networks, two passes: shows that classes of both teachers are learned, not how well they can be."""
    found = job(method, root, 2).replace(name=f"cifar10-{method}-short")
    for path in ("", "stages.animals.", "stages.vehicles."):
        found = found.replace(
            **{
                f"{path}student.model": "cifar_resnet8",
                f"{path}data.limit": 6400,
                f"{path}data.eval_limit": 1000,
                f"{path}training.batch_size": 64,
            }
        )
    return found.replace(**{f"teachers.{name}.model": "cifar_resnet8" for name in CLASSES})
