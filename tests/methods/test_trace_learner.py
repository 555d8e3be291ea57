"""The Learner, fed by a teacher over every kind of source, does what a row's plain PyTorch loop does, within 1e-10.

raykd gets uint8 images and normalises them by a factor that is a power of two; the plain loop gets the same numbers in float64.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import tracing
from method_rows import METHODS, ROWS, load_row
from safetensors.torch import save_file

from raykd.config import Job, Launch, Loss, Student, Teacher, Training
from raykd.data.keys import torch_generator
from raykd.exchange.codec import parse
from raykd.exchange.pool import PoolSource
from raykd.exchange.sources import InlineSource, LocalSource
from raykd.launch.assembly import wanted
from raykd.resolve import resolve
from raykd.roles.learner import Learner
from raykd.roles.losses import plans
from raykd.roles.network import Facts
from raykd.roles.teacher import Teacher as TeacherRole

SEED, LR, WEIGHT, CE_WEIGHT = 5, 0.05, 0.5, 0.75
FACTS = Facts(tracing.SAMPLES, tracing.CLASSES, (3, tracing.SIZE, tracing.SIZE), ((0.0,), (256 / 255,)))  # pixel / 256
STAGES = ["stage1", "stage2", "stage3"]
CPU = torch.device("cpu")
TRACES = [(s, i) for s in sorted(set(METHODS) & set(ROWS)) for i in range(len(getattr(load_row(s), "TRACES", [])))]
each_trace = pytest.mark.parametrize("slug, number", TRACES)


def uint8_batches():
    """STEPS batches with every sample once."""
    rng = torch.Generator().manual_seed(2)
    order = torch.randperm(tracing.SAMPLES, generator=rng)
    found = []
    for step in range(tracing.STEPS):
        index = order[step * tracing.BATCH : (step + 1) * tracing.BATCH]
        images = torch.randint(256, (tracing.BATCH, 3, tracing.SIZE, tracing.SIZE), generator=rng, dtype=torch.uint8)
        found.append({"images": images, "labels": tracing.DATASET_LABELS[index], "sample_index": index})
    return found


def connected(slug, setting, folder):
    """A resolved job of one loss on the tracing nets, its plans, and the teacher as a plain net of the same weights."""
    torch.manual_seed(11)
    options = {"strides": setting.get("teacher_strides", (1, 2, 2))}
    plain = tracing.TinyNet((6, 7, 8), options["strides"])
    save_file(plain.state_dict(), folder / "teacher.safetensors")
    training = Training(
        epochs=1, batch_size=tracing.BATCH, lr=LR, momentum=0.0, nesterov=False, weight_decay=0.0, scheduler="constant"
    )
    job = Job(
        name=f"trace-{slug}",
        seed=SEED,
        student=Student(
            model="learner_nets:student", options={"strides": setting.get("student_strides", (1, 2, 2))}, dtype="float64"
        ),
        teachers={
            "big": Teacher(
                model="learner_nets:teacher",
                options=options,
                dtype="float64",
                weights=str(folder / "teacher.safetensors"),
                cpus=0.5,
            )
        },
        losses={slug: Loss(slug, weight=WEIGHT, **setting.get("options", {}))},
        ce_weight=CE_WEIGHT,
        training=training,
        launch=Launch(backend="local"),
    )
    job = resolve(job)
    return SimpleNamespace(
        job=job, plans=plans(job, {"student": STAGES, "big": STAGES}), teacher=plain.double().eval().requires_grad_(False)
    )


def learn(made, source, slug):
    """(what the learner ends with, what it started with)."""
    steps = uint8_batches()
    learner = Learner(made.job, made.plans, FACTS, tracing.DATASET_LABELS, CPU, steps_per_epoch=tracing.STEPS)
    learner.bind(steps[0], {"big": source.request(steps[0]).result()})
    module = learner.losses[slug].module
    start = SimpleNamespace(
        student=copy.deepcopy(learner.student.state_dict()),
        module=copy.deepcopy(module.state_dict()),
        sampler=getattr(copy.deepcopy(module), "sample_negatives", None),
    )
    for batch in steps:
        learner.step(batch, {"big": source.request(batch).result()}, global_count=tracing.BATCH)
    final = {f"student.{name}": value for name, value in learner.student.state_dict().items()}
    return final | {f"module.{name}": value for name, value in module.state_dict().items()}, start


def plainly(made, row, setting, start, slug):
    """The row's own loop from the same start."""
    student = tracing.TinyNet((4, 5, 6), setting.get("student_strides", (1, 2, 2))).double()
    student.load_state_dict(start.student)
    steps = [
        batch | {"images": batch["images"].double() / 256, "generator": torch_generator(SEED, "loss", slug, step, 0, 0)}
        for step, batch in enumerate(uint8_batches())
    ]
    return row.trace(
        student,
        made.teacher,
        start.module,
        steps,
        signals=tracing.signals,
        sampler=start.sampler,
        lr=LR,
        weight=WEIGHT,
        ce_weight=CE_WEIGHT,
        **setting.get("options", {}),
    )


def agree(slug, number, folder, make_source):
    row = load_row(slug)
    setting = row.TRACES[number]
    made = connected(slug, setting, folder)
    ours, start = learn(made, make_source(made), slug)
    theirs = plainly(made, row, setting, start, slug)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert all(not torch.equal(ours[f"student.{name}"], value) for name, value in start.student.items())


def teacher_role(made):
    return TeacherRole(made.job.teachers["big"], wanted(made.plans, "big"), FACTS, parse("dense"), CPU)


@each_trace
def test_inline(slug, number, tmp_path):
    agree(slug, number, tmp_path, lambda made: InlineSource(teacher_role(made)))


@each_trace
def test_pickled(slug, number, tmp_path):
    agree(slug, number, tmp_path, lambda made: LocalSource(teacher_role(made)))


@pytest.mark.ray
@pytest.mark.parametrize("slug", sorted({slug for slug, _ in TRACES}))
def test_pool(slug, tmp_path, ray_cluster):
    from raykd.launch import replicas

    started = []

    def pool(made):
        handles = replicas.start(made.job, made.plans, FACTS)
        started.append(handles)
        return PoolSource("big", handles["big"])

    try:
        agree(slug, 0, tmp_path, pool)
    finally:
        for handles in started:
            replicas.stop(handles)
