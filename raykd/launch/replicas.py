"""Teacher replicas on Ray actors: started by the driver, owned by it, gone with it."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raykd.config import Job
from raykd.data.batches import evaluation_batches
from raykd.data.splits import open_data
from raykd.errors import ResourceError
from raykd.exchange.codec import Reply
from raykd.exchange.pool import original
from raykd.launch.assembly import make_teacher
from raykd.launch.cluster import NAMESPACE
from raykd.roles.evaluator import evaluate
from raykd.roles.losses import Plan
from raykd.roles.network import Facts


class Replica:
    """One copy of a teacher. Calls queue up in one thread, so that threads and bits are those of the inline teacher."""

    def __init__(self, job: Job, name: str, plans: list[Plan], known: Facts) -> None:
        self._job, self._name = job, name
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._queue = 0
        self._teacher = self._thread.submit(make_teacher, job, name, plans, known).result()

    async def ready(self) -> bool:
        """True once the model is loaded and the thread that answers is free: a hung replica is not ready."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, bool, 1)

    async def answer(self, fields: dict[str, Any]) -> Reply:
        """Encoded signals of one batch."""
        self._queue += 1
        try:
            reply = await asyncio.get_running_loop().run_in_executor(self._thread, self._teacher.answer, fields)
        finally:
            self._queue -= 1
        reply.queue = self._queue
        return reply

    async def accuracy(self, split: str, part: int, parts: int) -> tuple[float, float, int, bool]:
        """(right at 1, right at 5, images, top-5 is meaningful) on every `parts`-th slice of a split."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._measure, split, part, parts)

    def _measure(self, split: str, part: int, parts: int) -> tuple[float, float, int, bool]:
        dataset = open_data(self._job.data, split)
        found = evaluate(self._teacher.logits, evaluation_batches(dataset, 128, rank=part, world=parts))
        top5 = found.top5 if found.top5 is not None else 0.0
        return found.top1 * found.count, top5 * found.count, found.count, found.top5 is not None


def start(job: Job, plans: list[Plan], known: Facts) -> dict[str, list[Any]]:
    """Starts all replicas of all pooled teachers and waits until their models are loaded.

    Raises:
        ResourceError: they were not placed in time. ModelError and others: as the teacher raised them.
    """
    run = uuid.uuid4().hex[:8]
    handles: dict[str, list[Any]] = {}
    for name, spec in job.teachers.items():
        if spec.placement == "pool":
            names = [f"{job.name}-{run}:{name}:{i}" for i in range(spec.replicas)]
            handles[name] = [_actor(job, name, own).remote(job, name, plans, known) for own in names]
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


def accuracy(name: str, replicas: list[Any], split: str, retries: int, timeout_s: float) -> dict[str, Any]:
    """Accuracy of one teacher, its replicas sharing the images: {"top1", "top5", "count", "split"}.

    A part whose replica dies is measured by the next one.

    Raises:
        SourceError: a part could not be measured on any replica.
    """
    count = len(replicas)
    parts = [(i, replicas[i].accuracy.remote(split, i, count)) for i in range(count)]
    found = [_part(name, replicas, split, part, ref, retries, timeout_s) for part, ref in parts]
    top1, top5, images = (sum(f[i] for f in found) for i in range(3))
    return {"top1": top1 / images, "top5": top5 / images if found[0][3] else None, "count": int(images), "split": split}


def _part(name: str, replicas: list[Any], split: str, part: int, ref: Any, retries: int, timeout_s: float) -> Any:
    for retry in range(1, retries + 2):
        try:
            return ray.get(ref, timeout=timeout_s)
        except RayError as error:
            if isinstance(error, RayTaskError) or retry > retries:
                raise original(error, f"Measuring teacher {name!r}") from None
            ref = replicas[(part + retry) % len(replicas)].accuracy.remote(split, part, len(replicas))
    return None


def _actor(job: Job, name: str, own_name: str) -> Any:
    spec = job.teachers[name]
    hidden = {} if spec.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return ray.remote(Replica).options(
        name=own_name,
        namespace=NAMESPACE,
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        resources=dict(spec.resources) or None,
        max_restarts=spec.max_restarts,
        max_task_retries=0,
        max_concurrency=1000,
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(job.launch.threads), **hidden}},
    )
