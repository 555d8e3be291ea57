"""CIFAR-10: three trained ResNets teach a ResNet-14 together.

    raykd run jobs/cifar10_many_teachers.py --set data.root=path/to/cifar10
    raykd run jobs/cifar10_many_teachers.py:short --set data.root=path/to/cifar10        # minutes on two cores

ResNet-32 and ResNet-20 share an actor, ResNet-56 has one of its own. The student learns from the mean of their probabilities,
and matches ResNet-56's attention maps. If ResNet-56 is lost for good the run stops; if the other actor is, it goes on.
`--arg aggregate=confidence` and others: docs/many-teachers.md.
"""

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training

FILES = {"resnet56": "resnet56-4bfd9763.th", "resnet32": "resnet32-d509ac18.th", "resnet20": "resnet20-12fca82f.th"}


def job(root: str = "data/cifar10", weights: str = "{data.root}/../weights/cifar10", aggregate: str = "mean_probs") -> Job:
    """The full setting: 240 epochs on shards 0-3, measured on shard 4; the test images are touched once."""

    def teacher(name: str, **settings: object) -> Teacher:
        return Teacher(model=f"cifar_{name}", weights=f"{weights}/{FILES[name]}", normalise="imagenet", **settings)  # type: ignore[arg-type]

    return Job(
        name="cifar10-many-teachers",
        data=Data(
            kind="parquet",
            root=root,
            train="train-0000[0-3]-of-00005.parquet",
            eval="train-00004-of-00005.parquet",
            test="test_first1000.parquet",
            normalise="cifar10",
            augmentation=Augmentation(crop=4, flip=True),
        ),
        student=Student(model="cifar_resnet14"),
        teachers={
            "resnet56": teacher("resnet56", weight=2.0),
            "resnet32": teacher("resnet32", actor="small", on_loss="drop"),
            "resnet20": teacher("resnet20", actor="small", on_loss="drop"),
        },
        losses={
            "kd": Loss("kd", temperature=4.0, aggregate=aggregate),
            "at": Loss("at", teachers="resnet56", layers=("stage2", "stage3"), weight=100.0),
        },
        ce_weight=0.1,
        training=Training(recipe="crd", batch_size=128, lr=0.1),
    )


def short(root: str = "data/cifar10", weights: str = "{data.root}/../weights/cifar10", aggregate: str = "mean_probs") -> Job:
    """Two passes over 3,200 images."""
    return job(root, weights, aggregate).replace(
        **{
            "name": "cifar10-many-teachers-short",
            "data.limit": 3200,
            "data.eval_limit": 1000,
            "training.epochs": 2,
            "training.scheduler": "cosine",
        }
    )
