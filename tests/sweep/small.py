"""Small sweeps on scikit-learn's digits: a teacher that has been trained, a student a twentieth of its size."""

from __future__ import annotations

from pathlib import Path

from raykd import Augmentation, Data, Job, Launch, Loss, Student, Teacher, Training
from raykd.launch.run import run

DIGITS = Data(kind="digits", per_class=100, augmentation=Augmentation(crop=1))
HOLDOUT = 0.2  # of 1000 images: 800 are learnt from, 25 batches of 32


def train_teacher(folder: Path) -> Path:
    """Trains a teacher in this process; returns its weights."""
    job = Job(
        name="teacher",
        data=DIGITS,
        student=Student(model="digits_cnn", options={"width": 16}),
        training=Training(epochs=6, batch_size=32, lr=0.05, scheduler="cosine"),
        launch=Launch(backend="local"),
    )
    run(job, folder=folder)
    return folder / "student.safetensors"


def digits(weights: Path, runs: Path, **settings) -> Job:
    """A job that learns most of the digits in a few epochs."""
    job = Job(
        name="small",
        data=DIGITS,
        student=Student(model="digits_cnn", options={"width": 8}),
        teachers={"wide": Teacher(model="digits_cnn", options={"width": 16}, weights=str(weights), cpus=0.5)},
        losses={"kd": Loss("kd")},
        training=Training(epochs=4, batch_size=32, lr=0.1, scheduler="cosine"),
        launch=Launch(host="actors", cpus=0.5, start_timeout_s=120.0),
        runs=str(runs),
    )
    return job.replace(**settings)
