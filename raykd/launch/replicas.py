"""Teacher replicas on Ray actors: started by the driver, owned by it, gone with it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raykd.config import Job
from raykd.data.splits import open_data
from raykd.errors import RaykdError, ResourceError, SourceError
from raykd.exchange.asking import Asks
from raykd.exchange.codec import Reply
from raykd.exchange.pool import original
from raykd.launch.assembly import groups, make_committee, pooled
from raykd.launch.cluster import NAMESPACE, role_env
from raykd.launch.measuring import PATIENCE, Ballot, ballot, logits_of, num_parts, score
from raykd.launch.measuring import accuracies as accuracies_of
from raykd.roles.evaluator import Counts
from raykd.roles.network import Facts

IDLE = "Is something else using the cluster? `ray status` shows it"


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
        return await self._reply(self._committee.answer, fields, asks)

    async def input_grad(self, images: np.ndarray, asks: Asks, cotangents: dict[str, dict[str, np.ndarray]]) -> Reply:
        """The gradient at float images of a loss on the signals asked for."""
        return await self._reply(self._committee.input_grad, images, asks, cotangents)

    async def _reply(self, made_by: Callable[..., Reply], *given: Any) -> Reply:
        self._queue += 1
        try:
            reply = await asyncio.get_running_loop().run_in_executor(self._thread, made_by, *given)
        finally:
            self._queue -= 1
        reply.queue = self._queue
        return reply

    async def logits(self, teacher: str, split: str, part: int, parts: int) -> np.ndarray:
        """Logits [n c] of a teacher on every `parts`-th batch of a split."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._logits, teacher, split, part, parts)

    def _logits(self, teacher: str, split: str, part: int, parts: int) -> np.ndarray:
        dataset = open_data(self._job.data, split, self._job.data_seed)
        return logits_of(self._committee.teachers[teacher].logits, dataset, part, parts)

    async def score(self, who: Ballot, split: str, part: int, parts: int, refs: dict[str, list[Any]], timeout_s: float) -> Any:
        """Right answers on one part, by logits of any replicas; the name of the first teacher whose replica was lost."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, score_part, self._job, who, split, part, parts, refs, timeout_s)


def score_part(
    job: Job, who: Ballot, split: str, part: int, parts: int, refs: dict[str, list[Any]], timeout_s: float
) -> dict[str, Counts] | str:
    """Counts of one part; the name of the first teacher whose replica was lost."""
    logits = {}
    for name, (ref,) in refs.items():
        try:
            logits[name] = ray.get(ref, timeout=timeout_s)
        except (RayTaskError, GetTimeoutError):
            raise
        except RayError:
            return name
    return score(who, open_data(job.data, split, job.data_seed), logits, part, parts)


def start(job: Job, known: Facts) -> dict[str, list[Any]]:
    """Starts all replicas of all pooled teachers and waits until their models are loaded.

    Raises:
        ResourceError: they were not placed in time. ModelError and others: as the teacher raised them.
    """
    run = uuid.uuid4().hex[:8]
    handles: dict[str, list[Any]] = {}
    for name, members in groups(job).items():
        if pooled(job.teachers[members[0]]):
            names = [f"{job.name}-{run}:{name}:{i}" for i in range(job.teachers[members[0]].replicas)]
            handles[name] = [_actor(job, members, own).remote(job, members, known) for own in names]
    for name, replicas in handles.items():
        try:
            until_ready(job, replicas, f"Teacher {name!r}", f"{len(replicas)} replicas", IDLE)
        except RaykdError:
            stop(handles)
            raise
    return handles


def until_ready(job: Job, actors: list[Any], who: str, what: str, remedy: str) -> None:
    """Waits until all of these actors have loaded what they hold.

    Raises:
        ResourceError: they were not placed in time. ModelError and others: as one of them raised them.
    """
    try:
        ray.get([actor.ready.remote() for actor in actors], timeout=job.launch.start_timeout_s)
    except GetTimeoutError:
        raise ResourceError(
            f"{who}: {what} were not ready within {job.launch.start_timeout_s:g} s. "
            f"{remedy}; launch.start_timeout_s waits longer."
        ) from None
    except RayError as error:
        raise original(error, who) from None


def stop(handles: dict[str, list[Any]]) -> None:
    """Kills all replicas."""
    for replicas in handles.values():
        for replica in replicas:
            ray.kill(replica)


def accuracies(job: Job, known: Facts, handles: Mapping[str, list[Any]], split: str) -> dict[str, dict[str, Any]]:
    """Accuracy of every teacher and of the ensemble (""): see measuring. Replicas share the images, and compare logits with the
    labels; what a replica was doing when it died is done by the next one. A teacher that is not in a pool is loaded once more,
    in a task, to be measured.

    Raises:
        SourceError: a part could not be measured on any replica.
    """
    who, launch = ballot(job), job.launch
    parts = num_parts(open_data(job.data, split, job.data_seed), max((len(r) for r in handles.values()), default=1))
    homes = {name: source for source, members in groups(job).items() for name in members}
    task = {"num_cpus": launch.cpus, "num_gpus": launch.gpus, "runtime_env": role_env(job, launch.gpus)}
    visiting, scoring = (
        ray.remote(_visit).options(num_returns=parts, **task),
        ray.remote(score_part).options(**task | {"num_gpus": 0}),
    )
    scorers, patience = next(iter(handles.values()), []), PATIENCE * launch.start_timeout_s

    loaded = {
        name: _as_list(visiting.remote(job, name, known, split, parts)) for name in job.teachers if homes[name] not in handles
    }

    def ask(teacher: str, part: int, attempt: int) -> Any:
        if teacher in loaded:
            return loaded[teacher][part]
        replicas = handles[homes[teacher]]
        return replicas[(part + attempt) % len(replicas)].logits.remote(teacher, split, part, parts)

    def compare(part: int, attempt: int) -> Any:
        given = (who, split, part, parts, asked[part], patience)
        if not scorers:
            return scoring.remote(job, *given)
        return scorers[(part + attempt) % len(scorers)].score.remote(*given)

    asked = {part: {name: [ask(name, part, 0)] for name in job.teachers} for part in range(parts)}
    found: dict[int, dict[str, Counts]] = {}
    for attempt in range(launch.retries + 1):
        waiting = {part: compare(part, attempt) for part in asked if part not in found}
        for part, ref in waiting.items():
            answer = _answer(ref, patience + launch.start_timeout_s)
            if isinstance(answer, dict):
                found[part] = answer
            elif answer is not None:
                asked[part][answer] = [ask(answer, part, attempt + 1)]
        if len(found) == parts:
            return accuracies_of([found[part] for part in range(parts)], split)
    raise SourceError(f"Measuring the teachers: replicas were lost {launch.retries + 1} times. Look at their logs.")


def _answer(ref: Any, timeout_s: float) -> Any:
    """Counts, the name of a teacher whose replica was lost, or None where the one that compared was lost."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError:
        raise SourceError(
            f"Measuring the teachers: not done within {timeout_s:g} s. Lower data.eval_limit, or raise launch.start_timeout_s."
        ) from None
    except RayTaskError as error:
        raise original(error, "Measuring the teachers") from None
    except RayError:
        return None


def _visit(job: Job, teacher: str, known: Facts, split: str, parts: int) -> Any:
    """Logits of a teacher that is loaded for this alone, part by part."""
    model = make_committee(job, (teacher,), known).teachers[teacher].logits
    dataset = open_data(job.data, split, job.data_seed)
    found = [logits_of(model, dataset, part, parts) for part in range(parts)]
    return found if parts > 1 else found[0]


def _as_list(refs: Any) -> list[Any]:
    return refs if isinstance(refs, list) else [refs]


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
        enable_task_events=False,  # one a call: the control store would hold a row for each step
        scheduling_strategy="SPREAD",
        runtime_env=role_env(job, gpus),
    )
