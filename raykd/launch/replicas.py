"""Teacher replicas on Ray actors: started by the driver, owned by it, gone with it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raykd.config import Job
from raykd.data.splits import open_data
from raykd.errors import ResourceError, SourceError
from raykd.exchange.asking import Asks
from raykd.exchange.codec import Reply
from raykd.exchange.pool import original
from raykd.launch.assembly import groups, make_committee
from raykd.launch.cluster import NAMESPACE
from raykd.launch.measuring import Ballot, ballot, logits_of, num_parts, score
from raykd.launch.measuring import accuracies as accuracies_of
from raykd.roles.network import Facts


class Replica:
    """One copy of a teacher, or of the teachers that share an actor. Calls queue up in one thread, so that threads and bits are
    those of the inline teacher."""

    def __init__(self, job: Job, names: tuple[str, ...], known: Facts) -> None:
        self._job = job
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._queue = 0
        self._committee = self._thread.submit(make_committee, job, names, known).result()

    async def ready(self) -> bool:
        """True once the models are loaded and the thread that answers is free: a hung replica is not ready."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, bool, 1)

    async def answer(self, fields: dict[str, Any], asks: Asks) -> Reply:
        """Encoded signals of one batch."""
        self._queue += 1
        try:
            reply = await asyncio.get_running_loop().run_in_executor(self._thread, self._committee.answer, fields, asks)
        finally:
            self._queue -= 1
        reply.queue = self._queue
        return reply

    async def logits(self, teacher: str, split: str, part: int, parts: int) -> np.ndarray:
        """Logits [n c] of a teacher on every `parts`-th batch of a split."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._logits, teacher, split, part, parts)

    def _logits(self, teacher: str, split: str, part: int, parts: int) -> np.ndarray:
        dataset = open_data(self._job.data, split, self._job.seed)
        return logits_of(self._committee.teachers[teacher].logits, dataset, part, parts)


def start(job: Job, known: Facts) -> dict[str, list[Any]]:
    """Starts all replicas of all pooled teachers and waits until their models are loaded.

    Raises:
        ResourceError: they were not placed in time. ModelError and others: as the teacher raised them.
    """
    run = uuid.uuid4().hex[:8]
    handles: dict[str, list[Any]] = {}
    for name, members in groups(job).items():
        if job.teachers[members[0]].placement == "pool":
            names = [f"{job.name}-{run}:{name}:{i}" for i in range(job.teachers[members[0]].replicas)]
            handles[name] = [_actor(job, members, own).remote(job, members, known) for own in names]
    for name, replicas in handles.items():
        try:
            ray.get([r.ready.remote() for r in replicas], timeout=job.launch.start_timeout_s)
        except GetTimeoutError:
            stop(handles)
            raise ResourceError(
                f"Teacher {name!r}: {len(replicas)} replicas were not ready within {job.launch.start_timeout_s:g} s. "
                "Is something else using the cluster? `ray status` shows it; launch.start_timeout_s waits longer."
            ) from None
        except RayError as error:
            stop(handles)
            raise original(error, f"Teacher {name!r}") from None
    return handles


def stop(handles: dict[str, list[Any]]) -> None:
    """Kills all replicas."""
    for replicas in handles.values():
        for replica in replicas:
            ray.kill(replica)


def accuracies(job: Job, known: Facts, handles: Mapping[str, list[Any]], split: str) -> dict[str, dict[str, Any]]:
    """Accuracy of every teacher and of the ensemble (""): see measuring. Replicas share the images; a part whose replica dies
    is computed by the next one. A teacher that is not in a pool is loaded once more, in a task, to be measured.

    Raises:
        SourceError: a part could not be measured on any replica.
    """
    who, launch = ballot(job), job.launch
    dataset = open_data(job.data, split, job.seed)
    parts = num_parts(dataset, max((len(r) for r in handles.values()), default=1))
    homes = {name: source for source, members in groups(job).items() for name in members}
    visiting = ray.remote(_visit).options(
        num_cpus=launch.cpus, num_gpus=launch.gpus, runtime_env=_runtime_env(job, launch.gpus)
    )

    def ask(teacher: str, part: int, attempt: int) -> Any:
        replicas = handles.get(homes[teacher])
        if replicas is None:
            return visiting.remote(job, teacher, known, split, part, parts)
        return replicas[(part + attempt) % len(replicas)].logits.remote(teacher, split, part, parts)

    scoring = ray.remote(_score).options(num_cpus=0)
    asked = {part: {name: [ask(name, part, 0)] for name in job.teachers} for part in range(parts)}
    waiting = {part: scoring.remote(job, who, split, part, parts, refs, launch.start_timeout_s) for part, refs in asked.items()}
    found: dict[int, Any] = {}
    for attempt in range(1, launch.retries + 2):
        for part, ref in waiting.items():
            try:
                found[part] = ray.get(ref, timeout=2 * launch.start_timeout_s)
            except RayError as error:
                raise original(error, "Measuring the teachers") from None
        lost = {part: answer for part, answer in found.items() if isinstance(answer, str)}
        if not lost:
            return accuracies_of(list(found.values()), split)
        if attempt > launch.retries:
            raise SourceError(
                f"Teacher {next(iter(lost.values()))!r}: could not be measured on any replica; look at their logs."
            )
        for part, teacher in lost.items():
            asked[part][teacher] = [ask(teacher, part, attempt)]
            waiting[part] = scoring.remote(job, who, split, part, parts, asked[part], launch.start_timeout_s)
        waiting = {part: waiting[part] for part in lost}
    raise AssertionError


def _score(job: Job, who: Ballot, split: str, part: int, parts: int, refs: dict[str, list[Any]], timeout_s: float) -> Any:
    """Counts of one part; the name of the first teacher whose replica was lost."""
    logits = {}
    for name, (ref,) in refs.items():
        try:
            logits[name] = ray.get(ref, timeout=timeout_s)
        except RayTaskError:
            raise
        except RayError:
            return name
    return score(who, open_data(job.data, split, job.seed), logits, part, parts)


def _visit(job: Job, teacher: str, known: Facts, split: str, part: int, parts: int) -> np.ndarray:
    """Logits of a teacher that is loaded for this alone."""
    committee = make_committee(job, (teacher,), known)
    return logits_of(committee.teachers[teacher].logits, open_data(job.data, split, job.seed), part, parts)


def _actor(job: Job, names: tuple[str, ...], own_name: str) -> Any:
    specs = [job.teachers[name] for name in names]
    cpus, gpus = max(s.cpus for s in specs), max(s.gpus for s in specs)
    return ray.remote(Replica).options(
        name=own_name,
        namespace=NAMESPACE,
        num_cpus=cpus,
        num_gpus=gpus,
        resources=dict(specs[0].resources) or None,
        max_restarts=specs[0].max_restarts,
        max_task_retries=0,
        max_concurrency=1000,
        scheduling_strategy="SPREAD",
        runtime_env=_runtime_env(job, gpus),
    )


def _runtime_env(job: Job, gpus: float) -> dict[str, Any]:
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {"env_vars": {"OMP_NUM_THREADS": str(job.launch.threads), **hidden}}
