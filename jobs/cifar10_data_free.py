"""CIFAR-10 without CIFAR-10: a trained ResNet-20 teaches a ResNet-8 on images that a generator makes.

    raykd run jobs/cifar10_data_free.py:fastdfkd --arg root=path/to/cifar10 --arg weights=path/to/resnet20.th
    raykd run jobs/cifar10_data_free.py:dfad ... --arg teacher=cifar_resnet32      # weights of the same
    raykd run jobs/cifar10_data_free.py:with_data ...     # as many steps on the training images, to compare

No image is read to learn from: `data.test` alone is opened, to measure teacher and student (`--set data.eval=...`: after each
epoch too). On Ray a synthesizer makes images beside the student, one core each; `--set launch.backend=local` does both in one
process. Grids of what the generator makes are in the run folder, `images/`; what the jobs reach is in docs/results.md.
"""

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training
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

    Fifteen steps of the student, on crops and mirror images, for each batch made; that takes five passes through the teacher
    and back. The authors' scripts have 400.
    """
    return _job("fastdfkd", root, weights, teacher).replace(
        **{
            "data.augmentation": Augmentation(crop=4, flip=True),
            "synthesis": Synthesis(options={"width": 32}, capacity=300, pace=15, steps_per_epoch=300),
            "training.epochs": 15,
        }
    )


def dfad(root: str = "data/cifar10", weights: str = "data/resnet20.th", teacher: str = "cifar_resnet20") -> Job:
    """Fang et al. 2019: images on which teacher and student differ; five steps of the student a round, as in the paper."""
    return _job("dfad", root, weights, teacher).replace(
        synthesis=Synthesis(options={"width": 16, "last": "tanh_norm"}, steps_per_epoch=150)
    )


def with_data(root: str = "data/cifar10", weights: str = "data/resnet20.th", teacher: str = "cifar_resnet20") -> Job:
    """What images are worth: as `fastdfkd`, but on shards 0 to 3 of the training set, whose labels are not heard."""
    return _job("kd", root, weights, teacher).replace(
        **{
            "name": "cifar10-with-data",
            "data.train": "train-0000[0-3]-of-00005.parquet",
            "data.augmentation": Augmentation(crop=4, flip=True),
            "losses.kd.temperature": 20.0,
            "ce_weight": 0.0,
            "training.epochs": 15,
            "training.max_steps": 4500,
        }
    )
