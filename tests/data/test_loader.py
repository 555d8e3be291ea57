"""A loader gives the plan's batches in order from anywhere, surfaces errors, and ends."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raykd.config import Augmentation
from raykd.data.batches import Plan, make_batch
from raykd.data.loader import Loader
from raykd.data.sets import open_split
from raykd.errors import ConfigError, DataError

SPEC = Augmentation(crop=1, flip=True, mixup=0.4)


@pytest.fixture(scope="module")
def digits():
    return open_split(SimpleNamespace(kind="digits"), "eval")


def expected(dataset, plan, start, count):
    first = start[0] * plan.steps_per_epoch + start[1]
    positions = [plan.position(step) for step in range(first, first + count)]
    return [make_batch(dataset, plan.indices(*position), SPEC, plan.seed, position[0]) for position in positions]


def same(batches, others):
    pairs = list(zip(batches, others, strict=True))
    return all(set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (1, 4), (3, 5)])
@pytest.mark.parametrize("start", [(0, 0), (2, 7)])
def test_threads_give_the_plans_batches(digits, threads, prefetch, start):
    plan = Plan(360, 32, 4, drop_last=False)
    with Loader(digits, plan, SPEC, start=start, prefetch=prefetch, threads=threads) as loader:
        batches = list(itertools.islice(loader, 20))
    assert same(batches, expected(digits, plan, start, 20))


def test_resume_anywhere_gives_the_rest(digits):
    plan = Plan(360, 32, 4)
    with Loader(digits, plan, SPEC) as loader:
        whole = list(itertools.islice(loader, 25))
    with Loader(digits, plan, SPEC) as loader:
        list(itertools.islice(loader, 14))
        position = loader.position
    assert position == (1, 3)
    with Loader(digits, plan, SPEC, start=position) as loader:
        assert same(list(itertools.islice(loader, 11)), whole[14:])


def test_epochs_one_by_one(digits):
    plan = Plan(360, 32, 4)
    with Loader(digits, plan, SPEC, start=(0, 6)) as loader:
        assert same(list(loader.epoch(0)), expected(digits, plan, (0, 6), 5))
        assert loader.position == (1, 0)
        assert same(list(loader.epoch(1)), expected(digits, plan, (1, 0), 11))
        assert same(list(loader.epoch(5)), expected(digits, plan, (5, 0), 11))
        loader.seek((0, 3))
        assert same(list(loader.epoch(0)), expected(digits, plan, (0, 3), 8))


def test_processes_give_the_same_batches(digits):
    plan = Plan(360, 30, 4, drop_last=False, world=2, rank=1)
    with Loader(digits, plan, SPEC, processes=1, prefetch=3, start=(1, 9)) as loader:
        batches = list(itertools.islice(loader, 8))
        loader.seek((0, 2))
        again = list(itertools.islice(loader, 5))
    assert same(batches, expected(digits, plan, (1, 9), 8))
    assert same(again, expected(digits, plan, (0, 2), 5))


@pytest.mark.parametrize("processes", [0, 1])
def test_views_come_again_in_another_order(digits, processes):
    plan = Plan(len(digits), 32, seed=5, augmentation_epochs=2)
    assert [plan.view(epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]
    assert [Plan(len(digits), 32).view(epoch) for epoch in (0, 7)] == [0, 7]
    with Loader(digits, plan, SPEC, start=(3, 0), processes=processes) as loader:
        found = next(iter(loader))
    rows = plan.indices(3, 0)
    assert same([found], [make_batch(digits, rows, SPEC, 5, 1)])
    assert not np.array_equal(rows, plan.indices(1, 0))


def test_processes_surface_errors_in_their_type(shards):
    def change(contents):
        contents[13] = b"not an image"

    dataset = open_split(shards(20, change, cache="none"), "train")
    with (
        Loader(dataset, Plan(20, 5, shuffle=False), None, processes=1) as loader,
        pytest.raises(DataError, match=r"\(train-1.parquet, row group 0, row 3\)"),
    ):
        list(loader.epoch(0))


def test_a_dead_process_is_an_error(digits):
    with Loader(digits, Plan(360, 32), None, processes=1, prefetch=2) as loader:
        batches = iter(loader)
        next(batches)
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(DataError, match="a worker process died"):
            list(itertools.islice(batches, 5))


def test_errors_surface_at_their_batch(shards):
    def change(contents):
        contents[13] = b"not an image"

    dataset = open_split(shards(20, change, cache="none"), "train")
    with Loader(dataset, Plan(20, 5, shuffle=False), None) as loader:
        batches = loader.epoch(0)
        assert [next(batches)["sample_index"][0].item() for _ in range(2)] == [0, 5]
        with pytest.raises(DataError, match=r"\(train-1.parquet, row group 0, row 3\)"):
            next(batches)
        assert loader.position == (0, 2)


def test_a_batch_that_never_comes_is_an_error(digits):
    stop = threading.Event()

    class Stuck:
        shape, num_classes, labels, fingerprint = digits.shape, 10, digits.labels, "x"

        def __len__(self):
            return len(digits)

        def read(self, rows):
            stop.wait(10)
            return digits.read(rows)

        def where(self, row):
            return f"row {row}"

    loader = Loader(Stuck(), Plan(360, 32), None, timeout_s=0.1)
    with pytest.raises(DataError, match=r"batch \(0, 0\) within 0.1 s"):
        next(iter(loader))
    loader.close()  # does not wait for the batch
    assert not stop.is_set()
    stop.set()


def test_close_ends_the_threads(digits):
    def running():
        return [thread for thread in threading.enumerate() if thread.name.startswith("raykd-loader")]

    before = running()
    with Loader(digits, Plan(360, 32), SPEC, threads=2) as loader:
        next(iter(loader))
        started = [thread for thread in running() if thread not in before]
    assert started
    assert not any(thread.is_alive() for thread in started)


def test_a_consumer_may_change_its_batch(digits):
    plan = Plan(360, 32, 4)
    with Loader(digits, plan, None) as loader:
        for batch in itertools.islice(loader, 3):
            batch["images"].zero_()
    assert digits.read(np.arange(360)).any()


def test_wrong_options(digits):
    for options in ({"prefetch": 0}, {"processes": -1}, {"start": (0, 99)}, {"start": (-1, 0)}):
        with pytest.raises(ConfigError):
            Loader(digits, Plan(360, 32), None, **options)
