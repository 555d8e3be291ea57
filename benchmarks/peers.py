"""What an exchange among peers costs.

real         peers on CIFAR-10 that teach each other by dml, beside the same peers that do not
simulated    2 to 32 peers whose step is a sleep of 200 ms, on a ring and all with all; logits of 1000 classes, batch 32
slow         three such peers, one of them three times slower: signals, and weights of which the newest is taken

A home is an actor that holds one process of each company: one peer, or several that share an actor; peers that learn together,
or each alone. The companies take turns of a few steps, so that all see the same machine. Learners, mailboxes and messages are
those of a run (raykd/launch/peers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gate import Gate, RowFailed, Segment
from benchmarks.measure import WARM_UP, Figure
from benchmarks.scene import Scene
from benchmarks.scene import job as scene_job
from benchmarks.sleepers import BATCH
from raykd import Data, Job, Loss, Training
from raykd.config import Exchange, Launch, Peer, Student
from raykd.exchange.mailbox import Mailbox
from raykd.launch import assembly, peering
from raykd.launch.cluster import NAMESPACE
from raykd.launch.online import Group, boxes_of, members
from raykd.resolve import resolve
from raykd.schemes.online import learn_together

MODELS = {  # what each actor holds
    "20, 20": (("crd_resnet20",), ("crd_resnet20",)),
    "20, 14": (("crd_resnet20",), ("crd_resnet14",)),
    "20, 20, 14, 14": (("crd_resnet20",), ("crd_resnet20",), ("crd_resnet14",), ("crd_resnet14",)),
    "20 + 14, 20 + 14": (("crd_resnet20", "crd_resnet14"),) * 2,
}
QUICK_MODELS = ("20, 14",)
SIZES, QUICK_SIZES = (2, 4, 8, 16, 32), (2, 4)
STEP_S, SLOW_S = 0.2, 0.6
WEIGHTS = 3_500_000  # of a MobileNetV2
RENEWED = 10  # steps between two versions of the weights
STEP_GOAL, SLOW_GOAL = 1.05, 0.97
PATIENCE_S = 600.0
ALONE = "alone"
BUDGETS = {"peers": (6, 12), "exchange": (3, 8), "slow": (4, 20)}  # row -> rounds, steps a turn
QUICK_BUDGETS = {"peers": (3, 4), "exchange": (2, 5), "slow": (2, 10)}


@dataclass(frozen=True)
class Company(Group):
    """A group whose i-th process lives in the i-th home."""

    @property
    def processes(self) -> dict[str, tuple[str, ...]]:
        """Process -> its peers."""
        return peering.together(self.job)

    def actor(self, process: str, rank: int) -> str:  # noqa: ARG002
        """Name of that home."""
        return home(list(self.processes).index(process))


def home(place: int) -> str:
    """Name of an actor."""
    return f"benchmark-home-{place}"


class Home:
    """An actor with one process of each company."""

    def __init__(self) -> None:
        self._boxes: dict[str, Mailbox] = {}
        self._pipes: dict[str, Connection] = {}

    async def message(self, owner: str, step: int, listener: str, after: int | None) -> Any:
        """A peer's message, when it is there."""
        return await self._boxes[owner].when_there(step, listener, after)

    async def leave(self, owner: str, listener: str) -> None:
        """A listener takes nothing from a peer any more."""
        self._boxes[owner].leave(listener)

    async def join(self, company: Company, process: str) -> None:
        """Makes the mailboxes, before anybody asks for them."""
        self._boxes |= boxes_of(company, company.processes[process])

    async def start(self, company: Company, process: str) -> None:
        """Starts the peers of a process; returns when they stand before their first step."""
        self._pipes[process], theirs = multiprocessing.Pipe()
        names = company.processes[process]
        threading.Thread(target=_train, args=(company, names, self._boxes, theirs), daemon=True).start()
        await self._received(process)

    async def turn(self, process: str, steps: int) -> Segment:
        """Some steps of a process."""
        self._pipes[process].send(steps)
        found: Segment = await self._received(process)
        return found

    async def end(self, process: str) -> None:
        """Ends a process where it is."""
        self._pipes[process].send(None)
        await self._received(process)

    async def _received(self, process: str) -> Any:
        found = await asyncio.get_running_loop().run_in_executor(None, self._pipes[process].recv)
        if isinstance(found, str):
            raise RowFailed(f"{process}: {found}")
        return found


def measure(
    row: str, scene: Scene, quick: bool, rounds: int | None = None, steps: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the lines of one row of the command line: `peers`, `exchange` or `slow`; the last two need no data."""
    usual = (QUICK_BUDGETS if quick else BUDGETS)[row]
    budget = rounds or usual[0], steps or usual[1]
    if row == "peers":
        return real(scene, QUICK_MODELS if quick else tuple(MODELS), *budget)
    return simulated(QUICK_SIZES if quick else SIZES, *budget) if row == "exchange" else slow(*budget)


class _Over(Exception):
    """The benchmark has ended."""


def _train(company: Company, names: tuple[str, ...], boxes: Mapping[str, Mailbox], pipe: Connection) -> None:
    """The peers of one process, from their start to their end; a thread of its home."""
    gate, asked = Gate(pipe), itertools.count()

    def paced() -> bool:  # asked by each before its step, in turn
        if next(asked) % len(names) == 0 and gate():
            raise _Over
        return False

    try:
        trainings, links = members(company, names, 0, 1, boxes, should_stop=paced)
        edges = [edge for link in links.values() for edge in link.edges.values()]
        gate.probe = lambda: {
            "bytes_out": sum(link.sent["bytes_out"] for link in links.values()),
            **{key: sum(getattr(e, key) for e in edges) for key in ("wait_s", "messages", "bytes_in")},
        }
        learn_together(trainings, links)
    except _Over:
        pipe.send(None)
    except BaseException:
        pipe.send(traceback.format_exc())


Turns = Mapping[str, list[list[Segment]]]  # company -> round -> process


def turns(homes: Sequence[Any], jobs: Mapping[str, Job], rounds: int, steps: Mapping[str, Sequence[int]]) -> Turns:
    """Companies take turns.

    Args:
        homes: at least as many as processes of a company.
        jobs: company -> its job; the names of peers and actors differ between companies.
        rounds: turns of each company.
        steps: company -> steps a turn that count, of each process.

    Raises:
        RowFailed: a peer ended with an error.
    """
    found: dict[str, list[list[Segment]]] = {kind: [] for kind in jobs}
    with tempfile.TemporaryDirectory(prefix="raykd-peers-") as place:
        companies = {kind: _company(job, Path(place) / kind) for kind, job in jobs.items()}
        for company in companies.values():
            for call in ("join", "start"):
                _all(getattr(h, call).remote(company, name) for h, name in zip(homes, company.processes))
        for _ in range(rounds):
            for kind, company in companies.items():
                counts = [WARM_UP + n for n in steps[kind]]
                found[kind].append(_all(h.turn.remote(name, n) for h, name, n in zip(homes, company.processes, counts)))
        for company in companies.values():
            _all(h.end.remote(name) for h, name in zip(homes, company.processes))
    return found


def _company(job: Job, folder: Path) -> Company:
    known = assembly.facts(job)
    return Company(job, peering.parts(job, known), known, folder)


def _all(refs: Iterator[Any]) -> list[Any]:
    import ray

    found: list[Any] = ray.get(list(refs), timeout=PATIENCE_S)
    return found


@contextlib.contextmanager
def homes(count: int) -> Iterator[list[Any]]:
    """A Ray cluster of its own with as many homes."""
    import ray

    from raykd.launch import cluster

    with cluster.here(num_cpus=max(2, count)):  # so that Ray starts as many processes
        make = ray.remote(Home)
        there = [
            make.options(name=home(i), namespace=NAMESPACE, num_cpus=0, max_concurrency=1000).remote() for i in range(count)
        ]
        _all(h.__ray_ready__.remote() for h in there)  # else the first companies are timed while the other processes start
        yield there


def step_s(segment: Segment) -> float:
    """Mean seconds of the steps that count; of all peers of the process, one after the other."""
    return statistics.fmean(segment.seconds[WARM_UP:])


def a_step(segments: Sequence[Segment], counter: str) -> float:
    """A counter's growth in a step of one process, on average."""
    return statistics.fmean(s.counters[counter] / len(s.seconds) for s in segments)


def real(scene: Scene, models: Sequence[str], rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Peers on real images, on homes of their own when alone; yields a row a choice of models."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = {m: sum(map(len, MODELS[m])) for m in models}
    with homes(max(counts.values())) as there:
        for chosen, count in counts.items():
            jobs = {kind: _real_job(scene, MODELS[chosen], kind) for kind in (ALONE, "together")}
            found = turns(there, jobs, rounds, dict.fromkeys(jobs, [steps] * count))
            yield _real_row(chosen, count, cores, found)


def _real_job(scene: Scene, models: Sequence[Sequence[str]], kind: str) -> Job:
    plain = scene_job(scene, None)
    training = dataclasses.replace(plain.training, grad_norms_every=0)  # else one of a turn's few steps has two backwards more
    peers = {
        f"{kind}{i}{j}": Peer(model=model, actor=None if kind == ALONE else f"{kind}{i}")
        for i, inside in enumerate(models)
        for j, model in enumerate(inside)
    }
    losses = {} if kind == ALONE else {"dml": Loss("dml")}
    peer = dataclasses.replace(plain, name="peers", student=Student(), peers=peers, losses=losses, ce_weight=1.0)
    return resolve(dataclasses.replace(peer, training=training))


def _real_row(models: str, count: int, cores: int, found: Turns) -> dict[str, Any]:
    """Medians over rounds; the bound is the slowest peer alone, or the work of all shared by the cores where they are fewer."""
    alone = [max(map(step_s, own)) for own in found[ALONE]]
    cpu = [[len(own) * a_step(own, "cpu_s") for own in found[kind]] for kind in (ALONE, "together")]
    work = [total / cores for total in cpu[0]]
    together = [max(map(step_s, own)) for own in found["together"]]
    ratio = Figure.of([a / b for a, b in zip(together, alone if count <= cores else work)])
    away = [1 - a_step(own, "cpu_s") / statistics.fmean(map(step_s, own)) for own in found[ALONE]] if count <= cores else []
    return {
        "models": models,
        "peers": count,
        "cores": cores,
        "alone_ms": _ms(alone),
        "work_ms": _ms(work),
        "together_ms": _ms(together),
        "ratio": vars(ratio),
        "met": ratio.median <= STEP_GOAL,
        "cpu_ratio": statistics.median(b / a for a, b in zip(*cpu)),
        "wait_share": statistics.median(a_step(own, "wait_s") / t for own, t in zip(found["together"], together)),
        "stolen": max(statistics.fmean(away), 0.0) if away else None,
    }


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    return vars(Figure.of([1e3 * s for s in seconds]))


def simulated(sizes: Sequence[int], rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Peers that sleep, in synchronous exchange; yields a row a size and graph."""
    with homes(max(sizes)) as there:
        for size in sizes:
            seconds = [STEP_S] * size
            jobs = {
                ALONE: napping(ALONE, seconds, Exchange()),
                "ring": napping("ring", seconds, Exchange(graph="ring")),
                "all": napping("all", seconds, Exchange(graph="all")),
            }
            found = turns(there, jobs, rounds, dict.fromkeys(jobs, [steps] * size))
            for graph in ("ring", "all"):
                yield _simulated_row(size, graph, found)


def _simulated_row(size: int, graph: str, found: Turns) -> dict[str, Any]:
    """Beside the same peers alone: what a step takes longer, and CPU time that each peer's process uses more."""
    pairs = list(zip(found[graph], found[ALONE]))
    alone = [statistics.fmean(map(step_s, own)) for own in found[ALONE]]
    longer = [statistics.fmean(map(step_s, own)) - a for (own, _), a in zip(pairs, alone)]
    cpu = [a_step(own, "cpu_s") - a_step(other, "cpu_s") for own, other in pairs]
    return {
        "peers": size,
        "graph": graph,
        "messages": size * statistics.fmean(a_step(own, "messages") for own, _ in pairs),
        "bytes_out": statistics.fmean(a_step(own, "bytes_out") for own, _ in pairs),
        "alone_ms": _ms(alone),
        "longer_ms": _ms(longer),
        "longer": statistics.median(x / a for x, a in zip(longer, alone)),
        "cpu_ms": _ms(cpu),
    }


def slow(rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Three peers, the last three times slower; yields a row a mode of exchange: the throughput of the others / alone."""
    seconds = [STEP_S, STEP_S, SLOW_S]
    jobs = {
        ALONE: napping(ALONE, seconds, Exchange(), WEIGHTS),
        "signals": napping("signals", seconds, Exchange(), WEIGHTS),
        "newest": napping("newest", seconds, Exchange(what="weights", staleness="newest", every=RENEWED), WEIGHTS),
    }
    apart = [steps, steps, max(1, round(steps * STEP_S / SLOW_S))]
    counts = {ALONE: apart, "signals": [steps] * 3, "newest": apart}
    with homes(len(seconds)) as there:
        found = turns(there, jobs, rounds, counts)
    for kind in ("signals", "newest"):
        rates = [[1 / statistics.fmean(map(step_s, own[:-1])) for own in found[k]] for k in (kind, ALONE)]
        ratio = Figure.of([a / b for a, b in zip(*rates)])
        yield {
            "mode": kind,
            "step_ms": _ms([1 / rate for rate in rates[0]]),
            "alone_ms": _ms([1 / rate for rate in rates[1]]),
            "ratio": vars(ratio),
            "met": ratio.median >= SLOW_GOAL if kind == "newest" else None,
            "bytes_out": statistics.fmean(a_step(own[:-1], "bytes_out") for own in found[kind]),
        }


def napping(kind: str, seconds: Sequence[float], exchange: Exchange, weights: int = 0) -> Job:
    """The job of peers that sleep so long in each step; images are small, as they are not exchanged."""
    nap = "benchmarks.sleepers:napper"
    return resolve(
        Job(
            name=f"naps-{kind}",
            data=Data(kind="benchmarks.sleepers:noise", train="train", num_classes=1000, size=(8, 8), normalise="imagenet"),
            peers={f"{kind}{i}": Peer(model=nap, options={"seconds": s, "weights": weights}) for i, s in enumerate(seconds)},
            losses={} if kind == ALONE else {"listen": Loss("benchmarks.sleepers:listen_loss")},
            exchange=exchange,
            ce_weight=1.0,
            training=Training(
                batch_size=BATCH,
                epochs=10**6,
                scheduler="constant",
                eval_every=10**6,
                checkpoint_every=10**9,
                grad_norms_every=0,
            ),
            launch=Launch(threads=1),
        )
    )


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws what `exchange` found over the number of peers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(drawing)
    titles = {"longer_ms": "a step takes longer by, ms", "cpu_ms": "CPU a step of each peer, ms"}
    for axes, (key, title) in zip(drawing.subplots(1, 2), titles.items()):
        for graph, mark in (("ring", "o-"), ("all", "s-")):
            own = [row for row in found if row["graph"] == graph]
            axes.plot([row["peers"] for row in own], [max(row[key]["median"], 0.1) for row in own], mark, label=graph)
        axes.set(xscale="log", yscale="log", xlabel="peers", title=title)
        axes.set_xticks(sorted({row["peers"] for row in found}), labels=sorted({row["peers"] for row in found}), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    drawing.savefig(path, dpi=110)
