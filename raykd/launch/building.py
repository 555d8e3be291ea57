"""Builders write the shards of a store: a thread makes the batches of the views, the teacher answers, files are written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raykd.config import Job
from raykd.data.batches import Batch, make_batch
from raykd.data.sets import DataSet
from raykd.data.splits import open_data
from raykd.errors import ResourceError
from raykd.exchange import codec as codecs
from raykd.exchange.asking import Ask, Asks
from raykd.exchange.store import Header, Place
from raykd.exchange.store_files import write_shard
from raykd.launch import assembly, preflight
from raykd.roles.network import Facts
from raykd.roles.teacher import Committee

AHEAD = 4  # batches made while the teacher computes


class Builder:
    """Writes shards of one teacher; on Ray one replica of it, mapped over the shards by Ray Data.

    Args:
        job: as `storing.planned` gives it.
        name: of the teacher.
        folder: of the store.
        header: of it.
        known: facts of the training data.
    """

    def __init__(self, job: Job, name: str, folder: str, header: Header, known: Facts) -> None:
        self.job, self.name, self.folder, self.header = job, name, Path(folder), header
        self.committee = assembly.make_committee(job, (name,), known)
        own = header.teachers[name]
        codec = codecs.parse(own.codec, own.temperature)
        self.asks = Asks((Ask(name, tuple(k.signal for k in own.signals), codec),))
        self.train = open_data(job.data, "train", job.data_seed)
        self.train.read(np.zeros(1, np.int64))  # decodes the whole set where there is no cache yet

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """One shard, as a row of Ray Data."""
        place = Place(self.name, int(row["epoch"]), int(row["shard"]))
        [(_, marker)] = self.shards([place])
        return {"epoch": place.epoch, "shard": place.shard, "marker": json.dumps(marker)}

    def shards(self, places: Iterable[Place]) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Builds shards one after another; images of the next are made while the teacher answers for this one."""
        places = list(places)
        asked = [(p.epoch, rows) for p in places for rows in batches_of(self.header, p.shard)]
        with ahead(self.train, self.job, asked) as batches:
            for place in places:
                count = len(range(*self.header.span(place.shard), self.header.batch_size))
                replies = (answered(self.committee, self.asks, next(batches)) for _ in range(count))
                yield place, write_shard(self.folder, self.header, place, replies)


def batches_of(header: Header, shard: int) -> Iterator[NDArray[np.int64]]:
    """sample_index of a shard's batches; the last one is filled up from the start of the data set."""
    first, stop = header.span(shard)
    for start in range(first, stop, header.batch_size):
        yield wrapped(start, header.batch_size, header.num_samples)


def wrapped(start: int, count: int, num_samples: int) -> NDArray[np.int64]:
    """`count` positions from `start` on; after the last of the data set its first."""
    return np.arange(start, start + count, dtype=np.int64) % num_samples


@contextlib.contextmanager
def ahead(train: DataSet, job: Job, asked: Iterable[tuple[int, NDArray[np.int64]]]) -> Iterator[Iterator[Batch]]:
    """The batches of (epoch, sample_index), in order, made ahead by a thread."""

    def make(epoch: int, rows: NDArray[np.int64]) -> Batch:
        return make_batch(train, rows, job.data.augmentation, job.data_seed, epoch)

    def each() -> Iterator[Batch]:
        stream, pending = iter(asked), deque[Future[Batch]]()
        while True:
            while len(pending) < AHEAD and (item := next(stream, None)) is not None:
                pending.append(pool.submit(make, *item))
            if not pending:
                return
            yield pending.popleft().result()

    pool = ThreadPoolExecutor(1, thread_name_prefix="raykd-views")
    try:
        yield each()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def answered(committee: Committee, asks: Asks, batch: Batch) -> codecs.Encoded:
    """One teacher's encoded signals of a batch."""
    reply = committee.answer({"images": batch["images"]}, asks)
    return next(iter(reply.teachers.values()))


def made(job: Job, folder: Path, header: Header, places: list[Place]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Builds the shards and yields each with its marker when it is written."""
    if not places:
        return
    known = assembly.facts(job)
    by_teacher = {name: [p for p in places if p.teacher == name] for name in header.teachers}
    if job.launch.backend == "local":
        for name, own in by_teacher.items():
            if own:
                yield from Builder(job, name, str(folder), header, known).shards(own)
        return
    from raykd.launch import cluster

    with cluster.connected(job):
        cluster.require_shared(folder)
        for name, own in by_teacher.items():
            if own:
                yield from _on_ray(job, name, folder, header, known, own)


def _on_ray(
    job: Job, name: str, folder: Path, header: Header, known: Facts, places: list[Place]
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """One teacher's replicas as an actor pool of Ray Data, mapped over its shards."""
    import ray
    from ray.exceptions import RayError

    from raykd.exchange.pool import original
    from raykd.launch import cluster

    spec = job.teachers[name]
    alone = dataclasses.replace(job, teachers={name: spec})
    needed = [need for need in preflight.needs(alone) if need.setting != preflight.WORKER_SETTINGS]
    verdict = preflight.fit(needed, cluster.nodes(free=False))
    if not verdict.fits:
        raise ResourceError(verdict.text)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = int(job.launch.start_timeout_s)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    builder: Any = Builder
    reserved: dict[str, Any] = {"num_cpus": spec.cpus} | ({"num_gpus": spec.gpus} if spec.gpus else {})
    reserved |= {"resources": dict(spec.resources)} if spec.resources else {}
    shards = [{"epoch": p.epoch, "shard": p.shard} for p in places]
    rows = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
        builder,
        fn_constructor_kwargs={"job": job, "name": name, "folder": str(folder), "header": header, "known": known},
        compute=ray.data.ActorPoolStrategy(size=min(spec.replicas, len(places))),
        runtime_env=cluster.role_env(job, spec.gpus),
        **reserved,
    )
    try:
        for row in rows.iter_rows():
            yield Place(name, int(row["epoch"]), int(row["shard"])), json.loads(row["marker"])
    except RayError as error:
        raise original(error, f"Teacher {name!r}") from None
    except TimeoutError:
        raise ResourceError(
            f"Teacher {name!r}: its replicas were not ready within {job.launch.start_timeout_s:g} s. Is something else using "
            "the cluster? `ray status` shows it; launch.start_timeout_s waits longer."
        ) from None
