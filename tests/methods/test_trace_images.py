"""Without data: the Synthesizer and the Learner in turn do what a row's plain PyTorch loop does, within 1e-10.

A row's `ROUNDS` lists settings as `TRACES` does (tracing.py), with `synthesis`: settings of the job's. Its loop

    rounds(student, teacher, generator, states, made, *, signals, normalise, lr, images_lr, weight, ce_weight, **options)

trains student and generator in place. `states` is (the student's Module's, the images' Module's) first state_dict, each empty
where there is none; `made` has one dict a round: `images`, a batch for each step of the generator, and `student`, one for each
step of the student. A batch has `latents` [b d], `labels` [b], `sample_index` [b], `epoch`, `step`, `generator`, fresh and
seeded as the one the loss gets, and `draws()`, which makes one seeded as that of `targets`. Where a method has `critics`, it
has `real_images` [b c h w] and `real_labels`, one of the student only with a share that is read, and one of the student
`rows`: the made images that stand behind the real ones. The generator is called with latents and labels, in training mode,
under torch.optim.Adam of rate `images_lr` and the decays of `synthesis`; the student under plain SGD of rate `lr`.
`signals(model, images)` takes images as they are made; where a setting has `norms`, those of a teacher have "norms" too: for
each batch norm (mean and biased variance of the batch, running mean, running variance). `normalise(images)`, given to a loop
that asks for it, is what the models get. Returned are state_dicts: `student`, `generator`, and of Modules `module` and
`images`.
"""

import copy
import inspect
from functools import partial

import numpy as np
import pytest
import torch
import tracing
from method_rows import METHODS, ROWS, load_method, load_row
from test_trace_learner import CE_WEIGHT, FACTS, LR, SEED, STAGES, WEIGHT, asked, connected, inline, learner_of

from raykd.data.batches import Plan as Order
from raykd.data.keys import permutation, torch_generator
from raykd.data.packaged import ArraySource
from raykd.data.sets import StoredSet
from raykd.exchange.sources import InlineSource, LocalSource
from raykd.roles.losses import image_plans
from raykd.schemes.data_free import Made

IMAGES_LR, COUNT = 0.01, 3
ALL = [(s, i) for s in sorted(set(METHODS) & set(ROWS)) for i in range(len(getattr(load_row(s), "ROUNDS", [])))]
each_setting = pytest.mark.parametrize("slug, number", ALL)


def normalise(images):
    """As FACTS has it."""
    return images * (255 / 256)


def state_of(module):
    """Tensors alone: what a critic's optimizer remembers is seen in the steps that follow."""
    state = copy.deepcopy(module.state_dict()) if module is not None else {}
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def pixels():
    """The training images, uint8."""
    rng = torch.Generator().manual_seed(7)
    return torch.randint(256, (tracing.SAMPLES, 3, tracing.SIZE, tracing.SIZE), generator=rng, dtype=torch.uint8)


def read(purpose, number, count):
    """Part of a pass over the training images; the next passes are in other orders."""
    rows = []
    for place in range(number * count, (number + 1) * count):
        turn, place = divmod(place, tracing.SAMPLES)
        rows.append(int(permutation(SEED, turn, tracing.SAMPLES, f"beside {purpose}")[place]))
    return {"real_images": pixels()[rows].double() / 255, "real_labels": tracing.DATASET_LABELS[rows]}


def compares(slug):
    """Whether a method's critics see training images."""
    return hasattr(load_method(slug), "critics")


def found(made, slug):
    """All that learns or remembers, by what a row calls it."""
    images = made.synthesizer.losses[slug].module
    parts = {"student": made.learner.student, "generator": made.synthesizer.generator}
    parts |= {"module": made.learner.losses[slug].module, "images": images}
    return {name: state_of(part) for name, part in parts.items() if part is not None}


def really(job, learner, setting, slug, sources):
    """(what the rounds end with, what they began with: states and generator)"""
    spec = job.synthesis
    total = COUNT * spec.student_steps
    order = Order(total * tracing.BATCH, tracing.BATCH, SEED, drop_last=True)
    norms = {name: [f"norms.{i}" for i in range(3)] for name in job.teachers} if setting.get("norms") else None
    images = image_plans(job, {"student": STAGES} | dict.fromkeys(job.teachers, STAGES), norms=norms)
    labels = tracing.DATASET_LABELS.numpy().astype(np.int64)
    train = StoredSet(ArraySource(pixels().numpy(), labels, "traced"), num_classes=tracing.CLASSES, cache="none")
    made = Made(job, images, FACTS, learner, sources, order, train if compares(slug) else None)
    first = made.first()
    learner.bind(first, asked(sources, first))
    before = copy.deepcopy(found(made, slug)), copy.deepcopy(made.synthesizer.generator)
    for batch in made.epoch(0):
        learner.step(batch, asked(sources, batch), tracing.BATCH)
    assert learner.step_count == total
    assert made.synthesizer.rounds == COUNT
    return found(made, slug), *before


def drawn(job, slug, turn):
    """The batches of a round: what is drawn is a function of seed, purpose and number."""
    spec = job.synthesis

    def batch(purpose, number, step):
        own = ("round", turn) if spec.noise == "round" else (purpose, number)
        keyed = torch_generator(SEED, "synthesis", *own, 0)
        latents = torch.randn(tracing.BATCH, spec.latent, generator=keyed).double()
        labels = torch.randint(tracing.CLASSES, (tracing.BATCH,), generator=keyed)
        place = turn if spec.noise == "round" else number
        found = {"latents": latents, "labels": labels, "sample_index": torch.arange(tracing.BATCH) + place * tracing.BATCH}
        keyed = torch_generator(SEED, "loss", slug, step, 0, 0)
        draws = partial(torch_generator, SEED, "synthesis", "targets", purpose, number, 0)
        found |= {"epoch": 0, "step": step, "generator": keyed, "draws": draws}
        if not compares(slug):
            return found
        if purpose == "generator":
            return found | read(purpose, number, tracing.BATCH)
        count = round(spec.real * tracing.BATCH)
        rows = torch.randperm(tracing.BATCH, generator=torch_generator(SEED, "real", number, 0))[: tracing.BATCH - count]
        return found | {"rows": rows} | (read(purpose, number, count) if count else {})

    making = range(turn * spec.generator_steps, (turn + 1) * spec.generator_steps)
    learning = range(turn * spec.student_steps, (turn + 1) * spec.student_steps)
    return {"images": [batch("generator", i, i) for i in making], "student": [batch("student", i, i) for i in learning]}


@each_setting
@pytest.mark.parametrize("kind", [InlineSource, pytest.param(LocalSource, marks=pytest.mark.slow)])
def test_rounds(slug, number, kind, tmp_path):
    row = load_row(slug)
    setting = row.ROUNDS[number]
    setting = setting | {"synthesis": setting["synthesis"] | {"lr": IMAGES_LR}}
    case = connected(slug, setting, tmp_path)
    job = case.job
    case.steps_per_epoch = COUNT * job.synthesis.student_steps
    learner = learner_of(case.parts["student"], case)
    ours, start, generator = really(job, learner, setting, slug, inline(case, kind))
    student = tracing.learner_net(setting).double()
    student.load_state_dict(start["student"])
    asked_for = {"normalise": normalise} if "normalise" in inspect.signature(row.rounds).parameters else {}
    theirs = row.rounds(
        student,
        case.teacher,
        generator.train(),
        (start.get("module", {}), start.get("images", {})),
        [drawn(job, slug, turn) for turn in range(COUNT)],
        signals=lambda model, images: tracing.signals(model, normalise(images)),
        **asked_for,
        lr=LR,
        images_lr=IMAGES_LR,
        weight=WEIGHT,
        ce_weight=CE_WEIGHT,
        **setting.get("options", {}),
    )
    assert ours.keys() == theirs.keys()
    for part, state in theirs.items():
        assert ours[part].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(
                ours[part][name], value, rtol=1e-10, atol=1e-10, msg=lambda m, where=f"{part}.{name}": f"{where}: {m}"
            )
            assert not torch.equal(ours[part][name], start[part][name]) or name in setting.get("still", ()), f"{part}.{name}"


def test_every_method_that_makes_images_is_traced():
    banks = {slug for slug in ROWS if hasattr(load_row(slug), "BATCHES")}  # test_trace_bank.py
    assert {slug for slug, _ in ALL} | banks == {slug for slug in METHODS if load_method(slug).SCHEME == "data_free"}
