"""Running a job: checks, stages, teachers, students, result. The driver watches; it never touches a tensor.

resolve -> check -> run folder -> connect -> for each stage, the baseline, the job itself:
    pre-flight -> teachers start -> teachers are measured -> learn on a host -> result.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from raykd.config import Branching, Job, Network
from raykd.data.batches import Plan as Order
from raykd.errors import ConfigError, Interrupted, JobFaults
from raykd.launch import assembly, measuring, peering, preflight, stores
from raykd.launch.checks import inspect
from raykd.launch.locking import locked
from raykd.launch.observer import Observer
from raykd.resolve import read, resolve, to_dict, write
from raykd.roles.losses import Plan
from raykd.roles.network import Facts
from raykd.roles.teacher import own_facts
from raykd.schemes.offline import Setting, learn

RESULT, JOB = "result.json", "job.json"
POLL_S = 0.2
RELEASE_S = 10.0


def run(
    job: Job, *, folder: Path | str | None = None, resume: bool = False, observer: Observer | None = None
) -> dict[str, Any]:
    """Runs a job to its end.

    Args:
        job: what to run.
        folder: the run folder; None: a new one, `<runs>/<name>-<number>`.
        resume: continue the run in `folder` (None: the newest of this name) from its last checkpoint.
        observer: hears of the progress; None: nobody.

    Returns:
        The content of result.json: accuracies of teachers and student (shares in [0, 1]), steps, seconds, traffic.

    Raises:
        JobFaults: everything that is wrong with the job, before anything started.
        ResourceError: the cluster cannot hold it. Interrupted: stopped, and resumable. Others of raykd.errors: as they say.
    """
    seen = inspect(job)
    if seen.faults:
        raise JobFaults.of(seen.faults)
    job = seen.job
    place = _folder(job, Path(folder) if folder else None, resume)
    _keep_job(job, place, resume)
    watcher = _Watcher(observer or Observer(), place)
    taken = f"Run folder {place}: another raykd is running in it"
    with locked(place, taken), _backend(job), watcher.signals():  # Ray sets handlers of its own when it connects
        if job.launch.backend == "ray":
            from raykd.launch import cluster

            cluster.require_shared(place)
        return _tree("", job, place, watcher)


def find_folder(job: Job) -> Path | None:
    """The newest run folder of this job's name."""
    found = _numbered(job)
    return found[-1][1] if found else None


class _Watcher:
    """The driver's ear: passes progress on and turns signals into stop files."""

    def __init__(self, observer: Observer, root: Path) -> None:
        self.observer, self.root = observer, root
        self.active: Path | None = None
        self.stopping = False
        self._next = 0.0

    def poll(self) -> None:
        """Lets the observer look, at most five times a second."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + POLL_S
            self.observer.poll()

    def check(self) -> None:
        """Raises Interrupted if a stop was asked for while nothing was training."""
        if self.stopping:
            raise Interrupted(f"Stopped. Resume with --resume {self.root}.")

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """First Ctrl-C or SIGTERM: checkpoint and end. Second Ctrl-C: end now."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping = True
        if self.active is not None:
            (self.active / "STOP").touch()
        self.observer.note("Stopping: a checkpoint is written first. Ctrl-C again to stop at once.")


def _folder(job: Job, folder: Path | None, resume: bool) -> Path:
    if folder is None and resume:
        folder = find_folder(job)
        if folder is None:
            raise ConfigError(f"Resume: no run of {job.name!r} in {job.runs!r}. Leave --resume out to start one.")
    if folder is None:
        return _new_folder(job)
    folder = folder.absolute()
    if resume and not (folder / JOB).is_file():
        raise ConfigError(f"Resume: expected a run folder with a {JOB}, got {folder}. Check the path, or leave --resume out.")
    if not resume and (folder / JOB).exists():
        raise ConfigError(f"Run folder {folder} holds a run already. Resume it with --resume {folder}, or name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Run folder {folder}: cannot be made ({error}). Set `runs` or --folder to a folder you may write."
        ) from None
    return folder


def _new_folder(job: Job) -> Path:
    number = max((n for n, _ in _numbered(job)), default=0)
    while True:
        number += 1
        folder = (Path(job.runs) / f"{job.name}-{number:03d}").absolute()
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run took the number
            continue
        except OSError as error:
            raise ConfigError(f"Run folder {folder}: cannot be made ({error}). Set `runs` to a folder you may write.") from None


def _numbered(job: Job) -> list[tuple[int, Path]]:
    places = Path(job.runs).glob(f"{job.name}-*") if Path(job.runs).is_dir() else []
    tails = [(p.name[len(job.name) + 1 :], p) for p in places]
    return sorted((int(tail), p.absolute()) for tail, p in tails if tail.isdigit())


def _keep_job(job: Job, folder: Path, resume: bool) -> None:
    """Writes job.json, or on resume compares with it: only what says where it runs may differ."""
    if not (resume and (folder / JOB).exists()):
        try:
            write(job, folder / JOB)
        except OSError as error:
            raise ConfigError(
                f"Run folder {folder}: expected one you may write, got {error}. Set `runs` or --folder."
            ) from None
        return
    before, now = (_flat(to_dict(j)) for j in (resolve(read(folder / JOB)), job))
    changed = [p for p in sorted({*before, *now}) if before.get(p) != now.get(p) and not _may_change(p)]
    if changed:
        shown = "; ".join(f"{p}: was {before.get(p)!r}, is {now.get(p)!r}" for p in changed[:6])
        raise ConfigError(f"Resume {folder}: the job has changed ({shown}). Change it back, or start a new run.")


def _may_change(path: str) -> bool:
    """Whether a setting says only where things run, not what comes out."""
    place = re.search(r"(^|\.)teachers\.[^.]+\.(replicas|cpus|gpus|resources|max_restarts|placement|store|fill)(\.|$)", path)
    place = place or re.search(r"(^|\.)peers\.[^.]+\.(cpus|gpus|resources|actor)(\.|$)", path)
    place = place or re.search(r"(^|\.)exchange\.(on_loss|respawns|timeout_s|ahead)$", path)
    makers = "synthesizers|cpus|gpus|resources|max_restarts|ahead|memory_bytes"
    place = place or re.search(rf"(^|\.)synthesis\.({makers})(\.|$)", path)
    launch = ".launch." in f".{path}" and not path.endswith((".workers", ".threads", ".tf32", ".device"))
    return path == "runs" or place is not None or launch


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {p: v for k, inner in value.items() for p, v in _flat(inner, f"{path}.{k}" if path else k).items()}
    return {path: value}


@contextlib.contextmanager
def _backend(job: Job) -> Iterator[None]:
    if job.launch.backend == "local":
        yield
        return
    from raykd.launch import cluster

    with cluster.connected(job):
        yield


def _tree(path: str, job: Job, folder: Path, watcher: _Watcher, beside: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Stages, then the baseline, then the job itself; what is finished is not run again. A stage may use the weights of its own
    stages and of those that ran before it, `beside`."""
    if (folder / RESULT).exists():
        result = json.loads((folder / RESULT).read_text())
        watcher.observer.skip(path, folder, result)
        return result
    folder.mkdir(parents=True, exist_ok=True)
    stages, places = {}, dict(beside or {})
    for name, inner in job.stages.items():
        here = dataclasses.replace(inner.launch, backend=job.launch.backend, address=job.launch.address)
        stage = dataclasses.replace(inner, launch=here)
        place = folder / "stages" / name
        stages[name] = _tree(_join(path, f"stages.{name}"), stage, place, watcher, places)
        places[name] = place
    job = assembly.with_stage_weights(job, places)
    alone = None
    if job.baseline and job.losses:
        found = _tree(_join(path, "baseline"), _alone(job), folder / "baseline", watcher)
        alone = found["peers"] if job.peers else found["student"]
    watcher.check()
    result = _one(path, job, folder, watcher)
    result |= {"baseline": alone, "stages": stages}
    part = folder / f".{RESULT}.{os.getpid()}"
    part.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(part, folder / RESULT)
    watcher.observer.end(path, folder, result)
    return result


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _alone(job: Job) -> Job:
    own = {name: dataclasses.replace(peer, branching=Branching("none")) for name, peer in job.peers.items()}
    student = dataclasses.replace(job.student, branching=Branching("none"))
    return dataclasses.replace(
        job, student=student, teachers={}, peers=own, losses={}, ce_weight=1.0, stages={}, baseline=False
    )


def _one(path: str, job: Job, folder: Path, watcher: _Watcher) -> dict[str, Any]:
    """One training: teachers measured, student taught."""
    if job.peers:
        return _peers(path, job, folder, watcher)
    started = time.time()
    known = assembly.facts(job)
    plans = assembly.connect(job, known)
    stores.require(job, plans, known)
    _begin(path, job, known.num_samples, folder, watcher)
    try:
        host = _local if job.launch.backend == "local" else _on_ray
        measured, learned = host(path, job, plans, known, folder, watcher)
    finally:
        watcher.active = None
    exchange, dropped = learned.pop("exchange"), learned.pop("dropped")
    teachers = {name: measured[name] | ({"dropped_at": dropped[name]} if name in dropped else {}) for name in job.teachers}
    return _head(job, folder, started) | {
        "teachers": teachers,
        "ensemble": measured.get(""),
        "student": {"model": job.student.model, "parameters": _parameters(job.student, known)} | learned,
        "exchange": exchange,
    }


def _begin(path: str, job: Job, samples: int, folder: Path, watcher: _Watcher) -> None:
    """Clears what an earlier start has left, and tells the observer."""
    training = job.training
    steps = Order(samples, training.batch_size or 1, job.data_seed, drop_last=training.drop_last).steps_per_epoch
    for name in ("STOP", "fatal.json", "learned.json"):
        (folder / name).unlink(missing_ok=True)
    watcher.active = folder
    watcher.observer.begin(path, job, folder, training.steps(steps))


def _head(job: Job, folder: Path, started: float) -> dict[str, Any]:
    """What every result says of its run."""
    return {
        "name": job.name,
        "seed": job.seed,
        "folder": str(folder),
        "commit": commit(),
        "hardware": hardware(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)),
        "seconds": round(time.time() - started, 3),
    } | ({"real_data": assembly.real_data(job)} if assembly.tells_of_data(job) else {})


def _peers(path: str, job: Job, folder: Path, watcher: _Watcher) -> dict[str, Any]:
    """One training of peers: teachers measured, if there are any; peers taught by each other; measured together."""
    from raykd.launch import online

    started = time.time()
    known = assembly.facts(job)
    parts = peering.parts(job, known)
    samples = known.num_samples // (len(job.peers) if job.exchange.shards == "disjoint" else 1)
    _begin(path, job, samples, folder, watcher)
    for name in job.peers:
        (folder / online.ROOM / name / "learned.json").unlink(missing_ok=True)
    try:
        host = _peers_here if job.launch.backend == "local" else _peers_on_ray
        group, measured, together, respawned = host(path, job, parts, known, folder, watcher)
    finally:
        watcher.active = None
    found = online.results(group, watcher.root)
    peers: dict[str, Any] = {}
    for name, learned in found.items():
        spec = job.peers[name]
        head = {"model": spec.model, "parameters": _parameters(spec, known)}
        if name in respawned:
            head["respawned"] = respawned[name]
        peers[name] = head | learned
    edges = {f"{source}>{name}": edge for name, own in peers.items() for source, edge in own.pop("edges", {}).items() if source}
    return _head(job, folder, started) | {
        "teachers": {name: measured[name] for name in job.teachers},
        "ensemble": measured.get(""),
        "peers": peers,
        "together": together,
        "edges": edges,
    }


def _peers_here(
    path: str, job: Job, parts: Mapping[str, peering.Part], known: Facts, folder: Path, watcher: _Watcher
) -> tuple[Any, dict[str, Any], Any, dict[str, int]]:
    from raykd.launch import online
    from raykd.launch.hosts import Asked

    group = online.gather(job, parts, known, folder, {})
    models = online.teacher_models(group)
    teachers = _told(path, job, known, measuring.here(job, _teacher_split(job), models) if models else {}, watcher)
    del models
    asked = Asked(folder)

    def should_stop() -> bool:
        watcher.poll()
        return watcher.stopping or asked()

    online.here(group, should_stop)
    return group, teachers, online.measured(group), {}


def _peers_on_ray(
    path: str, job: Job, parts: Mapping[str, peering.Part], known: Facts, folder: Path, watcher: _Watcher
) -> tuple[Any, dict[str, Any], Any, dict[str, int]]:
    from raykd.launch import hosts, online, peers, replicas

    watcher.observer.note(f"Resources: {_fitted(job).text}.")
    handles = replicas.start(job, known)
    try:
        watcher.check()
        found = replicas.accuracies(job, known, handles, _teacher_split(job)) if job.teachers else {}
        teachers = _told(path, job, known, found, watcher)
        group = online.gather(job, parts, known, folder, handles)
        watch = peers.Watch(group, watcher.poll)
        try:
            watch.run()
        except BaseException:
            (folder / hosts.STOP).touch()  # nobody trains on for a driver that has gone
            raise
    finally:
        replicas.stop(handles)
    error = hosts.fatal(folder)
    if error is not None:
        raise error
    return group, teachers, online.measured_there(group), watch.respawned


def _local(
    path: str, job: Job, plans: list[Plan], known: Facts, folder: Path, watcher: _Watcher
) -> tuple[dict[str, Any], dict[str, Any]]:
    from raykd.launch.hosts import Asked

    sources = assembly.local_sources(job, plans, known, pickled=True)
    homes = {name: source for source, members in assembly.groups(job).items() for name in members}
    models = {}
    for name in job.teachers:
        committee = getattr(sources[homes[name]], "committee", None) or assembly.make_committee(job, (name,), known)
        models[name] = committee.teachers[name].logits
    teachers = _told(path, job, known, measuring.here(job, _teacher_split(job), models) if models else {}, watcher)
    del models  # of a store's teachers nothing is needed any more
    asked = Asked(folder)

    def should_stop() -> bool:
        watcher.poll()
        return watcher.stopping or asked()

    images = assembly.connect_images(job, known)
    makers = None
    if images and job.synthesis.mode == "bank":
        from raykd.launch.synthesizers import own_sources
        from raykd.schemes.data_free import Here

        def makers(device: torch.device) -> Here:
            return Here(job, images, known, own_sources(job, known), device)

    return teachers, learn(0, 1, job, sources, Setting(plans, known, folder, should_stop, images=images, makers=makers))


def _on_ray(
    path: str, job: Job, plans: list[Plan], known: Facts, folder: Path, watcher: _Watcher
) -> tuple[dict[str, Any], dict[str, Any]]:
    from raykd.launch import hosts, replicas, synthesizers

    watcher.observer.note(f"Resources: {_fitted(job).text}.")
    handles, makers = replicas.start(job, known), []
    try:
        watcher.check()
        found = replicas.accuracies(job, known, handles, _teacher_split(job)) if job.teachers else {}
        teachers = _told(path, job, known, found, watcher)
        images = assembly.connect_images(job, known)
        makers = synthesizers.start(job, images, known)
        config = {
            "job": job,
            "plans": plans,
            "images": images,
            "facts": known,
            "folder": str(folder),
            "handles": handles,
            "synthesizers": makers,
        }
        watcher.check()
        host = hosts.train if job.launch.host == "train" else hosts.actors
        host(job, config, watcher.poll)
    finally:
        replicas.stop(handles)
        synthesizers.stop(makers)
    error = hosts.fatal(folder)
    if error is not None:
        raise error
    learned = folder / hosts.LEARNED
    if not learned.exists():
        raise Interrupted(f"The workers ended before the training did. Resume with --resume {watcher.root}.")
    return teachers, json.loads(learned.read_text())


def _fitted(job: Job) -> preflight.Verdict:
    """The pre-flight's verdict. What an earlier run or stage has just given back may take seconds to show as free.

    Raises:
        ResourceError: the job does not fit.
    """
    from raykd.launch import cluster

    preflight.require(job, cluster.nodes(free=False))
    deadline = time.monotonic() + RELEASE_S
    while not preflight.fit(preflight.needs(job), cluster.nodes()).fits and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return preflight.require(job, cluster.nodes())


def _teacher_split(job: Job) -> str:
    return "test" if job.data.test is not None else "eval"


def _told(
    path: str, job: Job, known: Facts, measured: Mapping[str, dict[str, Any]], watcher: _Watcher
) -> dict[str, dict[str, Any]]:
    """Accuracies with what they are of, passed on: each teacher's, and under "" the ensemble's."""
    told = {}
    for name, spec in job.teachers.items():
        facts = {"model": spec.model, "weights": spec.weights, "source": "measured here"}
        told[name] = measured[name] | facts | {"parameters": _parameters(spec, own_facts(spec, known))}
        watcher.observer.teacher(path, name, told[name]["split"], told[name])
    if "" in measured:
        who = measuring.ballot(job)
        told[""] = measured[""] | {"aggregate": who.how, "teachers": list(who.ensemble), "source": "measured here"}
        watcher.observer.teacher(path, f"ensemble, {who.how}", told[""]["split"], told[""])
    return told


def _parameters(spec: Network, known: Facts) -> int:
    return sum(p.numel() for p in assembly.meta_model(spec, known).parameters())


def commit() -> str | None:
    """The commit raykd runs from, with `+` if files have changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5
        )
        dirty = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def hardware() -> str:
    """CPU and GPU of the driver's machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return f"{platform.machine()}, {os.cpu_count()} cores" + (f", {len(gpus)} x {gpus[0]}" if gpus else ", no GPU")
