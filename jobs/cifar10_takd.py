"""CIFAR-10: a trained ResNet-56 teaches a ResNet-32, that one a ResNet-20, that one a ResNet-8 (TAKD).

With DGKD every link listens to all that are larger.

    raykd run jobs/cifar10_takd.py --set data.root=path/to/cifar10
    raykd run jobs/cifar10_takd.py --arg method=dgkd --set data.root=path/to/cifar10
    raykd run jobs/cifar10_takd.py:short --set data.root=path/to/cifar10          # minutes on two cores

The stages come from the assistants that the loss names; finished ones are not run again. `data.root` holds Parquet shards
(`image`, `label`); the teacher's weights are looked for in `<root>/../weights/cifar10`.
"""

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training


def job(method: str = "takd", root: str = "data/cifar10", weights: str = "") -> Job:
    """Every link has the budget of the paper: 160 epochs, batches of 128."""
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
        student=Student(model="cifar_resnet8"),
        teachers={
            "resnet56": Teacher(
                model="cifar_resnet56",
                weights=weights or "{data.root}/../weights/cifar10/resnet56-4bfd9763.th",
                normalise="imagenet",
            )
        },
        losses={method: Loss(method, assistants=("cifar_resnet32", "cifar_resnet20"), temperature=5.0)},
        training=Training(recipe="crd", epochs=160, batch_size=128, lr=0.1, milestones=(80, 120), weight_decay=1e-4),
        baseline=True,
    )


def short(method: str = "takd", root: str = "data/cifar10", weights: str = "") -> Job:
    """Two passes over 5,120 images a link, smaller assistants: shows the chain at work, not what it is worth."""
    return job(method, root, weights).replace(
        **{
            "name": f"cifar10-{method}-short",
            f"losses.{method}.assistants": ("cifar_resnet20", "cifar_resnet14"),
            "data.limit": 5120,
            "data.eval_limit": 1000,
            "training.epochs": 2,
            "training.batch_size": 64,
            "training.lr": 0.02,
            "training.milestones": None,
            "training.scheduler": "cosine",
        }
    )
