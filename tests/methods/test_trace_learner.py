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
from raykd.exchange.pool import PoolSource
from raykd.exchange.sources import InlineSource, LocalSource
from raykd.launch.assembly import asks, make_committee
from raykd.resolve import resolve
from raykd.roles.learner import Learner
from raykd.roles.losses import plans
from raykd.roles.network import Facts

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
    """A resolved job of one loss on the tracing nets, its plans, and the teachers as plain nets of the same weights."""
    torch.manual_seed(11)
    plain, teachers = {}, {}
    for number, (widths, strides, classes) in enumerate(tracing.teacher_specs(setting)):
        name = f"teacher{number}"
        plain[name] = tracing.TinyNet(widths, strides, classes)
        save_file(plain[name].state_dict(), folder / f"{name}.safetensors")
        teachers[name] = Teacher(
            model="learner_nets:teacher",
            options={"widths": widths, "strides": strides},
            dtype="float64",
            weights=str(folder / f"{name}.safetensors"),
            cpus=0.25,
            label_map=setting["label_maps"][number] if "label_maps" in setting else None,
        )
    training = Training(
        epochs=1, batch_size=tracing.BATCH, lr=LR, momentum=0.0, nesterov=False, weight_decay=0.0, scheduler="constant"
    )
    job = Job(
        name=f"trace-{slug}",
        seed=SEED,
        student=Student(
            model="learner_nets:student", options={"strides": setting.get("student_strides", (1, 2, 2))}, dtype="float64"
        ),
        teachers=teachers,
        losses={slug: Loss(slug, weight=WEIGHT, **setting.get("options", {}))},
        ce_weight=CE_WEIGHT,
        training=training,
        launch=Launch(backend="local"),
    )
    job = resolve(job)
    found = [net.double().eval().requires_grad_(False) for net in plain.values()]
    return SimpleNamespace(
        job=job,
        plans=plans(job, {"student": STAGES} | dict.fromkeys(teachers, STAGES)),
        teacher=found if "teachers" in setting else found[0],
        steps_per_epoch=setting.get("steps_per_epoch", tracing.STEPS),
    )


def asked(sources, batch):
    """Signals of every teacher."""
    return {name: found for source in sources.values() for name, found in source.request(batch).result().items()}


def learn(made, sources, slug):
    """(what the learner ends with, what it started with)."""
    steps = uint8_batches()
    learner = Learner(made.job, made.plans, FACTS, tracing.DATASET_LABELS, CPU, steps_per_epoch=made.steps_per_epoch)
    learner.bind(steps[0], asked(sources, steps[0]))
    module = learner.losses[slug].module
    start = SimpleNamespace(
        student=copy.deepcopy(learner.student.state_dict()),
        module=copy.deepcopy(module.state_dict()),
        sampler=getattr(copy.deepcopy(module), "sample_negatives", None),
    )
    for step, batch in enumerate(steps):
        if step % made.steps_per_epoch == 0:
            learner.on_epoch(step // made.steps_per_epoch)
        learner.step(batch, asked(sources, batch), global_count=tracing.BATCH)
    final = {f"student.{name}": value for name, value in learner.student.state_dict().items()}
    return final | {f"module.{name}": value for name, value in module.state_dict().items()}, start


def plainly(made, row, setting, start, slug):
    """The row's own loop from the same start."""
    student = tracing.TinyNet(tracing.STUDENT_WIDTHS, setting.get("student_strides", (1, 2, 2))).double()
    student.load_state_dict(start.student)
    steps = []
    for step, batch in enumerate(uint8_batches()):
        time = {"epoch": step // made.steps_per_epoch, "step": step}
        keyed = {"generator": torch_generator(SEED, "loss", slug, step, 0, 0)}
        steps.append(batch | {"images": batch["images"].double() / 256} | time | keyed | tracing.classes_of(setting))
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


def agree(slug, number, folder, make_sources):
    row = load_row(slug)
    setting = row.TRACES[number]
    made = connected(slug, setting, folder)
    ours, start = learn(made, make_sources(made), slug)
    theirs = plainly(made, row, setting, start, slug)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert all(not torch.equal(ours[f"student.{name}"], value) for name, value in start.student.items())


def inline(made, kind):
    """Every teacher in this process, each a source of its own."""
    return {
        name: kind(make_committee(made.job, (name,), FACTS), asks(made.job, made.plans, (name,))) for name in made.job.teachers
    }


@each_trace
def test_inline(slug, number, tmp_path):
    agree(slug, number, tmp_path, lambda made: inline(made, InlineSource))


@each_trace
def test_pickled(slug, number, tmp_path):
    agree(slug, number, tmp_path, lambda made: inline(made, LocalSource))


IN_EVERY_RUN = ("crd", "knowledge-flow", "mt-wu", "vid")  # memory, a changed forward, a step of its own, connectors


@pytest.mark.ray
@pytest.mark.parametrize(
    "slug",
    [
        pytest.param(slug, marks=[] if slug in IN_EVERY_RUN else [pytest.mark.slow])
        for slug in sorted({slug for slug, _ in TRACES})
    ],
)
def test_pool(slug, tmp_path, ray_cluster):
    from raykd.launch import replicas

    started = []

    def pool(made):
        handles = replicas.start(made.job, FACTS)
        started.append(handles)
        return {name: PoolSource(name, found, asks(made.job, made.plans, (name,))) for name, found in handles.items()}

    try:
        agree(slug, 0, tmp_path, pool)
    finally:
        for handles in started:
            replicas.stop(handles)
