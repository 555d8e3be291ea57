"""The two hosts of `learn`: Ray Train workers, and a group of actors in a placement group with torch.distributed.

Both restart the whole group from the newest committed checkpoint when a worker dies, up to `launch.max_failures` times. An
error of ours (bad data, a diverging loss, a stop) is written to the run folder by the worker that met it and is not retried.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayError

from raykd import errors
from raykd.config import Job, Launch
from raykd.errors import DivergenceError, Interrupted, RaykdError, ResourceError, SourceError
from raykd.exchange.pool import PoolSource
from raykd.exchange.sources import Source
from raykd.exchange.stored import StoreSource
from raykd.launch import synthesizers
from raykd.launch.assembly import asks, groups, local_sources
from raykd.roles.losses import Plan
from raykd.roles.network import Facts
from raykd.schemes.offline import Setting, learn

BACKENDS = {True: "cpu:gloo,cuda:nccl", False: "gloo"}
STOP, FATAL, LEARNED = "STOP", "fatal.json", "learned.json"
STOP_POLL_S = 0.1
AGREED = (Interrupted, DivergenceError)  # all ranks raise these at the same step
PLACING_S = 60.0  # how long Ray Train waits for its workers before it counts a failure


class Asked:
    """Whether a stop was asked for: a file in the run folder, looked for at most ten times a second."""

    def __init__(self, folder: Path) -> None:
        self._path, self._next, self._seen = folder / STOP, 0.0, False

    def __call__(self) -> bool:
        """True from the moment the file is seen."""
        now = time.monotonic()
        if not self._seen and now >= self._next:
            self._next = now + STOP_POLL_S
            self._seen = self._path.exists()
        return self._seen


def sources(job: Job, plans: list[Plan], known: Facts, handles: Mapping[str, list[Any]], rank: int = 0) -> dict[str, Source]:
    """Every source of teachers, in the job's order: inline ones are built here, pooled ones are asked."""
    found = local_sources(job, plans, known, pickled=False)
    launch = job.launch
    for name, members in groups(job).items():
        if name not in handles:
            continue
        replicas, spec = handles[name], job.teachers[members[0]]
        pool = PoolSource(
            name,
            replicas,
            asks(job, plans, members),
            inputs=spec.inputs,
            window=max(launch.window, 2 * math.ceil(len(replicas) / launch.workers)),
            timeout_s=launch.request_timeout_s,
            retries=launch.retries,
            restart_s=launch.start_timeout_s,
            in_flight_bytes=launch.in_flight_bytes,
            drop=spec.on_loss == "drop",
            first=rank * len(replicas) // launch.workers,
        )
        kept = found.get(name)
        if isinstance(kept, StoreSource):
            kept.fill_from(pool)
        else:
            found[name] = pool
    return {name: found[name] for name in groups(job)}


def work(rank: int, world: int, config: Mapping[str, Any]) -> None:
    """One worker, on either host: learns, and leaves its result or its error in the run folder."""
    folder = Path(config["folder"])
    if (folder / FATAL).exists():
        return
    job, plans, known = config["job"], config["plans"], config["facts"]
    images, handles = config.get("images", []), config.get("synthesizers", [])
    makers = (lambda _: synthesizers.of_worker(job, handles, rank)) if handles else None
    setting = Setting(plans, known, folder, Asked(folder), images=images, makers=makers)
    try:
        found = learn(
            rank,
            world,
            job,
            sources(job, plans, known, config["handles"], rank),
            setting,
        )
    except RaykdError as error:
        leave_error(folder, error, rank)
        alone = isinstance(error, DivergenceError) and job.synthesis.mode == "bank"  # of this rank's synthesizers
        if world > 1 and (alone or not isinstance(error, AGREED)):
            raise  # so that the others do not wait for this rank
        return
    if rank == 0:
        leave_result(folder, found)


def leave_error(folder: Path, error: RaykdError, rank: int) -> None:
    """Leaves an error in the run folder, for the driver."""
    _write(folder / FATAL, {"type": _base(error), "message": str(error), "rank": rank})


def leave_result(folder: Path, found: Any) -> None:
    """Leaves a result in a run folder, for the driver."""
    _write(folder / LEARNED, found)


def train(job: Job, config: Mapping[str, Any], poll: Callable[[], None]) -> None:
    """Hosts `learn` on Ray Train workers; returns when all have ended.

    Raises:
        SourceError: the group failed more often than `launch.max_failures`.
    """
    import threading

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    launch = job.launch
    resources = {"CPU": launch.cpus, **launch.resources} | ({"GPU": launch.gpus} if launch.gpus else {})
    patience = math.ceil(launch.start_timeout_s / PLACING_S)
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config=dict(config),
        torch_config=TorchConfig(
            backend=BACKENDS[launch.gpus > 0],
            timeout_s=int(launch.collective_timeout_s),
        ),
        scaling_config=ScalingConfig(
            num_workers=launch.workers,
            use_gpu=launch.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=launch.placement_strategy,
        ),
        run_config=RunConfig(
            name=f"train-{os.getpid()}-{time.time_ns()}",
            storage_path=str(Path(config["folder"]) / "host"),
            failure_config=FailureConfig(max_failures=launch.max_failures, controller_failure_limit=patience),  # type: ignore[call-arg]
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            poll()
            thread.join(0.2)
        poll()
    except BaseException:
        (Path(config["folder"]) / STOP).touch()  # the workers must not train on for a driver that has gone
        raise
    if failure and not (Path(config["folder"]) / FATAL).exists():
        raise SourceError(f"The student's workers failed: {last_line(failure[0])} The run can be resumed.") from failure[0]


def _train_loop(config: dict[str, Any]) -> None:
    from ray.train import get_context

    context = get_context()
    work(context.get_world_rank(), context.get_world_size(), config)


class _Worker:
    """One data-parallel student in an actor group."""

    def address(self) -> tuple[str, int]:
        """A free port on this worker's node, for the group's meeting."""
        return free_port()

    def work(self, rank: int, world: int, address: tuple[str, int], config: dict[str, Any]) -> None:
        """Joins the group and learns."""
        with meeting(config["job"].launch, rank, world, address):
            work(rank, world, config)


def free_port() -> tuple[str, int]:
    """This node's address, and a port of it that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), int(probe.getsockname()[1])


@contextlib.contextmanager
def meeting(launch: Launch, rank: int, world: int, address: tuple[str, int]) -> Iterator[None]:
    """torch.distributed among the workers of one student, where it has several."""
    if world == 1:
        yield
        return
    patience = timedelta(seconds=launch.collective_timeout_s)
    place = f"tcp://{address[0]}:{address[1]}"
    dist.init_process_group(BACKENDS[launch.gpus > 0], init_method=place, rank=rank, world_size=world, timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


def actors(job: Job, config: Mapping[str, Any], poll: Callable[[], None]) -> None:
    """Hosts `learn` on actors in a placement group; returns when all have ended.

    Raises:
        ResourceError: the group was not placed in time. SourceError: it failed more often than `launch.max_failures`.
    """
    failures = 0
    while True:
        error = _group(job, dict(config), poll)
        if error is None or (Path(config["folder"]) / FATAL).exists():
            return
        failures += 1
        if not restart(failures, job.launch.max_failures):
            raise SourceError(f"The student's workers failed {failures} times: {last_line(error)} The run can be resumed.")


def restart(failures: int, allowed: int) -> bool:
    """Whether a group that has failed this often is started once more; a negative allowance is without end."""
    return allowed < 0 or failures <= allowed


def _group(job: Job, config: dict[str, Any], poll: Callable[[], None]) -> BaseException | None:
    """One life of the group: None when all workers ended, else what one of them died of."""
    launch = job.launch
    bundle = {"CPU": launch.cpus, **launch.resources} | ({"GPU": launch.gpus} if launch.gpus else {})
    group = ray.util.placement_group([bundle] * launch.workers, strategy=launch.placement_strategy)
    workers: list[Any] = []
    try:
        try:
            ray.get(group.ready(), timeout=launch.start_timeout_s)
        except GetTimeoutError:
            raise ResourceError(
                f"Student workers: {launch.workers} x {bundle} were not placed within {launch.start_timeout_s:g} s. "
                "Lower launch.workers or launch.cpus, or add nodes."
            ) from None
        make = ray.remote(_Worker).options(
            num_cpus=launch.cpus,
            num_gpus=launch.gpus,
            resources=dict(launch.resources) or None,
            scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group),
        )
        workers = [make.remote() for _ in range(launch.workers)]
        try:
            address = ray.get(workers[0].address.remote(), timeout=launch.start_timeout_s)
        except RayError as error:
            return error
        shared = ray.put(config)
        refs = [w.work.remote(rank, len(workers), address, shared) for rank, w in enumerate(workers)]
        return _watch(refs, poll)
    finally:
        for worker in workers:
            ray.kill(worker)
        ray.util.remove_placement_group(group)


def _watch(refs: list[Any], poll: Callable[[], None]) -> BaseException | None:
    waiting = list(refs)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=0.2)
        poll()
        try:
            ray.get(done)
        except RayError as error:
            return error
    return None


def fatal(folder: Path) -> RaykdError | None:
    """The error a worker left in the run folder, as itself."""
    path = folder / FATAL
    if not path.exists():
        return None
    left = json.loads(path.read_text())
    return getattr(errors, left["type"], RaykdError)(left["message"])


def _base(error: RaykdError) -> str:
    return next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)


def _write(path: Path, content: Any) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content))
    os.replace(part, path)


def last_line(error: BaseException) -> str:
    """The last line of an error's message, as a sentence."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1].strip() if lines else type(error).__name__).rstrip(".") + "."
