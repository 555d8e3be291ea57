"""A learner on a tiny net, a real teacher beside it, batches of random pixels."""

import dataclasses

import torch

from raykd.config import Job, Launch, Student, Teacher, Training
from raykd.exchange.sources import InlineSource
from raykd.launch.assembly import asks
from raykd.resolve import resolve
from raykd.roles.learner import Learner
from raykd.roles.losses import plans
from raykd.roles.network import Facts
from raykd.roles.teacher import Committee
from raykd.roles.teacher import Teacher as TeacherRole

SAMPLES, CLASSES, BATCH, SIDE = 24, 7, 8, 12
FACTS = Facts(SAMPLES, CLASSES, (3, SIDE, SIDE), "cifar10")
LABELS = torch.arange(SAMPLES) % CLASSES
STAGES = ["stage1", "stage2", "stage3"]
CPU = torch.device("cpu")
TRAINING = {"epochs": 2, "batch_size": BATCH, "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "scheduler": "constant"}


def batch(step=0, count=BATCH):
    """`images` uint8, `labels`, `sample_index` of one step."""
    rng = torch.Generator().manual_seed(step)
    index = (torch.arange(count) + step * count) % SAMPLES
    images = torch.randint(256, (count, 3, SIDE, SIDE), generator=rng, dtype=torch.uint8)
    views = torch.zeros(count, dtype=torch.int32)
    return {"images": images, "labels": LABELS[index], "sample_index": index, "augmentation_seed": views}


TINY = "tests.roles.nets:tiny"
BIG = Teacher(model=TINY, options={"widths": (6, 7, 8)})


def job(
    losses=None,
    *,
    ce_weight=1.0,
    training=None,
    student=None,
    dtype="float64",
    model=TINY,
    seed=3,
    names=("big",),
    teacher=BIG,
):
    """A resolved job: one tiny student, one wider teacher, or several of them."""
    return resolve(
        Job(
            seed=seed,
            student=Student(model=model, options=student or {}, dtype=dtype),
            teachers={name: dataclasses.replace(teacher, dtype=dtype) for name in names},
            losses=losses or {},
            ce_weight=ce_weight,
            training=Training(**TRAINING | (training or {})),
            launch=Launch(backend="local"),
        )
    )


def source(made, bound=None):
    """The teachers of a job in this process, always with the same weights."""
    names = tuple(made.teachers)
    bound = bound if bound is not None else plans(made, dict.fromkeys(("student", *names), STAGES))
    torch.manual_seed(17)
    teachers = {name: TeacherRole(spec, FACTS, CPU, name) for name, spec in made.teachers.items()}
    return InlineSource(Committee(teachers, made.seed), asks(made, bound, names))


def learner(made, rank=0, labels=LABELS):
    """(a bound learner, its teachers' source)."""
    bound = plans(made, dict.fromkeys(("student", *made.teachers), STAGES))
    taught = source(made, bound)
    found = Learner(made, bound, FACTS, labels, CPU, steps_per_epoch=3, rank=rank)
    found.bind(batch(), taught.request(batch()).result())
    return found, taught


def step(one, taught, given=None, count=None):
    """One step on one batch."""
    given = given if given is not None else batch(one.step_count)
    return one.step(given, taught.request(given).result(), count or len(given["labels"]))


def weights(one):
    """A copy of the student's parameters, flat."""
    return torch.cat([p.detach().reshape(-1).clone() for p in one.student.parameters()])
