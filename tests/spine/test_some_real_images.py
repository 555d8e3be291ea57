"""A few real images beside made ones: what each batch holds, what pseudo examples begin as and become, what a run says."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from raykd.config import Loss, Synthesis
from raykd.data.keys import derive
from raykd.data.splits import open_data
from raykd.launch import settings as checked
from raykd.launch.assembly import facts
from raykd.launch.checks import inspect
from raykd.models.generators import Pixels
from raykd.resolve import resolve
from raykd.roles.network import Tapped, build
from raykd.roles.recorder import read
from raykd.schemes.data_free import NO_LABEL, Made
from raykd.signals import Signal
from tests.spine.small import assert_equal_states, final_state, go, trace
from tests.spine.test_data_free import small, stopped_and_resumed

STEPS, BATCH, KEPT, EACH = 8, 16, 4, 2  # KEPT: of each batch, what is read with real=0.25


def few(root, **settings):
    """The teacher of MNIST, two images of each class to learn from: four rounds of two steps."""
    spec = Synthesis(student_steps=2, steps_per_epoch=STEPS // 2, show=8, real=KEPT / BATCH)
    job = small(root).replace(losses={"kimura": Loss("kimura")}, synthesis=spec)
    return job.replace(**{"data.train": "train.parquet", "data.per_class": EACH} | settings)


@pytest.fixture
def seen(monkeypatch):
    """Each batch of the probe and of the steps after it, with the pseudo examples, where there are any, as they are then."""
    found, honest = [], Made._batch

    def noted(self, step):
        batch = honest(self, step)
        generator = self.synthesizer.generator
        free = {"free": generator.units(generator.pixels.detach().clone())} if isinstance(generator, Pixels) else {}
        found.append(dict(batch) | free)
        return batch

    monkeypatch.setattr(Made, "_batch", noted)
    return found


def rows_of(images, known):
    """For each image, the rows of `known` that it equals within a rounding."""
    apart = (images.flatten(1).double()[:, None] - known.flatten(1).double()[None]).abs().amax(2)
    return [row.nonzero().flatten().tolist() for row in apart < 1e-5]


def test_a_batch_is_some_read_and_some_made(real_data, tmp_path, seen):
    job = few(real_data, **{"synthesis.lr": 0.1})
    go(job, tmp_path / "run")
    spec = resolve(job)
    train = open_data(spec.data, "train", spec.data_seed)
    images, labels = torch.from_numpy(train.read(list(range(len(train))))) / 255, torch.from_numpy(train.labels)
    assert len(train) == 10 * EACH
    begun, learning = seen[0]["free"], seen[1:]
    assert all(rows_of(begun, images)), "pseudo examples begin as training images"
    assert len(learning) == STEPS
    for batch in learning:
        pixels = batch["free"]
        assert len(batch["images"]) == BATCH
        real, made = batch["images"][:KEPT], batch["images"][KEPT:]
        index = batch["sample_index"][:KEPT]
        torch.testing.assert_close(real, images[index], rtol=0, atol=1e-6)
        assert torch.equal(batch["labels"][:KEPT], labels[index])
        assert len(set(index.tolist())) == KEPT
        assert (batch["labels"][KEPT:] == NO_LABEL).all()
        places = [place for (place,) in rows_of(made, pixels)]
        assert len(set(places)) == BATCH - KEPT, "pseudo examples, each once"
        assert -1e-5 < float(pixels.min()) < float(pixels.max()) < 1 + 1e-5, "between black and white"
    assert len({tuple(batch["sample_index"][:KEPT].tolist()) for batch in learning}) > 1
    ways = [float((later["free"] - earlier["free"]).abs().max()) for earlier, later in pairwise(learning)]
    assert all(way > 0 for way in ways[1::2]), "they move between rounds"
    assert all(way == 0 for way in ways[::2]), "and stay within one"


def test_pseudo_examples_go_where_student_and_teacher_differ(real_data, tmp_path):
    """With a student that hardly learns, what the images minimise, minus the divergence, falls."""
    moved = {"synthesis.lr": 0.1, "synthesis.student_steps": 1, "training.lr": 1e-8, "training.max_steps": 6}
    go(few(real_data, **moved), tmp_path / "run")
    terms = [step["images_terms"]["kimura"] for step in read(tmp_path / "run" / "metrics.jsonl", "step")]
    assert len(terms) == 6
    assert all(later < earlier < 0 for earlier, later in pairwise(terms))


def test_every_term_is_alive_and_the_run_says_what_it_read(real_data, tmp_path):
    result = go(few(real_data, ce_weight=1.0), tmp_path / "run")
    steps = read(tmp_path / "run" / "metrics.jsonl", "step")
    assert len(steps) == STEPS
    for step in steps:
        assert step["grad_norms"].keys() == {"ce", "kimura"}
        assert all(0 < norm < math.inf for norm in step["grad_norms"].values())
    assert [step["step"] for step in steps if "images_terms" in step] == [1, 3, 5, 7], "once a round"
    assert "training images" in json.loads((tmp_path / "run" / "result.json").read_text())["real_data"], result


def test_cross_entropy_hears_the_labels_of_what_was_read_alone(real_data, tmp_path, seen):
    """The term at the first step is that of these images' labels, by hand."""
    job = few(real_data, ce_weight=2.0, **{"training.max_steps": 1})
    go(job, tmp_path / "run")
    (step,) = read(tmp_path / "run" / "metrics.jsonl", "step")
    job, batch = resolve(job), seen[1]
    with torch.random.fork_rng():
        torch.manual_seed(derive(job.seed, "student"))
        student = build(job.student, facts(job)).train()
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in student.modules())
    logits = Tapped(job.student, student, [Signal("logits")], facts(job), torch.device("cpu"))(batch["images"][:KEPT])["logits"]
    loss = 2.0 * F.cross_entropy(logits, batch["labels"][:KEPT], reduction="sum") / BATCH
    assert step["terms"]["ce"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_any_method_that_makes_images_in_turn_may_read_a_share(real_data, tmp_path, seen):
    options = {"data.train": "train.parquet", "data.per_class": EACH, "synthesis.real": 0.5}
    go(small(real_data, "dfad", **options), tmp_path / "run")
    assert "training images" in json.loads((tmp_path / "run" / "result.json").read_text())["real_data"]
    terms = [
        step["images_terms"]["dfad"] for step in read(tmp_path / "run" / "metrics.jsonl", "step") if "images_terms" in step
    ]
    assert len(set(terms)) == len(terms) == STEPS // 2
    for batch in seen[1:]:
        assert len(batch["images"]) == len(batch["labels"]) == BATCH
        assert int(batch["labels"].min()) >= 0, "a generator is told a class"
        assert int(batch["sample_index"][: BATCH // 2].max()) < 10 * EACH


@pytest.mark.slow
def test_placement_never_changes_the_result(real_data, tmp_path):
    """A pool without Ray: requests and replies pickled, gradients by a second forward."""
    for name, placement in (("inline", "inline"), ("pool", "pool")):
        go(few(real_data, **{"teachers.lenet5.placement": placement}), tmp_path / name)
    assert trace(tmp_path / "inline") == trace(tmp_path / "pool")
    assert_equal_states(final_state(tmp_path / "inline"), final_state(tmp_path / "pool"))


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 4])
def test_resume_is_exact(at, real_data, tmp_path, monkeypatch):
    stopped_and_resumed(few(real_data), at, tmp_path, monkeypatch)


def test_what_is_read_is_augmented_as_the_job_says(real_data, tmp_path, seen):
    """The same images in other views, new ones in each pass; what is made and what it began as stay as they are."""
    job = few(real_data, **{"data.augmentation.crop": 4, "training.max_steps": 6})
    go(job, tmp_path / "run")
    spec = resolve(job)
    train = open_data(spec.data, "train", spec.data_seed)
    images = torch.from_numpy(train.read(list(range(len(train))))) / 255
    assert all(rows_of(seen[0]["free"], images)), "pseudo examples begin as they are"
    first, sixth = seen[1], seen[6]
    assert {int(i) for batch in seen[1:6] for i in batch["sample_index"][:KEPT]} == set(range(10 * EACH)), "each once a pass"
    assert sum(not rows for batch in seen[1:6] for rows in rows_of(batch["images"][:KEPT], images)) > EACH * KEPT
    keys = {"epoch": first["augmentation_seed"][:KEPT], "next": sixth["augmentation_seed"][:KEPT]}
    assert {name: set(value.tolist()) for name, value in keys.items()} == {"epoch": {0}, "next": {1}}


def test_without_a_share_nothing_is_read(real_data):
    with pytest.raises(ValueError, match=r"data.train: this job makes its own images"):
        resolve(few(real_data, **{"synthesis.real": 0.0}))


FAULTS = {
    "synthesis.mode: training images are read where": {"synthesis.mode": "bank"},
    "launch.workers: pseudo examples are": {"launch.workers": 2},
    "data.augmentation: images of a bank, or beside made ones, are not mixed": {"data.augmentation.mixup": 0.4},
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_such_a_job_cannot_have(told, real_data):
    found = checked.synthesis(resolve(few(real_data, **FAULTS[told])))
    assert any(fault.startswith(told) for fault in found), found


def test_a_share_of_nothing_is_a_fault(real_data):
    job = few(real_data)
    found = checked.synthesis(resolve(replace(job, data=replace(job.data, train="none"))))
    assert [fault.split(",")[0] for fault in found] == ["data.train: expected images to read beside made ones"]
    assert inspect(job.replace(**{"data.train": None})).faults


def test_a_job_as_it_is_has_no_fault(real_data):
    found = inspect(few(real_data))
    assert found.faults == []
    assert any("training images" in note for note in found.notes)
