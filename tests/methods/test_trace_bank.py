"""Batches for a bank: the Synthesizer does what a row's plain PyTorch loop does, within 1e-10.

A row's `BATCHES` lists settings: `synthesis` and `options`. Its loop

    batches(student, teacher, generator, states, made, *, signals, images_lr, latents_lr, betas, steps, meta, keep, **options)

makes COUNT batches one after the other, with student and teacher of `made_nets.py` in evaluation mode. `states` is the images'
Module's first state_dict; `made` has one dict a batch: `latents` [b d], `labels` [b], `fresh`, the state_dict of a fresh
generator, and `steps`, a list of dicts: `see(images)` as teachers see them, `part(images)` a part of each, `generator` as the
loss gets it, and `draws()`, which makes a generator seeded as that of `targets`. A loop that asks for `normalise` gets what
makes of images what the models get. Returned are lists `images` [b c h w] and `losses` of the batches, and `generator`, its
parameters at the end.
"""

import copy
import inspect
from functools import partial

import made_nets
import pytest
import torch
from method_rows import METHODS, ROWS, load_row
from safetensors.torch import save_file

from raykd.config import Job, Launch, Loss, Student, Synthesis, Teacher, Training
from raykd.data.keys import derive, torch_generator
from raykd.exchange.sources import InlineSource, LocalSource
from raykd.launch.assembly import asks, connect_images, make_committee
from raykd.models.generators import reset
from raykd.parts.views import local_view
from raykd.resolve import resolve
from raykd.roles.network import Facts
from raykd.schemes.data_free import Snapshot, Workshop

SEED, IMAGES_LR, COUNT, SAMPLES = 5, 0.01, 3, 4
FACTS = Facts(12, made_nets.CLASSES, (3, made_nets.SIZE, made_nets.SIZE), ((0.25,), (0.5,)))
CPU = torch.device("cpu")
ALL = [(s, i) for s in sorted(set(METHODS) & set(ROWS)) for i in range(len(getattr(load_row(s), "BATCHES", [])))]
each_setting = pytest.mark.parametrize("slug, number", ALL)


def job_of(slug, setting, folder):
    """A resolved job, and the student and teacher in it as plain nets."""
    student, teacher = made_nets.remembering((4, 5), 1), made_nets.remembering((6, 7), 2)
    teacher.float().double()  # as the file has them
    save_file(teacher.float().state_dict(), folder / "teacher.safetensors")
    common = {"model": "made_nets:net", "dtype": "float64"}
    job = Job(
        name=f"bank-{slug}",
        seed=SEED,
        student=Student(**common, options={"widths": (4, 5)}),
        teachers={"teacher": Teacher(**common, options={"widths": (6, 7)}, weights=str(folder / "teacher.safetensors"))},
        losses={slug: Loss(slug, **setting.get("options", {}))},
        synthesis=Synthesis(**{"mode": "bank", "lr": IMAGES_LR} | setting["synthesis"]),
        training=Training(epochs=1, batch_size=SAMPLES),
        launch=Launch(backend="local"),
    )
    return resolve(job), student, teacher.double()


def workshop(job, kind=InlineSource):
    sources = {"teacher": kind(make_committee(job, ("teacher",), FACTS), asks(job, [], ("teacher",)))}
    return Workshop(job, connect_images(job, FACTS), FACTS, sources, CPU)


def drawn(job, slug, number, generator, reads_parts):
    """A batch of the bank: what is drawn is a function of seed and number, in this order."""
    spec, keyed = job.synthesis, torch_generator(SEED, "synthesis", "bank", number)
    latents = torch.randn(SAMPLES, spec.latent, generator=keyed).double()
    labels = torch.randint(made_nets.CLASSES, (SAMPLES,), generator=keyed)
    steps = []
    for step in range(spec.steps):
        shifts = (
            [int(torch.randint(-spec.jitter, spec.jitter + 1, (), generator=keyed)) for _ in range(2)] if spec.jitter else []
        )
        mirrored = spec.flip and bool(torch.rand((), generator=keyed) < 0.5)
        state = keyed.get_state()
        if reads_parts:
            torch.rand(SAMPLES, 5, generator=keyed, dtype=torch.float64)

        def see(images, shifts=shifts, mirrored=mirrored):
            images = torch.roll(images, shifts[::-1], (2, 3)) if shifts else images
            return normalised(images.flip(3) if mirrored else images)

        def part(images, state=state):
            again = torch.Generator()
            again.set_state(state)
            return normalised(local_view(images, again))

        loss = torch_generator(SEED, "loss", slug, step, 0, number)
        steps.append({"see": see, "part": part, "generator": loss})
    fresh = copy.deepcopy(generator)
    reset(fresh, derive(SEED, "fresh generator", number) % 2**63)
    draws = partial(torch_generator, SEED, "synthesis", "targets", "bank", number, 0)
    return {"latents": latents, "labels": labels, "steps": steps, "fresh": fresh.state_dict(), "draws": draws}


def normalised(images):
    return (images - 0.25) / 0.5


@each_setting
@pytest.mark.parametrize("kind", [InlineSource, pytest.param(LocalSource, marks=pytest.mark.slow)])
def test_batches(slug, number, kind, tmp_path):
    row = load_row(slug)
    setting = row.BATCHES[number]
    job, student, teacher = job_of(slug, setting, tmp_path)
    made = workshop(job, kind)
    module, generator = made.synthesizer.losses[slug].module, copy.deepcopy(made.synthesizer.generator)
    first = copy.deepcopy(module.state_dict()) if module is not None else {}
    snapshot = Snapshot(7, student.state_dict())
    ours = [made.make(i, snapshot) for i in range(COUNT)]
    reads = any("local" in s.views for p in made.synthesizer.plans for s in p.asks("teacher"))
    spec = job.synthesis
    asked_for = {"normalise": normalised} if "normalise" in inspect.signature(row.batches).parameters else {}
    theirs = row.batches(
        student,
        teacher,
        generator.train(),
        first,
        [drawn(job, slug, i, generator, reads) for i in range(COUNT)],
        signals=made_nets.signals,
        **asked_for,
        images_lr=IMAGES_LR,
        latents_lr=spec.latents_lr,
        betas=spec.betas,
        steps=spec.steps,
        meta=spec.meta,
        keep=spec.keep,
        **setting.get("options", {}),
    )
    for batch, images, loss in zip(ours, theirs["images"], theirs["losses"]):
        assert batch.loss == pytest.approx(loss, rel=1e-10)
        expected = (images.clamp(0, 1) * 255).float().round().to(torch.uint8)
        assert (torch.from_numpy(batch.images) != expected).float().mean() < 0.01  # where a value lies between two bytes
        assert (torch.from_numpy(batch.images).int() - expected.int()).abs().max() <= 1
    for name, value in made.synthesizer.generator.named_parameters():
        torch.testing.assert_close(value, theirs["generator"][name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@each_setting
def test_goes_on(slug, number, tmp_path):
    """Two batches, a checkpoint, the third: as three in a row."""
    job, student, _ = job_of(slug, load_row(slug).BATCHES[number], tmp_path)
    snapshot = Snapshot(7, student.state_dict())
    whole, first, second = (workshop(job) for _ in range(3))
    expected = [whole.make(i, snapshot) for i in range(COUNT)]
    for i in range(COUNT - 1):
        first.make(i, snapshot)
    second.synthesizer.load_state(copy.deepcopy(first.synthesizer.state()))
    found = second.make(COUNT - 1, snapshot)
    assert found.loss == expected[-1].loss
    assert (found.images == expected[-1].images).all()
