"""The pool beside simulated devices: students and teachers whose steps are sleeps, payloads of real size.

Every student is a process with a real pool client and `ahead`, raykd's loop over its sources; its step is a sleep of 200 ms
after the signals are there, as on a device that the host waits for. Teachers are real replicas around a sleeping model.
All processes start once; a row of the table uses some of them. In each row the students first run alone, then with the pool.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.sleepers import BATCH
from raykd import Data, Job, Loss, Student, Teacher, Training
from raykd.resolve import resolve

STEP_S = 0.2
SLOW_S, FAST_S = 0.2, 0.15  # a teacher's forward: as long as a step where replicas outnumber students, else shorter
WINDOW = 4  # requests a student keeps in flight, at least: a job's default
WARM_UP = 6  # steps, more than the window
GOAL = 0.97
LOSSES: dict[str, dict[str, Loss]] = {
    "logits": {"kd": Loss("kd")},
    "logits + embedding": {"kd": Loss("kd"), "pkt": Loss("pkt")},
    "logits + 2048x7x7": {"kd": Loss("kd"), "fitnet": Loss("fitnet", layers="stage4")},
}
USUAL, LARGE = "logits + embedding", "logits + 2048x7x7"


@dataclass(frozen=True)
class Row:
    """A row to measure: how many students ask how many replicas for what."""

    students: int
    replicas: int
    payload: str = USUAL
    inputs: str = "pixels"

    @property
    def teacher_s(self) -> float:
        """Seconds of a teacher's forward."""
        return SLOW_S if self.replicas > self.students else FAST_S


ROWS = [Row(s, s * k) for s in (1, 2, 4, 8) for k in (1, 2)]
ROWS += [Row(1, 2, "logits"), Row(1, 2, LARGE), Row(1, 2, USUAL, "recipe")]
QUICK = [Row(1, 1), Row(2, 4), Row(1, 2, LARGE)]


class Pupil:
    """A student on a simulated device; lives on a Ray actor."""

    def __init__(self, job: Job) -> None:
        from raykd.data.batches import make_batch, recipe
        from raykd.data.splits import open_data

        data = open_data(job.data, "train")
        made = [make_batch(data, range(k * BATCH, (k + 1) * BATCH), None, 0, 0) for k in range(4)]
        self._batches = [batch | recipe(batch, 0) for batch in made]

    def alone(self, steps: int) -> dict[str, float]:
        """Seconds and CPU seconds a step without a teacher."""
        return self._loop(steps, {})

    def taught(self, steps: int, source: Any) -> dict[str, float]:
        """The same with a pool, and what its client counted, a step."""
        return self._loop(steps, {"big": source})

    def _loop(self, steps: int, sources: dict[str, Any]) -> dict[str, float]:
        from raykd.schemes.offline import ahead

        cool_down = max((source.window for source in sources.values()), default=0)
        batches: Iterable[Any] = itertools.islice(itertools.cycle(self._batches), WARM_UP + steps + cool_down)
        waits, counts = [], []
        for _, _, seconds in ahead(batches, sources):
            waits.append(seconds)
            time.sleep(STEP_S)
            counts.append(self._counted(sources))
        before, after = counts[WARM_UP - 1], counts[WARM_UP + steps - 1]
        found = {name: (after[name] - before[name]) / steps for name in after}
        return found | {"wait_s": statistics.fmean(waits[WARM_UP : WARM_UP + steps])}

    def _counted(self, sources: dict[str, Any]) -> dict[str, float]:
        stats = {k: v for s in sources.values() for k, v in vars(s.stats).items() if isinstance(v, (int, float))}
        return {"step_s": time.perf_counter(), "cpu_s": time.process_time(), **stats}


def measure(rows: list[Row], steps: int) -> Iterator[dict[str, Any]]:
    """Yields one row of the table after the other; starts and stops a Ray cluster of its own."""
    import ray

    from raykd.launch import cluster

    bandwidth = bytes_a_second()
    with cluster.here(num_cpus=64):
        most = max(row.students for row in rows)
        pupil = ray.remote(Pupil).options(num_cpus=0.5, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
        pupils = [pupil.remote(_job(rows[0], 1)) for _ in range(most)]
        for _, group in itertools.groupby(rows, key=lambda r: (r.payload, r.inputs)):
            yield from _group(list(group), pupils, steps, bandwidth)


def _job(row: Row, replicas: int) -> Job:
    """The job whose teacher is asked; nothing trains it."""
    return resolve(
        Job(
            name="sleepers",
            data=Data(kind="benchmarks.sleepers:noise", train="train", num_classes=1000, normalise="imagenet"),
            student=Student(model="benchmarks.sleepers:sleeper", options={"seconds": STEP_S}),
            teachers={
                "big": Teacher(
                    model="benchmarks.sleepers:sleeper",
                    options={"seconds": FAST_S},
                    replicas=replicas,
                    inputs=row.inputs,  # type: ignore[arg-type]
                )
            },
            losses=LOSSES[row.payload],
            ce_weight=1.0,
            training=Training(batch_size=BATCH),
        )
    )


def _group(rows: list[Row], pupils: list[Any], steps: int, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Rows that ask the same replicas for the same."""
    import ray

    from raykd.launch import assembly, hosts, replicas

    job = _job(rows[0], max(row.replicas for row in rows))
    known = assembly.facts(job)
    plans = assembly.connect(job, known)
    handles = replicas.start(job, known)
    try:
        for row in rows:
            students, teachers = pupils[: row.students], handles["big"][: row.replicas]
            everyone = partial(_everywhere, teachers)
            everyone(prepare, row.teacher_s)
            sources = [_source(hosts.sources(job, plans, known, {"big": teachers})["big"], row, i) for i in range(row.students)]
            alone = ray.get([p.alone.remote(steps) for p in students], timeout=120)
            before = everyone(spent)
            taught = ray.get([p.taught.remote(steps, source) for p, source in zip(students, sources)], timeout=300)
            process, normalising = (sum(b) - sum(a) for a, b in zip(zip(*before), zip(*everyone(spent))))
            answered = len(students) * (WARM_UP + steps + sources[0].window)
            yield _result(row, alone, taught, process / answered, normalising / answered, bandwidth)
    finally:
        replicas.stop(handles)


def _source(source: Any, row: Row, rank: int) -> Any:
    """A student's own pool client, as a worker of a run with as many students would have it."""
    window = max(WINDOW, 2 * row.replicas // row.students)  # a run of its own would ask for 2 * replicas
    return dataclasses.replace(source, window=window, first=rank * row.replicas // row.students)


def _everywhere(replicas: list[Any], call: Any, *arguments: Any) -> list[Any]:
    """Calls `call(replica, *arguments)` inside every replica."""
    import ray

    return ray.get([r.__ray_call__.remote(call, *arguments) for r in replicas], timeout=60)


def prepare(replica: Any, seconds: float) -> None:
    """In a replica: sets the length of the sleep, and from now on counts CPU seconds spent on normalising images."""
    teacher = replica._committee.teachers["big"]
    teacher.model.seconds, replica.normalising_s = seconds, 0.0
    kind = type(teacher.tapped)
    plain = getattr(kind, "plain_inputs", kind.inputs)

    def inputs(tapped: Any, images: Any) -> Any:
        started = time.thread_time()
        found = plain(tapped, images)
        replica.normalising_s += time.thread_time() - started
        return found

    kind.plain_inputs, kind.inputs = plain, inputs  # of the class, since a teacher taps anew what it was never asked for


def spent(replica: Any) -> tuple[float, float]:
    """In a replica: CPU seconds of the process, and of normalising: work that a device would do."""
    return time.process_time(), replica.normalising_s


def bytes_a_second() -> float:
    """Memory bandwidth of one thread's copy, bytes copied."""
    source = np.ones(1 << 26, np.uint8)
    target = np.zeros_like(source)
    started = time.perf_counter()
    for _ in range(4):
        np.copyto(target, source)
    return 4 * source.nbytes / (time.perf_counter() - started)


def _result(
    row: Row,
    alone: list[dict[str, float]],
    taught: list[dict[str, float]],
    teacher_cpu_s: float,
    normalising_s: float,
    bandwidth: float,
) -> dict[str, Any]:
    rate = [sum(1 / found["step_s"] for found in side) for side in (taught, alone)]
    mean = {name: sum(found[name] for found in taught) / len(taught) for name in taught[0]}
    idle = sum(found["cpu_s"] for found in alone) / len(alone)
    ratio, moved = rate[0] / rate[1], mean["bytes_out"] + mean["bytes_in"]
    return {
        "students": row.students,
        "replicas": row.replicas,
        "payload": row.payload,
        "inputs": row.inputs,
        "teacher_ms": 1e3 * row.teacher_s,
        "ratio": ratio,
        "met": ratio >= GOAL,
        "client_cpu_ms": 1e3 * (mean["cpu_s"] - idle),
        "client_own_ms": 1e3 * mean["client_s"],
        "teacher_cpu_ms": 1e3 * teacher_cpu_s,
        "teacher_beside_ms": 1e3 * (teacher_cpu_s - normalising_s),
        "bound_ms": 2 + 1e3 * moved / bandwidth,
        "bytes_out": mean["bytes_out"] / BATCH,
        "bytes_in": mean["bytes_in"] / BATCH,
        "wait_share": mean["wait_s"] / mean["step_s"],
        "retries": mean["retries"],
    }
