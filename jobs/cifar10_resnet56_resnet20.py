"""CIFAR-10: a trained ResNet-56 on two replicas teaches a ResNet-20.

    raykd run jobs/cifar10_resnet56_resnet20.py --set data.root=path/to/cifar10

A short setting of it, some minutes on two cores:

    raykd run jobs/cifar10_resnet56_resnet20.py:short --set data.root=path/to/cifar10

`data.root` holds Parquet shards (`image`, `label`); the teacher's weights are looked for in `<root>/../weights/cifar10`, or
name them: --set teachers.resnet56.weights=resnet56.th
"""

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training


def job(root: str = "data/cifar10", weights: str = "") -> Job:
    """The full setting: 240 epochs on shards 0-3, measured on shard 4; the test images are touched once."""
    return Job(
        name="cifar10-resnet56-resnet20",
        data=Data(
            kind="parquet",
            root=root,
            train="train-0000[0-3]-of-00005.parquet",
            eval="train-00004-of-00005.parquet",
            test="test_first1000.parquet",
            normalise="cifar10",
            augmentation=Augmentation(crop=4, flip=True),
        ),
        student=Student(model="cifar_resnet20"),
        teachers={
            "resnet56": Teacher(
                model="cifar_resnet56",
                weights=weights or "{data.root}/../weights/cifar10/resnet56-4bfd9763.th",
                normalise="imagenet",
                replicas=2,
            )
        },
        losses={"kd": Loss("kd", temperature=4.0)},
        training=Training(recipe="crd", batch_size=128, lr=0.1),
    )


def short(root: str = "data/cifar10", weights: str = "") -> Job:
    """Two passes over 6,400 images: enough to see the teacher at work, in minutes on two cores."""
    return job(root, weights).replace(
        **{
            "name": "cifar10-short",
            "data.limit": 6400,
            "data.eval_limit": 2000,
            "training.epochs": 2,
            "training.scheduler": "cosine",
        }
    )
