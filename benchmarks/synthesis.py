"""What it takes to make images where there are none.

makers      images a second by one synthesizer and by two: a DCGAN-like generator learns through a real ResNet-20
bank        1 to 32 synthesizers whose teacher sleeps, beside a student whose step is a sleep of 200 ms: throughput, its waits
gradient    a signal of a ResNet-20 and its gradient at the images, from a replica and from the same process: time and bytes

Synthesizers, bank, feed and sources are those of a run; the student of `bank` is its feed and a sleep, as on a device that the
host waits for. All synthesizers start once; a row of the table uses some of them.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import Figure
from benchmarks.scene import MEAN, STD, Scene
from benchmarks.sleepers import BATCH, CLASSES
from raykd import Data, Job, Loss, Student, Teacher, Training
from raykd.config import Synthesis
from raykd.data.batches import Plan as Order
from raykd.exchange.making import Far
from raykd.launch import assembly, cluster, hosts, replicas, synthesizers
from raykd.resolve import resolve
from raykd.roles.losses import Plan
from raykd.roles.network import Facts
from raykd.schemes.data_free import Banked
from raykd.signals import Signal

SIDE = 32  # px
SIZES, QUICK_SIZES = (1, 2, 4, 8, 16, 32), (1, 2)
STEP_S = 0.2
UPDATES, UPDATE_S = 2, 1.0  # of a simulated synthesizer, for each batch
SLEEPS = UPDATES + 1  # of its teacher for each batch: it says what it sees in the images at last
REAL_BATCH, QUICK_BATCH = 128, 16  # images
REAL_UPDATES, WIDTH = 10, 16
AHEAD, WARM_UP = 2, 2  # batches; of each synthesizer
TIMEOUT_S, RESTART_S = 600.0, 10.0
CAPACITY = 256  # batches
BUDGETS = {"makers": (4, 3), "bank": (1, 8), "gradient": (6, 10)}  # row -> rounds, batches of each maker or calls a round
QUICK_BUDGETS = {"makers": (2, 1), "bank": (1, 2), "gradient": (2, 2)}


def measure(
    row: str, scene: Scene, quick: bool, rounds: int | None = None, steps: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the lines of one row of the command line: `makers`, `bank` or `gradient`; `bank` needs no data."""
    usual = (QUICK_BUDGETS if quick else BUDGETS)[row]
    budget = rounds or usual[0], steps or usual[1]
    batch = QUICK_BATCH if quick else REAL_BATCH
    if row == "makers":
        return makers(scene, batch, *budget)
    return simulated(QUICK_SIZES if quick else SIZES, budget[1]) if row == "bank" else gradient(scene, batch, *budget)


@contextlib.contextmanager
def started(job: Job, known: Facts, plans: list[Plan], cpus: int) -> Iterator[list[Any]]:
    """A Ray cluster of its own with a job's synthesizers."""
    with cluster.here(num_cpus=cpus):
        handles = synthesizers.start(job, plans, known)
        try:
            yield handles
        finally:
            replicas.stop({"": handles})


def real(scene: Scene, batch: int, count: int = 2) -> Job:
    """ResNet-20 teaches on CIFAR-10-sized images that a generator makes for it."""
    return resolve(
        Job(
            name="bench-making",
            data=Data(kind="parquet", num_classes=10, in_channels=3, size=(SIDE, SIDE), normalise="cifar10"),
            student=Student(model="cifar_resnet8"),
            teachers={"big": Teacher(model="cifar_resnet20", weights=_weights(scene), normalise=(MEAN, STD), cpus=0.5)},
            losses={"dafl": Loss("dafl")},
            synthesis=Synthesis(
                mode="bank", synthesizers=count, cpus=0.5, steps=REAL_UPDATES, options={"width": WIDTH, "last": "sigmoid"}
            ),
            training=Training(batch_size=batch, epochs=1),
        )
    )


def _weights(scene: Scene) -> str:
    return str(next(scene.weights.parent.glob("resnet20-*.th")))


def makers(scene: Scene, batch: int, rounds: int, batches: int) -> Iterator[dict[str, Any]]:
    """One synthesizer and two take turns; yields a row for each number: images a second, and CPU time for an image."""
    job = real(scene, batch)
    known = Facts(batch, 10, (3, SIDE, SIDE), "cifar10")
    plans = assembly.connect_images(job, known)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with started(job, known, plans, 4) as handles:
        first = 0
        for turn in range(rounds + 1):  # the first warms up
            for count, own in rates.items():
                seconds, first = made(Far(handles[:count], AHEAD, TIMEOUT_S, RESTART_S), first, batches * count)
                if turn:
                    own.append(batch * batches * count / seconds)
    for count, own in rates.items():
        ratio = Figure.of([b / a for a, b in zip(rates[1], own)])
        yield {
            "makers": count,
            "batch": batch,
            "updates": REAL_UPDATES,
            "images_s": vars(Figure.of(own)),
            "ratio": vars(ratio),
            "batch_bytes": batch * 3 * SIDE * SIDE,
        }


def made(far: Far, first: int, count: int) -> tuple[float, int]:
    """Seconds in which so many batches are made, and the number of the next; all makers are idle before and after."""
    begun = time.perf_counter()
    numbers = iter(range(first, first + count))
    came = 0
    while came < count:
        while len(far.asked) < far.room and (number := next(numbers, None)) is not None:
            far.ask(number, None)
        came += len(far.take(True))
    return time.perf_counter() - begun, first + count


def sleeping(count: int, update_s: float = UPDATE_S) -> Job:
    """The job of synthesizers whose teacher sleeps: free pixels, next to nothing to compute."""
    return resolve(
        Job(
            name="naps-made",
            data=Data(kind="parquet", num_classes=CLASSES, in_channels=3, size=(SIDE, SIDE), normalise="imagenet"),
            student=Student(model="benchmarks.sleepers:sleeper", options={"seconds": STEP_S}),
            teachers={"big": Teacher(model="benchmarks.sleepers:sleeper", options={"seconds": update_s})},
            losses={"dafl": Loss("dafl")},
            synthesis=Synthesis(
                mode="bank", synthesizers=count, cpus=0, generator="pixels", steps=UPDATES, ahead=AHEAD, capacity=CAPACITY
            ),
            training=Training(batch_size=BATCH, epochs=1),
        )
    )


def simulated(
    sizes: Sequence[int], batches: int, update_s: float = UPDATE_S, step_s: float = STEP_S
) -> Iterator[dict[str, Any]]:
    """Synthesizers that sleep fill a bank from which a student that sleeps draws; yields a row a number of them."""
    job = sleeping(max(sizes), update_s)
    known = Facts(BATCH, CLASSES, (3, SIDE, SIDE), "imagenet")
    plans = assembly.connect_images(job, known)
    with started(job, known, plans, max(2, *sizes)) as handles:
        for size in sizes:
            far: Any = Far(handles[:size], AHEAD, TIMEOUT_S, RESTART_S)
            with tempfile.TemporaryDirectory(prefix="raykd-bank-") as place:
                learner: Any = SimpleNamespace(step_count=0, rank=0, student=None)
                feed = Banked(job, plans, known, learner, far, Order(BATCH * 10**6, BATCH, 0), Path(place))
                yield _beside(feed, size, batches, step_s) | {"batch_s": SLEEPS * update_s, "step_s": step_s}
            while far.asked:
                far.take(True)  # of the next row nobody is busy


def _beside(feed: Banked, size: int, batches: int, step_s: float) -> dict[str, Any]:
    """Steps of the student until each synthesizer has made its batches; what was counted once all were at work."""
    marks: list[tuple[float, float, int, int]] = []  # time, CPU time, batches made, steps; first when all have warmed up
    waits: list[float] = []
    wanted = WARM_UP * size
    for step, _ in enumerate(feed.epoch(0)):
        said = feed.report()
        if marks:
            waits.append(said["bank_wait_s"])
        if feed._made >= wanted:
            marks.append((time.perf_counter(), time.process_time(), feed._made, step))
            wanted = feed._made + 1
            if feed._made >= marks[0][2] + batches * size:
                break
        time.sleep(step_s)
        feed.learner.step_count += 1
    (begin, cpu, made, first), (end, cpu_end, made_end, last) = marks[0], marks[-1]
    steps, seconds = last - first, end - begin
    return {
        "makers": size,
        "batches_s": (made_end - made) / seconds,
        "efficiency": (made_end - made) / seconds * SLEEPS * _update_s(feed) / size,
        "steps": steps,
        "step_ms": 1e3 * seconds / steps,
        "busy_share": steps * step_s / seconds,
        "wait_share": sum(waits) / seconds,
        "wait_ms_most": 1e3 * max(waits),
        "cpu_ms": 1e3 * (cpu_end - cpu) / steps,
    }


def _update_s(feed: Banked) -> float:
    return float(feed.job.teachers["big"].options["seconds"])


def gradient(scene: Scene, batch: int, rounds: int, calls: int) -> Iterator[dict[str, Any]]:
    """Calls to a teacher here and to its replica take turns; yields a row for each place: forward and backward of one call."""
    job = real(scene, batch)
    known = Facts(batch, 10, (3, SIDE, SIDE), "cifar10")
    plans = assembly.connect(job, known)
    inline = resolve(job.replace(**{"teachers.big.placement": "inline"}))
    images = torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    with cluster.here(num_cpus=4):
        handles = replicas.start(job, known)
        try:
            sources = {
                "here": assembly.local_sources(inline, plans, known, pickled=False)["big"],
                "replica": hosts.sources(job, plans, known, handles)["big"],
            }
            found: dict[str, list[tuple[float, float, torch.Tensor]]] = {place: [] for place in sources}
            for _ in range(rounds + 1):
                for place, source in sources.items():
                    times = [call(source, images) for _ in range(calls)]
                    forward, backward = (statistics.fmean(seconds) for seconds in list(zip(*times))[:2])
                    found[place].append((forward, backward, times[-1][2]))
            apart = found["here"][0][2] - found["replica"][0][2]
            yield from _places(sources, found, batch, rounds, calls, float(apart.norm() / found["here"][0][2].norm()))
        finally:
            replicas.stop(handles)


def call(source: Any, images: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Seconds of the forward and of the backward, and the gradient."""
    from raykd.exchange.through import through

    given = images.clone().requires_grad_()
    begun = time.perf_counter()
    logits = through({"big": source}, given, {"big": (Signal("logits"),)})["big"]["logits"]
    between = time.perf_counter()
    logits.logsumexp(1).sum().backward()
    assert given.grad is not None
    return between - begun, time.perf_counter() - between, given.grad


def _places(sources: Any, found: Any, batch: int, rounds: int, calls: int, error: float) -> Iterator[dict[str, Any]]:
    count = (rounds + 1) * calls
    whole = {place: [a + b for a, b, _ in own[1:]] for place, own in found.items()}
    for place, source in sources.items():
        forward, backward = ([1e3 * times[i] for times in found[place][1:]] for i in range(2))
        sent = {
            f"{name}_{way}": getattr(stats, f"bytes_{way}") / count / batch
            for name, stats in (("forward", source.stats), ("backward", source.backward))
            for way in ("out", "in")
        }
        yield {
            "place": place,
            "batch": batch,
            "forward_ms": vars(Figure.of(forward)),
            "backward_ms": vars(Figure.of(backward)),
            "ratio": vars(Figure.of([a / b for a, b in zip(whole[place], whole["here"])])),
            "client_ms": 1e3 * (source.stats.client_s + source.backward.client_s) / count,
            "error": error,
            **sent,
        }
