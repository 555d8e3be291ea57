"""CIFAR-10: one ResNet-32 with three branches over shared layers; their gated ensemble teaches each of them (ONE).

    raykd run jobs/cifar10_one.py --set data.root=path/to/cifar10
    raykd run jobs/cifar10_one.py:short --set data.root=path/to/cifar10      # minutes on two cores

The losses say what the branches are; `--set student.branching.count=4` makes one more. What is exported is the plain ResNet-32,
branch 0; the other branches are beside it in the run folder, each as a plain model of its own.

    raykd run jobs/cifar10_one.py:short --arg method=okddip --set data.root=path/to/cifar10
"""

from raykd import Augmentation, Data, Job, Loss, Student, Training


def job(root: str = "data/cifar10", method: str = "one") -> Job:
    """The full setting: 300 epochs on shards 0-3, measured on shard 4; the test images are touched once.

    `method` may be any of one student with branches: one, cl, okddip, ffl, pcl, walawalkar, mutualnet.
    """
    return Job(
        name=f"cifar10-{method}",
        data=Data(
            kind="parquet",
            root=root,
            train="train-0000[0-3]-of-00005.parquet",
            eval="train-00004-of-00005.parquet",
            test="test_first1000.parquet",
            normalise="cifar10",
            augmentation=Augmentation(crop=4, flip=True),
        ),
        student=Student(model="crd_resnet32"),
        losses={method: Loss(method)},
        training=Training(recipe="online"),
    )


def short(root: str = "data/cifar10", method: str = "one") -> Job:
    """A ResNet-14, two passes over 3,200 images, and the plain model alone."""
    return job(root, method).replace(
        **{
            "name": f"cifar10-{method}-short",
            "student.model": "crd_resnet14",
            "baseline": True,
            "data.limit": 3200,
            "data.eval_limit": 1000,
            "training.epochs": 2,
            "training.scheduler": "cosine",
        }
    )
