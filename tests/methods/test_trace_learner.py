"""The Learner, fed by a teacher over every kind of source or by peers, does what a row's plain PyTorch loop does, within 1e-10.

raykd gets uint8 images and normalises them by a factor that is a power of two; the plain loop gets the same numbers in float64.
"""

import copy
import pickle
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import tracing
from method_rows import METHODS, ROWS, load_method, load_row
from safetensors.torch import save_file
from torch import nn

from raykd.config import Branching, Job, Launch, Loss, Peer, Student, Synthesis, Teacher, Training
from raykd.data.batches import VIEW
from raykd.data.keys import torch_generator
from raykd.exchange import codec
from raykd.exchange.pool import PoolSource
from raykd.exchange.sources import InlineSource, LocalSource
from raykd.launch import peering
from raykd.launch.assembly import asks, branches, make_committee
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


def uint8_batches(setting):
    """STEPS batches with every sample once."""
    rng = torch.Generator().manual_seed(2)
    order = torch.randperm(tracing.SAMPLES, generator=rng)
    found = []
    for step in range(tracing.STEPS):
        index = order[step * tracing.BATCH : (step + 1) * tracing.BATCH]
        shape = (tracing.BATCH, 3, tracing.SIZE, tracing.SIZE)
        images, *others = (torch.randint(256, shape, generator=rng, dtype=torch.uint8) for _ in range(tracing.views(setting)))
        batch = {"images": images, "labels": tracing.DATASET_LABELS[index], "sample_index": index}
        found.append(batch | {f"{VIEW}{number}": image for number, image in enumerate(others, 1)})
    return found


def connected(slug, setting, folder):
    """A resolved job of one loss on the tracing nets, what each learner does in it, and the teachers as plain nets."""
    torch.manual_seed(11)
    plain, teachers = {}, {}
    heard = tracing.hears(load_method(slug)) in ("teacher", "teachers")
    for number, (widths, strides, classes, norms) in enumerate(tracing.teacher_specs(setting) if heard else []):
        name = f"teacher{number}"
        plain[name] = tracing.TinyNet(widths, strides, classes, norms)
        save_file(plain[name].state_dict(), folder / f"{name}.safetensors")
        teachers[name] = Teacher(
            model="learner_nets:teacher",
            options={"widths": widths, "strides": strides, "norms": norms},
            dtype="float64",
            weights=str(folder / f"{name}.safetensors"),
            cpus=0.25,
            label_map=setting["label_maps"][number] if "label_maps" in setting else None,
        )
    training = Training(
        epochs=1,
        batch_size=tracing.BATCH,
        lr=LR,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        scheduler="constant",
        ema=setting.get("ema"),
    )
    job = Job(
        name=f"trace-{slug}",
        seed=SEED,
        student=network(Student, setting),
        peers={f"peer{number}": network(Peer, setting, number) for number in range(setting.get("peers", 0))},
        teachers=teachers,
        losses={slug: Loss(slug, weight=WEIGHT, **setting.get("options", {}))},
        ce_weight=CE_WEIGHT,
        synthesis=Synthesis(**setting.get("synthesis", {})),
        training=training,
        launch=Launch(backend="local"),
    )
    job = resolve(job)
    found = [net.double().eval().requires_grad_(False) for net in plain.values()]
    return SimpleNamespace(
        job=job,
        parts=peering.parts(job, FACTS) if job.peers else {"student": alone(job)},
        teacher=found if "teachers" in setting else next(iter(found), None),
        steps_per_epoch=setting.get("steps_per_epoch", tracing.STEPS),
    )


def network(kind, setting, number=0):
    """A tracing net that learns, as a job names it."""
    options = {"strides": setting.get("student_strides", (1, 2, 2)), "widths": tracing.PEER_WIDTHS[number]}
    branching = Branching(**{"kind": "none"} | setting.get("branching", {}))
    return kind(model="learner_nets:student", options=options, dtype="float64", branching=branching)


def alone(job):
    """What a learner without peers does."""
    stages = {"student": STAGES} | dict.fromkeys(job.teachers, STAGES)
    found = plans(job, stages, branches=branches(job.student, FACTS))
    return peering.Part(job, found, (), (), ())


def asked(sources, batch):
    """Signals of every teacher."""
    return {name: found for source in sources.values() for name, found in source.request(batch).result().items()}


def learner_of(part, made):
    """A learner whose batch norms keep their statistics: a tracing net's do."""
    found = Learner(part.job, part.plans, FACTS, tracing.DATASET_LABELS, CPU, made.steps_per_epoch, published=part.published)
    for module in (module for module in found.student.modules() if isinstance(module, nn.BatchNorm2d)):
        module.eval().train = lambda mode=True: None
    return found


def together(exchanges, parts, carry):
    """Runs the learners up to their exchange, one after the other, and then to their end."""
    said = {name: carry(published) for name, exchange in exchanges.items() if (published := next(exchange, None)) is not None}
    for name in said:
        with suppress(StopIteration):
            exchanges[name].send({other: said[other] for other in parts[name].listens})
            raise AssertionError(f"{name}: a second exchange")


def inline_message(published):
    return {key: value.detach() for key, value in published.items()}


def pickled_message(published):
    return codec.decode(pickle.loads(pickle.dumps(codec.encode(published, codec.Codec("dense")))).signals)


def modules_of(learner, made, slug):
    """Place among the results -> Module."""
    several, found = len(learner.losses) > 1, {}
    for loss in learner.losses.values():
        if loss.module is not None:
            number = list(made.job.peers).index(loss.plan.teachers[0]) if several else None
            found["module." if number is None else f"module.{number}."] = loss.module
    return found


def pupil(learner, made, slug, number):
    """The learner as a row's results name it."""
    lessons = [tracing.Lesson(module, place=place) for place, module in modules_of(learner, made, slug).items()]
    return tracing.Pupil(learner.student, lessons, f"{number}." if made.job.peers else "")


def learn(made, sources, slug, setting, carry):
    """(what the learners end with, what they started with)."""
    steps = uint8_batches(setting)
    learners = {name: learner_of(part, made) for name, part in made.parts.items()}
    answers = asked(sources, steps[0])
    together({name: learner.probing(steps[0], answers) for name, learner in learners.items()}, made.parts, carry)
    pupils = [pupil(learner, made, slug, number) for number, learner in enumerate(learners.values())]
    module = next(iter(learners.values())).losses[slug].module if sources else None
    start = SimpleNamespace(
        students=copy.deepcopy([learner.student.state_dict() for learner in learners.values()]),
        states=tracing.states(pupils),
        parameters={name: value.detach().clone() for one in pupils for name, value in one.named().items()},
        sampler=getattr(copy.deepcopy(module), "sample_negatives", None),
    )
    for step, batch in enumerate(steps):
        if step % made.steps_per_epoch == 0:
            for learner in learners.values():
                learner.on_epoch(step // made.steps_per_epoch)
        answers = asked(sources, batch)
        stepping = {name: learner.stepping(batch, answers, tracing.BATCH) for name, learner in learners.items()}
        together(stepping, made.parts, carry)
        assert all(learner.step_count == step + 1 for learner in learners.values())
    return {name: value for one in pupils for name, value in one.final().items()}, start


def plainly(made, row, setting, start, slug):
    """The row's own loop from the same start."""
    students = [tracing.learner_net(setting, number).double() for number in range(len(start.students))]
    for student, state in zip(students, start.students):
        student.load_state_dict(state)
    steps = []
    for step, batch in enumerate(uint8_batches(setting)):
        time = {"epoch": step // made.steps_per_epoch, "step": step}
        keyed = {"generator": torch_generator(SEED, "loss", slug, step, 0, 0)}
        images = [batch.pop(name).double() / 256 for name in list(batch) if name == "images" or name.startswith(VIEW)]
        seen = {"images": images[0]} | ({"views": images} if len(images) > 1 else {})
        steps.append(batch | seen | time | keyed | tracing.classes_of(setting))
    return row.trace(
        *tracing.arguments(load_method(slug), setting, students, made.teacher, start.states, steps),
        signals=tracing.signals,
        sampler=start.sampler,
        lr=LR,
        weight=WEIGHT,
        ce_weight=CE_WEIGHT,
        **setting.get("options", {}),
    )


def agree(slug, number, folder, make_sources, carry=inline_message):
    row = load_row(slug)
    setting = row.TRACES[number]
    made = connected(slug, setting, folder)
    ours, start = learn(made, make_sources(made), slug, setting, carry)
    theirs = plainly(made, row, setting, start, slug)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    assert all(not torch.equal(ours[name], value) for name, value in start.parameters.items() if "student." in name)


def inline(made, kind):
    """Every teacher in this process, each a source of its own."""
    parts = next(iter(made.parts.values()))
    return {
        name: kind(make_committee(made.job, (name,), FACTS), asks(made.job, parts.plans, (name,))) for name in made.job.teachers
    }


@each_trace
def test_inline(slug, number, tmp_path):
    agree(slug, number, tmp_path, lambda made: inline(made, InlineSource))


@each_trace
def test_pickled(slug, number, tmp_path):
    agree(slug, number, tmp_path, lambda made: inline(made, LocalSource), pickled_message)


IN_EVERY_RUN = ("crd", "knowledge-flow")  # memory, a changed forward


@pytest.mark.ray
@pytest.mark.parametrize(
    "slug",
    [
        pytest.param(slug, marks=[] if slug in IN_EVERY_RUN else [pytest.mark.slow])
        for slug in sorted({slug for slug, _ in TRACES if load_method(slug).SCHEME == "offline"})
    ],
)
def test_pool(slug, tmp_path, ray_cluster):
    from raykd.launch import replicas

    started = []

    def pool(made):
        handles = replicas.start(made.job, FACTS)
        started.append(handles)
        return {
            name: PoolSource(name, found, asks(made.job, made.parts["student"].plans, (name,)))
            for name, found in handles.items()
        }

    try:
        agree(slug, 0, tmp_path, pool)
    finally:
        for handles in started:
            replicas.stop(handles)
