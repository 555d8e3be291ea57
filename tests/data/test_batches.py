"""Plans partition, batches are functions of their keys, recipes give them back bit for bit, mixing is the papers'."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_samples import ROOT

from raykd.config import Augmentation
from raykd.data.batches import Plan, evaluation_batches, from_recipe, make_batch, recipe
from raykd.data.keys import permutation
from raykd.data.sets import open_split
from raykd.errors import ConfigError, DataError

ALL = Augmentation(crop=2, flip=True, randaugment=(2, 9), erase=0.2, mixup=0.8, cutmix=1.0, mix_probability=0.8)


@pytest.fixture(scope="module")
def digits():
    return open_split(SimpleNamespace(kind="digits", in_channels=3, size=(16, 16)), "train")


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("n", [96, 100, 101, 103, 107])
def test_workers_partition_every_global_batch(world, shuffle, drop_last, n):
    plans = [Plan(n, 12, 5, shuffle, drop_last, world, rank) for rank in range(world)]
    seen = []
    for step in range(plans[0].steps_per_epoch):
        parts = [plan.indices(2, step) for plan in plans]
        whole = np.concatenate(parts)
        assert np.array_equal(whole, plans[0].global_batch(2, step))
        assert max(map(len, parts)) - min(map(len, parts)) <= (0 if len(whole) == 12 else 1)
        assert min(map(len, parts)) >= 2
        seen.append(whole)
    seen = np.concatenate(seen)
    assert len(np.unique(seen)) == len(seen)
    short = n % 12
    kept = short if not drop_last and short // world >= 2 else 0
    assert len(seen) == n - short + kept
    expected = permutation(5, 2, n) if shuffle else np.arange(n)
    assert np.array_equal(seen, expected[: len(seen)])


def test_order_is_the_same_for_any_world():
    one = Plan(100, 12, 5)
    for step in range(8):
        shares = [Plan(100, 12, 5, world=3, rank=rank).indices(1, step) for rank in range(3)]
        assert np.array_equal(np.concatenate(shares), one.indices(1, step))
    assert not np.array_equal(one.indices(0, 0), one.indices(1, 0))
    assert one.position(17) == (2, 1)


def test_plans_that_cannot_be():
    with pytest.raises(ConfigError, match="multiple of 3 workers, got 16"):
        Plan(100, 16, world=3)
    with pytest.raises(ConfigError, match=r"rank: expected 0..1, got 2"):
        Plan(100, 16, world=2, rank=2)
    with pytest.raises(DataError, match="at least one batch of 16, got 10 samples"):
        Plan(10, 16)
    with pytest.raises(ConfigError, match=r"step: expected 0..5"):
        Plan(100, 16).indices(0, 6)


def digest(dataset, order):
    """Hash of some batches, made in the given order."""
    hashes = {}
    for step in order:
        batch = make_batch(dataset, Plan(len(dataset), 32, 7).indices(1, step), ALL, 7, 1)
        hashes[step] = hashlib.md5(b"".join(field.numpy().tobytes() for field in batch.values())).hexdigest()
    return " ".join(hashes[step] for step in sorted(hashes))


def test_batches_are_equal_in_another_process_and_order(digits):
    code = f"import sys; sys.path[:0] = ['tests/data', '.']; import test_batches as t; print(t.digest({DIGITS}, [3, 0, 2, 1]))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True)
    assert other.stdout.strip() == digest(digits, [0, 1, 2, 3])


DIGITS = "t.open_split(t.SimpleNamespace(kind='digits', in_channels=3, size=(16, 16)), 'train')"


@pytest.mark.parametrize(
    "spec", [None, Augmentation(), Augmentation(crop=2, flip=True), Augmentation(mixup=0.2), Augmentation(cutmix=1.0), ALL]
)
def test_recipe_gives_the_batch_back(digits, spec):
    batch = make_batch(digits, np.arange(5, 300, 7), spec, 3, 12)
    sent = recipe(batch, 12)
    assert sent.nbytes == 12 * batch.size
    received = pickle.loads(pickle.dumps(sent))
    assert equal(from_recipe(digits, spec, 3, received), batch)


def test_recipe_of_some_samples_gives_their_rows(digits):
    batch = make_batch(digits, np.arange(40), ALL, 3, 12)
    few = make_batch(digits, np.array([7, 30]), ALL, 3, 12)
    assert equal(few, type(batch)({name: field[[7, 30]] for name, field in batch.items()}))


def test_recipe_mixes_epochs(digits):
    epochs = np.array([1, 2**31 - 1])
    batch = make_batch(digits, np.array([4, 4]), ALL, 0, epochs)
    assert equal(from_recipe(digits, ALL, 0, recipe(batch, epochs)), batch)
    assert torch.equal(batch["images"][:1], make_batch(digits, np.array([4]), ALL, 0, 1)["images"])
    with pytest.raises(ConfigError, match="epoch"):
        recipe(batch, 2**31)


def test_views_of_one_batch_differ(digits):
    first, second = (make_batch(digits, np.arange(16), ALL, 0, 0, view) for view in (0, 1))
    assert torch.equal(first["labels"], second["labels"])
    assert not torch.equal(first["images"], second["images"])


def _pair(digits, spec, rows, epoch=4, seed=9):
    """Mixed batch, the views of its samples and of their partners."""
    partner = permutation(seed, epoch, len(digits), "mix partners/0")[rows]
    plain = Augmentation(crop=spec.crop, flip=spec.flip)
    views = [make_batch(digits, r, plain, seed, epoch)["images"].numpy().astype(np.float64) for r in (rows, partner)]
    return make_batch(digits, rows, spec, seed, epoch), *views, partner


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_the_weighted_sum_of_two_views(digits, alpha):
    rows = np.arange(0, 1400, 3)
    batch, mine, theirs, partner = _pair(digits, Augmentation(crop=2, flip=True, mixup=alpha), rows)
    weight = batch["mix_weight"].numpy()
    expected = weight[:, None, None, None] * mine + (1.0 - weight)[:, None, None, None] * theirs
    assert np.abs(batch["images"].numpy() - expected).max() <= 0.5 + 1e-4
    assert weight.min() >= 0.5
    assert np.array_equal(batch["labels"].numpy(), digits.labels[rows])
    mixed = weight < 1  # a weight may round to 1 when alpha is small
    assert np.array_equal(batch["mix_labels"].numpy()[mixed], digits.labels[partner][mixed])
    reference = np.random.default_rng(0).beta(alpha, alpha, 100_000)
    assert weight.mean() == pytest.approx(np.maximum(reference, 1 - reference).mean(), abs=0.03)


def test_cutmix_pastes_a_rectangle_and_weighs_by_its_pixels(digits):
    rows = np.arange(0, 1400, 7)
    batch, mine, theirs, _ = _pair(digits, Augmentation(crop=2, flip=True, cutmix=1.0), rows)
    images, weight = batch["images"].numpy(), batch["mix_weight"].numpy()
    for i in range(len(rows)):
        pasted = (images[i] != mine[i]).any(0)
        assert np.array_equal(images[i][:, pasted], theirs[i][:, pasted])
        area = round((1 - float(weight[i])) * 256)
        if pasted.any():
            ys, xs = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
            box = (slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1))
            assert np.array_equal(images[i][:, box[0], box[1]], theirs[i][:, box[0], box[1]])
            assert (ys[-1] - ys[0] + 1) * (xs[-1] - xs[0] + 1) <= area
    assert weight.min() >= 0.5
    assert 0.6 < weight.mean() < 0.95


def test_mix_probability_leaves_the_rest_alone(digits):
    rows = np.arange(1000)
    batch, mine, _, _ = _pair(digits, Augmentation(mixup=1.0, cutmix=1.0, mix_probability=0.3), rows)
    alone = batch["mix_weight"].numpy() == 1
    assert 0.6 < alone.mean() < 0.8
    assert np.array_equal(batch["images"].numpy()[alone], mine[alone])
    assert torch.equal(batch["mix_labels"][alone], batch["labels"][alone])


def test_partners_are_a_permutation_of_the_data_set(digits):
    rows = np.arange(len(digits))
    partner = permutation(9, 4, len(digits), "mix partners/0")
    batch = make_batch(digits, rows, Augmentation(mixup=1.0), 9, 4)
    mixed = batch["mix_weight"].numpy() < 1
    assert np.array_equal(np.sort(partner), rows)
    assert np.array_equal(batch["mix_labels"].numpy()[mixed], digits.labels[partner][mixed])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_batches_cover_the_set_in_order(digits, world):
    shares = [list(evaluation_batches(digits, 100, world, rank)) for rank in range(world)]
    rows = np.concatenate([batch["sample_index"].numpy() for share in shares for batch in share])
    assert np.array_equal(np.sort(rows), np.arange(1437))
    assert sorted({batch.size for share in shares for batch in share}) == [37, 100]
    assert np.array_equal(shares[0][0]["images"].numpy(), digits.read(np.arange(100)))


def test_batch_fields(digits):
    batch = make_batch(digits, np.arange(4), ALL, 0, 0)
    kinds = {name: field.dtype for name, field in batch.items()}
    assert kinds == {
        "labels": torch.int64,
        "sample_index": torch.int64,
        "mix_labels": torch.int64,
        "mix_weight": torch.float32,
        "images": torch.uint8,
    }
    assert batch.size == 4
    assert batch["images"].is_contiguous()
    assert type(batch.to("cpu")) is type(batch | recipe(batch, 0)) is type(batch)
    assert equal(pickle.loads(pickle.dumps(batch)), batch)


def test_making_a_batch_does_not_change_the_data(digits):
    before = digits.read(np.arange(64))
    make_batch(digits, np.arange(64), ALL, 0, 0)
    assert np.array_equal(digits.read(np.arange(64)), before)
