"""CIFAR-10 from five images of each class: blocks of a ResNet-20 learn in the place of a trained ResNet-56's.

    raykd run jobs/cifar10_grafting.py --arg root=path/to/cifar10 --arg weights=path/to/resnet56.th --seeds 3
    raykd run jobs/cifar10_grafting.py:narrow ...      # half the channels, with adapters between the networks

The 50 images have no labels for the grafted student; the student alone (`baseline`) learns from the same 50 with theirs. Half
of the steps graft single blocks, half the growing chain. What it reaches is in docs/results.md.
"""

from raykd import Augmentation, Data, Job, Loss, Student, Teacher, Training


def job(root: str = "data/cifar10", weights: str = "data/resnet56.th", per_class: int = 5) -> Job:
    """Shen et al. 2021: each block alone in the teacher, then chains of two, three and all of them."""
    return Job(
        name="cifar10-grafting",
        data=Data(
            kind="parquet",
            root=root,
            train="train-*.parquet",
            eval="test_first1000.parquet",
            normalise="cifar10",
            per_class=per_class,
            augmentation=Augmentation(crop=4, flip=True),
        ),
        student=Student(model="cifar_resnet20"),
        # These weights were trained on images normalised as ImageNet's.
        teachers={"resnet56": Teacher(model="cifar_resnet56", weights=weights, normalise="imagenet", placement="inline")},
        losses={"network-grafting": Loss("network-grafting")},
        training=Training(
            optimizer="adam", lr=1e-3, weight_decay=0.0, scheduler="constant", epochs=700, batch_size=50, eval_every=100
        ),
        baseline=True,
    )


def narrow(root: str = "data/cifar10", weights: str = "data/resnet56.th", per_class: int = 5) -> Job:
    """A student of half the teacher's channels, whose convolutions alone read what a stage says: adapters go into them."""
    student = Student(model="crd_resnet20", options={"widths": (8, 8, 16, 32)})
    return job(root, weights, per_class).replace(name="cifar10-grafting-narrow", student=student)
