"""Two teachers are trained on scikit-learn's digits, then teach a student a twentieth of their size. Minutes on two cores.

raykd run jobs/digits_demo.py
"""

from raykd import Augmentation, Data, Job, Launch, Loss, Student, Teacher, Training

DIGITS = Data(kind="digits", augmentation=Augmentation(crop=1))


def teacher_stage(name: str, width: int) -> Job:
    """Trains one teacher from scratch."""
    return Job(
        name=f"digits-{name}",
        data=DIGITS,
        student=Student(model="digits_cnn", options={"width": width}),
        training=Training(epochs=12, batch_size=64, lr=0.05, scheduler="cosine"),
        launch=Launch(cpus=1.0),
    )


def job() -> Job:
    """The student listens to both teachers' softened answers; the same student alone is trained beside it."""
    return Job(
        name="digits-demo",
        data=DIGITS,
        stages={"wide": teacher_stage("wide", 32), "narrow": teacher_stage("narrow", 24)},
        student=Student(model="digits_cnn", options={"width": 4}),
        teachers={
            "wide": Teacher(model="digits_cnn", options={"width": 32}, weights="stage:wide", cpus=0.5),
            "narrow": Teacher(model="digits_cnn", options={"width": 24}, weights="stage:narrow", cpus=0.5),
        },
        losses={"kd": Loss("kd", temperature=4.0)},
        training=Training(epochs=8, batch_size=64, lr=0.05, scheduler="cosine"),
        baseline=True,
    )
