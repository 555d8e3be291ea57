"""CIFAR-10, small enough to be searched on two cores: a trained ResNet-20 teaches a ResNet-8 for six epochs of 4,000 images.

raykd sweep jobs/cifar10_sweep.py tune_spaces/kd_temperature_weight.py --samples 12 --grace 2 --set data.root=path/to/cifar10
"""

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training


def job(root: str = "data/cifar10", weights: str = "") -> Job:
    """Trials are judged on a tenth of the training images, the winner on the test images."""
    return Job(
        name="cifar10-sweep",
        data=Data(
            kind="parquet",
            root=root,
            train="train-00000-of-00005.parquet",
            eval="test_first1000.parquet",
            normalise="cifar10",
            limit=4000,
            augmentation=Augmentation(crop=4, flip=True),
        ),
        student=Student(model="cifar_resnet8"),
        teachers={
            "resnet20": Teacher(
                model="cifar_resnet20",
                weights=weights or "{data.root}/../weights/cifar10/resnet20-12fca82f.th",
                normalise="imagenet",
            )
        },
        losses={"kd": Loss("kd")},
        training=Training(epochs=6, batch_size=50, lr=0.1, scheduler="cosine"),
    )
