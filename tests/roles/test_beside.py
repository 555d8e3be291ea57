"""Training images beside made ones: every one as often, for any number of workers the same, in views of each pass."""

from dataclasses import replace

import numpy as np
import torch

from raykd.config import Augmentation, Data, Job
from raykd.data.keys import permutation
from raykd.data.packaged import ArraySource
from raykd.data.sets import StoredSet
from raykd.roles.beside import Beside

N, SEED = 10, 4


def train():
    pixels = np.random.default_rng(0).integers(1, 256, (N, 1, 6, 6), dtype=np.uint8)
    return StoredSet(ArraySource(pixels, np.arange(N) % 3, "ten"), num_classes=3, cache="none")


def beside(rank=0, world=1, dtype=torch.float32, **data):
    return Beside(train(), replace(Job(seed=SEED), data=Data(**data)), rank, world, dtype)


def rows(found):
    return found["sample_index"].tolist()


def test_pass_after_pass_in_keyed_orders():
    one = beside()
    seen = [i for number in range(5) for i in rows(one.read("critic", number, 4))]
    assert seen == [*permutation(SEED, 0, N, "beside critic"), *permutation(SEED, 1, N, "beside critic")]
    assert rows(one.read("critic", 3, 4)) == seen[12:16], "a batch is a function of its number"
    other = [i for number in range(5) for i in rows(one.read("student", number, 4))]
    assert other != seen
    assert sorted(other[:N]) == list(range(N))


def test_more_than_the_set_holds():
    found = rows(beside().read("pixels", 0, 2 * N + 3))
    assert sorted(found[:N]) == sorted(found[N : 2 * N]) == list(range(N))
    assert len(found) == 2 * N + 3


def test_what_is_read():
    found = beside(dtype=torch.float64).read("critic", 0, 4)
    assert found["images"].dtype is torch.float64
    whole = train()
    assert torch.equal(found["images"] * 255, torch.from_numpy(whole.read(np.array(rows(found)))).double())
    assert found["labels"].tolist() == [i % 3 for i in rows(found)]
    passes = [beside().read("critic", number, 4)["augmentation_seed"].tolist() for number in range(3)]
    assert passes == [[0] * 4, [0] * 4, [0, 0, 1, 1]]


def test_workers_read_the_batch_of_one():
    for number in range(6):
        whole = beside().read("critic", number, 6, augmented=True)
        parts = [beside(rank, 3).read("critic", number, 2, augmented=True) for rank in range(3)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name


def test_views_are_of_the_pass():
    spec = {"augmentation": Augmentation(crop=2)}
    first, later = (beside(**spec).read("student", number, N, augmented=True) for number in (0, 1))
    plain = beside(**spec).read("student", 0, N)
    assert rows(first) == rows(plain)
    assert not torch.equal(first["images"], plain["images"])
    again = beside(**spec, augmentation_epochs=1).read("student", 1, N, augmented=True)
    order, before = np.argsort(rows(again)), np.argsort(rows(first))
    assert torch.equal(again["images"][order], first["images"][before]), "the views of the first pass once more"
    assert not torch.equal(later["images"][order], first["images"][before])
    assert set(again["augmentation_seed"].tolist()) == {0}
