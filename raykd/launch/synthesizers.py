"""Synthesizers on Ray actors: started by the driver, owned by it, gone with it."""

from __future__ import annotations

import uuid
from typing import Any

import ray
import torch

from raykd.config import Job
from raykd.errors import RaykdError
from raykd.exchange.bank import MadeBatch
from raykd.exchange.making import Far
from raykd.exchange.sources import InlineSource, Source
from raykd.launch.assembly import asks, groups, make_committee
from raykd.launch.cluster import NAMESPACE, role_env
from raykd.launch.replicas import until_ready
from raykd.roles.losses import Plan
from raykd.roles.network import Facts, pick_device
from raykd.roles.process import settle
from raykd.schemes.data_free import Snapshot, Workshop


class Maker:
    """One synthesizer: a generator, teachers of its own, a student as it was."""

    def __init__(self, job: Job, plans: list[Plan], known: Facts, number: int) -> None:
        settle(job.launch.threads)
        device = pick_device(job.launch.device, job.synthesis.gpus)
        self._work = Workshop(job, plans, known, own_sources(job, known), device, number)

    def ready(self) -> bool:
        """True once it is loaded."""
        return True

    def make(self, number: int, version: int, weights: dict[str, Any] | None) -> MadeBatch:
        """A batch for the bank."""
        student = None
        if weights is not None:
            student = Snapshot(version, {name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        return self._work.make(number, student)

    def state(self) -> dict[str, Any]:
        """What it has learnt and remembers, for a process that may have no GPU."""
        return on_cpu(self._work.synthesizer.state())

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from `state()`."""
        self._work.synthesizer.load_state(state)


def on_cpu(value: Any) -> Any:
    """The same dicts, lists and tuples with their tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: on_cpu(inner) for name, inner in value.items()}
    return type(value)(map(on_cpu, value)) if isinstance(value, (list, tuple)) else value


def own_sources(job: Job, known: Facts) -> dict[str, Source]:
    """The job's teachers in this process, each a copy."""
    return {
        name: InlineSource(make_committee(job, members, known), asks(job, [], members)) for name, members in groups(job).items()
    }


def start(job: Job, plans: list[Plan], known: Facts) -> list[Any]:
    """Starts the synthesizers of a job and waits until they are loaded; none where generator and student take turns.

    Raises:
        ResourceError: they were not placed in time. ModelError and others: as a synthesizer raised them.
    """
    spec = job.synthesis
    if not plans or spec.mode != "bank":
        return []
    run = uuid.uuid4().hex[:8]
    make: Any = ray.remote(Maker)
    handles = [
        make.options(
            name=f"{job.name}-{run}:synthesizer:{i}",
            namespace=NAMESPACE,
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            resources=dict(spec.resources) or None,
            max_restarts=spec.max_restarts,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env=role_env(job, spec.gpus),
        ).remote(job, plans, known, i)
        for i in range(spec.synthesizers)
    ]
    try:
        remedy = "Lower synthesis.synthesizers or synthesis.cpus, or add nodes"
        until_ready(job, handles, "Synthesizers", str(spec.synthesizers), remedy)
    except RaykdError:
        stop(handles)
        raise
    return handles


def stop(handles: list[Any]) -> None:
    """Kills them."""
    for handle in handles:
        ray.kill(handle)


def of_worker(job: Job, handles: list[Any], rank: int) -> Far:
    """Those of one of the student's workers."""
    launch = job.launch
    return Far(handles[rank :: launch.workers], job.synthesis.ahead, launch.request_timeout_s, launch.start_timeout_s)
