"""A student that learns from a bank: who is asked for how many batches, when, with which student, and how a run is resumed."""

import dataclasses
import itertools
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from raykd.config import Augmentation
from raykd.data.augment import Keys, augment
from raykd.data.batches import Plan as Order
from raykd.errors import DataError, Interrupted
from raykd.exchange.bank import MadeBatch
from raykd.resolve import resolve
from raykd.roles.network import Facts
from raykd.schemes.data_free import Banked, Snapshot
from raykd.schemes.offline import ahead
from tests.spine.making import BATCH, STEPS, banked, contents, making, provenance, records
from tests.spine.small import At, assert_equal_states, final_state, go, trace

FACTS = Facts(9 * BATCH, 10, (3, 32, 32), "cifar10")


class Clerk:
    """Makers whose batches come when the test says so."""

    def __init__(self, room: int = 2) -> None:
        self.room, self.under_way, self.log, self.snapshots, self.done = room, {}, [], [], []
        self.waits = 0

    def snapshot(self, version, weights):
        self.snapshots.append(version)
        return Snapshot(version, weights)

    def ask(self, number, student):
        self.log.append((number, student))
        self.under_way[number] = student
        assert len(self.under_way) <= self.room

    @property
    def asked(self):
        return list(self.under_way)

    def finish(self, *numbers):
        self.done += numbers

    def take(self, wait):
        self.waits += wait
        if wait and not self.done:
            self.finish(min(self.under_way))
        done, self.done = self.done, []
        return [self.made(number, self.under_way.pop(number)) for number in done]

    def made(self, number, student):
        images, labels = np.full((BATCH, 3, 32, 32), number, np.uint8), np.full(BATCH, number % 10)
        notes = {"seen": np.full(BATCH, (number + 1) % 10), "confidence": np.full(BATCH, 0.5, np.float32)}
        return MadeBatch(number, images, labels, student.version if student else -1, seconds=0.5, **notes)

    def close(self):
        self.under_way.clear()


class Eager(Clerk):
    """Makers whose batches are there at once."""

    def take(self, wait):
        self.finish(*self.asked)
        return super().take(wait)


def feed(folder, makers, reads=False, world=1, rank=0, augmentation=None, **synthesis):
    """A feed whose learner does nothing but count steps."""
    settings = {"pace": 0, "capacity": 4, "start": 2} | synthesis
    own = {f"synthesis.{name}": value for name, value in settings.items()}
    job = resolve(making(Path("/"), **own, **{"data.augmentation": augmentation or Augmentation()}))
    asked, method = ("logits",) if reads else (), SimpleNamespace(trains=False, hooks=())
    plans = [SimpleNamespace(student=asked, method=method, reads=lambda name: name == "labels")]
    learner = SimpleNamespace(step_count=0, rank=rank, student=nn.Linear(2, 2))
    order = Order(9 * BATCH, BATCH, 0, drop_last=True, world=world, rank=rank)
    return Banked(job, plans, FACTS, learner, makers, order, folder)


def steps(fed, count, after=lambda step: None):
    """Takes batches as a training does; yields each."""
    found = []
    while len(found) < count:
        for batch in fed.epoch(fed.learner.step_count // 9):
            found.append(batch)
            fed.learner.step_count += 1
            after(fed.learner.step_count)
            if len(found) == count:
                break
    return found


def numbers(makers) -> list[int]:
    return [number for number, _ in makers.log]


def test_no_more_is_under_way_than_there_is_room_for(tmp_path):
    makers = Clerk(room=3)
    fed = feed(tmp_path, makers)
    steps(fed, 1)
    assert numbers(makers) == [0, 1, 2, 3], "two had to come before the first step"
    assert makers.asked == [2, 3]
    steps(fed, 4)
    assert makers.asked == [2, 3, 4], "nothing came, so nothing more than there is room for is asked"
    makers.finish(3)
    steps(fed, 2)
    assert fed.bank.numbers == [0, 1, 3], "in the order in which they come"
    assert makers.asked == [2, 4, 5]


def test_the_student_waits_only_until_it_may_begin(tmp_path):
    makers = Clerk(room=1)
    fed = feed(tmp_path, makers, start=3)
    batches = steps(fed, 5)
    assert makers.waits == 3
    assert fed.bank.numbers == [0, 1, 2]
    assert {int(i) // BATCH for b in batches for i in b["sample_index"]} <= {0, 1, 2}
    said = fed.report()
    assert (said["bank"], said["made"], said["made_s"]) == (3, 3, 1.5)
    assert said["bank_wait_s"] > 0
    assert fed.report().keys() == {"bank", "bank_wait_s"}, "each batch is told once"


@pytest.mark.parametrize("pace", [1, 3])
def test_the_pace_bounds_who_is_ahead_of_the_student(pace, tmp_path):
    makers, most = Eager(room=4), []
    fed = feed(tmp_path, makers, pace=pace, capacity=50)
    steps(fed, 20, lambda step: most.append((step - 1, len(makers.log))))
    assert most == [(step, max(4, 2 + step // pace)) for step in range(20)], "as many as there is room for before it begins"


def test_without_a_pace_makers_work_as_fast_as_they_can(tmp_path):
    makers = Eager(room=4)
    fed = feed(tmp_path, makers, capacity=50)
    steps(fed, 6)
    assert fed.bank.numbers == list(range(24))


def test_a_bank_that_grows_once_ends_the_synthesis(tmp_path):
    makers = Eager(room=3)
    fed = feed(tmp_path, makers, grow="once", capacity=7)
    steps(fed, 12)
    assert numbers(makers) == list(range(7))
    assert fed.bank.numbers == list(range(7))


def test_a_bank_that_always_grows_keeps_the_newest(tmp_path):
    makers = Eager(room=1)
    fed = feed(tmp_path, makers, capacity=3)
    steps(fed, 8)
    assert fed.bank.numbers == numbers(makers)[-3:]
    assert fed.bank.dropped == len(makers.log) - 3


def test_batches_of_too_old_a_student_are_discarded_and_made_again(tmp_path):
    makers = Clerk(room=2)
    fed = feed(tmp_path, makers, reads=True, staleness=5, snapshot_every=1, start=1, grow="once", capacity=3)
    steps(fed, 5)
    assert (fed.bank.numbers, makers.asked) == ([0], [1, 2])
    assert [makers.under_way[n].version for n in (1, 2)] == [0, 1]
    makers.finish(1)  # comes at step 5
    steps(fed, 2)
    assert (fed.bank.numbers, fed._stale) == ([0, 1], 0)
    makers.finish(2)  # comes at step 7
    steps(fed, 2)
    assert (fed.bank.numbers, fed._stale) == ([0, 1], 1)
    assert makers.asked == [3], "another instead"
    assert makers.under_way[3].version == 8, "with the student as it is now"
    makers.finish(3)
    steps(fed, 3)
    assert (fed.bank.numbers, fed._made, makers.asked) == ([0, 1, 3], 3, [])


def test_the_bound_on_a_snapshots_age_renews_it_in_time(tmp_path):
    """Batches that are there at once are never too old, however rarely snapshots are made otherwise."""
    makers = Eager(room=1)
    fed = feed(tmp_path, makers, reads=True, snapshot_every=50, staleness=3, pace=2, capacity=9)
    steps(fed, 18)
    assert fed.state()["stale"] == 0
    assert max(b - a for a, b in itertools.pairwise(makers.snapshots)) <= 4


def test_teachers_that_are_asked_ahead_get_other_batches(tmp_path):
    """A pool of teachers has several requests under way before the student's first step."""
    at_once = steps(feed(tmp_path, Eager(room=1), start=4), 9)
    fed = feed(tmp_path, Eager(room=1), start=4)
    pool = SimpleNamespace(window=4, drop=False, request=lambda batch: SimpleNamespace(result=dict))
    found = []
    for batch, _, _ in ahead(fed.epoch(0), {"pool": pool}):
        found.append(batch)
        fed.learner.step_count += 1
    assert len(found) == 9
    for one, other in zip(found, at_once):
        assert torch.equal(one["sample_index"], other["sample_index"])
    assert len({tuple(batch["sample_index"].tolist()) for batch in found}) == 9


def test_batches_made_without_a_student_do_not_age(tmp_path):
    makers = Clerk(room=1)
    fed = feed(tmp_path, makers, staleness=1)
    steps(fed, 8)
    makers.finish(*makers.asked)
    steps(fed, 1)
    assert (fed.bank.numbers, fed._stale, makers.snapshots) == ([0, 1, 2], 0, [])
    assert all(student is None for _, student in makers.log)


def test_snapshots_are_made_when_they_are_due_and_somebody_asks(tmp_path):
    makers = Eager(room=1)
    fed = feed(tmp_path, makers, reads=True, snapshot_every=4, pace=3, capacity=50)
    steps(fed, 20)
    asked_at = [0, 0, *range(3, 20, 3)]
    expected = []
    for step in asked_at:
        expected.append(step if not expected or step - expected[-1] >= 4 else expected[-1])
    assert [student.version for _, student in makers.log] == expected
    assert makers.snapshots == sorted(set(expected))


def test_a_snapshot_is_of_the_student_as_it_was(tmp_path):
    makers = Clerk(room=1)
    fed = feed(tmp_path, makers, reads=True, snapshot_every=2, start=1)
    before = fed.learner.student.weight.detach().clone()

    def learn(_):
        fed.learner.student.weight.data.add_(1.0)

    steps(fed, 2, learn)
    (number,) = makers.asked
    assert torch.equal(makers.under_way[number].weights["weight"], before)


def test_workers_have_batches_of_their_own(tmp_path):
    found = []
    for rank in range(2):
        makers = Eager(room=1)
        fed = feed(tmp_path, makers, world=2, rank=rank)
        batch = steps(fed, 3)[-1]
        assert batch["images"].shape == (BATCH // 2, 3, 32, 32)
        found.append(numbers(makers))
        fed.state()
    assert found[0] == [2 * i for i in range(len(found[0]))]
    assert found[1] == [2 * i + 1 for i in range(len(found[1]))]
    assert {p.name for p in (tmp_path / "bank").iterdir()} == {"rank-0", "rank-1"}


class Painter(Eager):
    """Makers of images of which no two are alike."""

    def made(self, number, student):
        images = np.random.default_rng(number).integers(0, 256, (BATCH, 3, 32, 32), np.uint8)
        return dataclasses.replace(super().made(number, student), images=images)


def test_images_of_the_bank_are_augmented_for_the_student(tmp_path):
    plain = steps(feed(tmp_path, Painter(room=1)), 6)
    spec = Augmentation(crop=4, flip=True)
    fed = feed(tmp_path, Painter(room=1), augmentation=spec)
    seen: dict[int, list] = {}
    for step, (batch, original) in enumerate(zip(steps(fed, 6), plain)):
        index = original["sample_index"]
        assert torch.equal(batch["sample_index"], index)
        assert torch.equal(batch["labels"], original["labels"])
        keys = Keys(3, np.full(BATCH, step), index.numpy())
        expected = augment(original["images"].numpy().copy(), keys, spec)
        assert np.array_equal(batch["images"].numpy(), expected)
        for i, image in zip(index.tolist(), batch["images"]):
            seen.setdefault(i, []).append(image)
    again = [images for images in seen.values() if len(images) > 2]
    assert any(not torch.equal(images[0], images[-1]) for images in again), "another view at another step"
    for number in fed.bank.numbers:
        kept = fed.bank._whole(number).images
        assert np.array_equal(kept, Painter(room=1).made(number, None).images), "the bank keeps them as they are"


def test_how_far_the_bank_is_filled_is_told(tmp_path):
    makers = Clerk(room=3)
    fed = feed(tmp_path, makers, start=3)
    assert [(done, total) for done, total, _ in fed.prepare()] == [(1, 3), (2, 3), (3, 3)]
    assert fed.bank.numbers == [0, 1, 2]
    assert list(fed.prepare()) == []
    cut = feed(tmp_path, makers, start=3)
    cut.load_state(fed.state())
    assert list(cut.prepare()) == [], "as far as it was"


def test_what_was_under_way_is_asked_again_and_nothing_else(tmp_path):
    makers = Clerk(room=3)
    fed = feed(tmp_path, makers, reads=True, capacity=9, snapshot_every=100)
    steps(fed, 1)
    makers.finish(3)
    steps(fed, 2)
    assert (fed.bank.numbers, makers.asked) == ([0, 1, 3], [2, 4, 5])
    state, learnt = fed.state(), fed.learner.student.weight.detach().clone()
    others = Clerk(room=3)
    again = feed(tmp_path, others, reads=True, capacity=9, snapshot_every=100)
    again.learner.student.weight.data.add_(9.0)
    again.learner.step_count = 3
    again.load_state(state)
    drawn = steps(again, 1)[0]
    assert again.bank.numbers == [0, 1, 3]
    assert numbers(others) == [2, 4, 5]
    assert {student.version for _, student in others.log} == {0}, "with the student that the batches began with"
    assert torch.equal(others.log[0][1].weights["weight"], learnt)
    assert torch.equal(drawn["images"], steps(fed, 1)[0]["images"])


def test_a_straggler_is_asked_again_and_nothing_that_was_dropped(tmp_path):
    makers = Clerk(room=2)
    fed = feed(tmp_path, makers, capacity=3, start=1)
    for number in range(1, 9):
        makers.finish(number)
        steps(fed, 1)
    assert 0 in makers.asked
    others = Clerk(room=2)
    again = feed(tmp_path, others, capacity=3, start=1)
    again.learner.step_count = fed.learner.step_count
    again.load_state(fed.state())
    steps(again, 1)
    assert numbers(others) == [0, 9], "those that were dropped are not made again"


def test_nothing_under_way_and_nothing_to_begin_with_is_an_error(tmp_path):
    makers = Clerk(room=0)
    with pytest.raises(DataError, match="expected batches for the bank, none is under way"):
        steps(feed(tmp_path, makers), 1)


def damaged_once(fed, number):
    """The file of a batch on disk is cut off."""
    path = fed.bank._path(number)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("grow", ["once", "always"])
def test_a_batch_that_was_damaged_is_made_anew_and_told(grow, tmp_path):
    makers = Eager(room=1)
    fed = feed(tmp_path, makers, memory_bytes=1, grow=grow, capacity=3, start=3, pace=100)
    steps(fed, 1)
    damaged_once(fed, 1)
    with pytest.warns(UserWarning, match="Batch 1 is dropped"):
        steps(fed, 4)
    assert fed.bank.numbers == [0, 2, 3]
    assert fed.report()["damaged"] == 1
    assert "damaged" not in fed.report()
    state = fed.state()
    damaged_once(fed, 0)
    again = feed(tmp_path, Eager(room=1), memory_bytes=1, grow=grow, capacity=3, start=3, pace=100)
    with pytest.warns(UserWarning, match="Batch 0 is dropped"):
        again.load_state(state)
    steps(again, 1)
    assert again.bank.numbers == [2, 3, 4]
    assert again.report()["damaged"] == 1


PIXELS = {"synthesis.jitter": 2, "synthesis.flip": True, "synthesis.keep": "best", "synthesis.latents_lr": 0.01}
METHODS = {
    "reads the teacher alone": {"method": "dafl"},
    "reads the student": {"method": "dfad", "synthesis.snapshot_every": 5},
    "augmented": {"method": "dafl", "data.augmentation.crop": 4, "data.augmentation.flip": True},
    "reads the student, hard ones first": {"method": "dfad", "synthesis.priority": "hard", "synthesis.capacity": 3},
    "on disk": {"method": "dafl", "synthesis.memory_bytes": 1},
    "grows once": {"method": "dafl", "synthesis.grow": "once"},
    "a generator that goes on": {"method": "dafl", "synthesis.reset": "never", "synthesis.max_restarts": 0},
    "pixels": {"method": "dafl", "synthesis.generator": "pixels", "synthesis.options": {}, **PIXELS},
}


class Died(Exception):
    """What ends a run without a word."""


def die(_) -> None:
    raise Died


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(name, real_data, tmp_path, monkeypatch):
    """On the local backend: the same bank and the same student, bit for bit."""
    monkeypatch.setattr("raykd.launch.run.POLL_S", 0.0)  # these steps are shorter than what a person waits
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = making(real_data, **METHODS[name])
    go(job, whole)
    step = random.randrange(5, STEPS - 1)
    with pytest.raises(Died):
        go(job, cut, At(step, die))
    go(job, cut, resume=True)
    assert trace(cut) == trace(whole), f"cut off at step {step}"
    assert_equal_states(final_state(whole), final_state(cut))
    bank, other = banked(whole)["bank"], banked(cut)["bank"]
    assert [b[:5] for b in bank["batches"]] == [b[:5] for b in other["batches"]], "all but the seconds they took"
    held = {int(b[0]) for b in bank["batches"]}
    assert {n: contents(whole)[n] for n in held} == {n: contents(cut)[n] for n in held}
    made_with = {version for version, _ in provenance(whole).values()}
    assert (made_with == {-1}) == (METHODS[name]["method"] == "dafl")


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(real_data, tmp_path):
    job = making(real_data, "dfad")
    go(job, tmp_path / "whole")
    with pytest.raises(Interrupted, match="checkpoint was written"):
        go(job, tmp_path / "cut", At(7, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    go(job, tmp_path / "cut", resume=True)
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))


def test_what_a_run_says_of_its_bank(real_data, tmp_path):
    go(making(real_data, "dfad", **{"synthesis.capacity": 4}), tmp_path)
    told = [r for r in records(tmp_path, "step") if "made" in r]
    assert sum(r["made"] for r in told) == 2 + (STEPS - 1) // 2
    assert all(r["bank_wait_s"] >= 0 and r["bank"] <= 4 for r in records(tmp_path, "step"))
    shown = records(tmp_path, "eval")[-1]["shown"]
    assert (shown["batches"], shown["made"], shown["stale"], shown["shown"]) == (4, 10, 0, 8)
    assert (sum(shown["classes"]), sum(shown["bank_classes"])) == (8, 4 * BATCH)
    assert 0.1 <= shown["confidence"] <= 1
    assert shown["wanted"] is None, "dfad wants no class"
    assert shown["age_max"] >= shown["age_mean"] > 0
    assert (tmp_path / shown["file"]).stat().st_size > 100
    assert banked(tmp_path)["made"] == 10
