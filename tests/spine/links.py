"""Chains of small networks on digits; `python -m tests.spine.links KIND FOLDER` runs one in a process of its own."""

import sys
from pathlib import Path

from raykd import Data, Job, Launch, Loss, Student, Teacher, Training
from raykd.models.small import DigitsCnn
from tests.spine.small import go

DIGITS = Data(kind="digits", limit=960, eval_limit=200)
TRAINING = Training(epochs=4, batch_size=32, lr=0.05, scheduler="cosine")
LOCAL = Launch(backend="local")


def large(num_classes: int, in_channels: int = 1) -> DigitsCnn:
    """The first assistant."""
    return DigitsCnn(num_classes, 8, in_channels)


def middle(num_classes: int, in_channels: int = 1) -> DigitsCnn:
    """The second."""
    return DigitsCnn(num_classes, 6, in_channels)


ASSISTANTS = ("tests.spine.links:large", "tests.spine.links:middle")


def chain(kind: str, **settings) -> Job:
    """A teacher trained from scratch, two assistants, a student; nothing of it names a file of weights."""
    job = Job(
        name=kind,
        seed=1,
        data=DIGITS,
        stages={"big": Job(name="big", data=DIGITS, training=TRAINING, launch=LOCAL, student=digits(12))},
        teachers={"big": Teacher(model="digits_cnn", options={"width": 12}, weights="stage:big")},
        student=digits(4),
        losses={kind: Loss(kind, assistants=ASSISTANTS, temperature=2.0)},
        training=TRAINING,
        launch=LOCAL,
    )
    return job.replace(**settings)


def digits(width: int) -> Student:
    """A small network of its own width."""
    return Student(model="digits_cnn", options={"width": width})


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    go(chain(kind), Path(folder))
