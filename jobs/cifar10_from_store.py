"""CIFAR-10: what a ResNet-56 says of four epochs' views is kept once; then any number of trainings learn from the files.

    raykd store build jobs/cifar10_from_store.py --epochs 4 --set data.root=path/to/cifar10
    raykd run         jobs/cifar10_from_store.py            --set data.root=path/to/cifar10
    raykd run         jobs/cifar10_from_store.py            --set data.root=path/to/cifar10 --set losses.kd.temperature=2

A short setting of it, a minute or two on two cores: the same commands with jobs/cifar10_from_store.py:short and --epochs 2

`data.root` holds Parquet shards (`image`, `label`); the teacher's weights are looked for in `<root>/../weights/cifar10`, or
name them: --set teachers.resnet56.weights=resnet56.th
"""

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training


def job(root: str = "data/cifar10", weights: str = "", store: str = "stores/cifar10") -> Job:
    """The full setting: 240 epochs on shards 0-3 that see the kept views again and again; the test images are touched once."""
    return Job(
        name="cifar10-from-store",
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
                placement="store",
                store=store,
            )
        },
        losses={"kd": Loss("kd", temperature=4.0)},
        training=Training(recipe="crd", batch_size=128, lr=0.1),
    )


def short(root: str = "data/cifar10", weights: str = "", store: str = "stores/cifar10-short") -> Job:
    """Four epochs over two kept views of 3,200 images: enough to see it at work, in a minute or two on two cores."""
    return job(root, weights, store).replace(
        **{
            "name": "cifar10-from-store-short",
            "data.limit": 3200,
            "data.eval_limit": 1000,
            "training.epochs": 4,
            "training.scheduler": "cosine",
        }
    )
