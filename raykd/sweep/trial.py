"""One trial: a training on the shared teachers, judged after every epoch on what is held out.

    Tune's actor   settings -> job -> learn, which reports after each evaluation; parked there until Tune says go on or stop
    its workers    (launch.workers > 1) actors in the trial's placement group; rank 0 leaves reports, the trial passes them on

A trial keeps a run folder like any other, <sweep>/trials/<name>/, and goes on from its newest checkpoint when it is started
again. Where the scheduler moves models between trials (pbt) or pauses them (hyperband), reports carry the checkpoint and Tune
says from which one to start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayError

from raykd.config import Job, Training
from raykd.errors import RaykdError, SourceError
from raykd.exchange.pool import original
from raykd.launch import assembly, hosts
from raykd.resolve import resolve, write
from raykd.roles import checkpoints, recorder
from raykd.schemes.offline import Setting, learn
from raykd.sweep import sharing
from raykd.sweep.plan import METRIC, TIME, Plan
from raykd.sweep.sharing import Shared

PLANNED, TRIAL, SETTINGS = "planned", "trial", "settings"
ORIGIN, REPORT, ERROR, EXPLOITS = "origin.json", "report.json", "error.json", "exploits.jsonl"
LIVES, CHECKPOINTS, METRICS = "lives", "checkpoints", "metrics.jsonl"
POLL_S = 0.05
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """What all trials of a sweep share."""

    job: Job  # settings not yet filled, weights of stages in place
    plan: Plan
    shared: Shared
    folder: str  # of the sweep
    names: tuple[str, ...]  # of planned trials, in the order in which Tune makes them


def name_of(trial_id: str, names: tuple[str, ...]) -> str:
    """A trial's name: that of the plan, by Tune's count of its trials; Tune's own where the searcher makes them.

    It cannot stand in the settings, since pbt copies one trial's settings over another's.
    """
    return names[int(trial_id.rpartition("_")[2])] if names else trial_id


def job_of(given: Given, settings: Mapping[str, Any]) -> Job:
    """The resolved job of a trial."""
    return resolve(sharing.for_trial(given.job.replace(**settings), given.plan, given.shared))


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Job path -> value, out of Tune's config."""
    return dict(config.get(PLANNED, config))


def trial(config: Mapping[str, Any], given: Given) -> None:
    """The function Tune calls; returns when the training has ended, one way or another."""
    settings = settings_of(config)
    name = name_of(tune.get_context().get_trial_id(), given.names)
    folder = Path(given.folder) / "trials" / name
    folder.mkdir(parents=True, exist_ok=True)
    for left in (REPORT, ERROR, hosts.STOP):
        (folder / left).unlink(missing_ok=True)
    reporter = _Reporter(folder, name, given.plan.needs_checkpoints)
    try:
        job = job_of(given, settings)
        write(job, folder / "job.json")
        if not _adopt(folder, name, job, settings):
            reporter.again()
        host = _here if job.launch.workers == 1 else _group
        host(job, given, folder, reporter)
    except SourceError:
        raise  # a teacher that was lost may come back: Tune starts the trial again
    except RaykdError as error:
        fault = {"type": type(error).__name__, "message": str(error)}
        (folder / ERROR).write_text(json.dumps(fault) + "\n")
        tune.report({TIME: reporter.epoch + 1, METRIC: 0.0})


def _here(job: Job, given: Given, folder: Path, report: Callable[[Report], None]) -> None:
    """Learns in this process."""
    _work(0, 1, job, given, folder, report)


def _work(rank: int, world: int, job: Job, given: Given, folder: Path, report: Callable[[Report], None]) -> None:
    known = assembly.facts(job)
    plans = assembly.connect(job, known)
    found = hosts.sources(job, plans, known, given.shared.handles, rank)
    life, started = f"{time.time_ns()}.json", time.time()
    per_request = (job.training.batch_size or 1) * len(job.teachers) / max(len(found), 1)

    def on_eval(record: Report) -> None:
        requests = 0 if given.shared.share == "store" else sum(source.stats.requests for source in found.values())
        spent = {"seconds": round(time.time() - started, 3), "forwards": round(requests * per_request)}
        (folder / LIVES).mkdir(exist_ok=True)
        _write(folder / LIVES / life, spent)
        report(record)

    learn(rank, world, job, found, Setting(plans, known, folder, on_eval=on_eval))


class _Reporter:
    """Passes evaluations on to Tune, with their checkpoint where the scheduler needs it."""

    def __init__(self, folder: Path, name: str, with_checkpoint: bool) -> None:
        self.folder, self.name, self.with_checkpoint = folder, name, with_checkpoint
        self.epoch = 0

    def __call__(self, record: Report) -> None:
        self.epoch = int(record["epoch"]) + 1
        metrics = {TIME: self.epoch, METRIC: float(record[METRIC]), "step": int(record["step"])}
        if not self.with_checkpoint:
            tune.report(metrics)
            return
        step = checkpoints.newest(self.folder / CHECKPOINTS)
        assert step is not None, "an evaluation is reported after its checkpoint"
        with _parcel(self.folder, step, {TRIAL: self.name, "step": step, TIME: self.epoch}) as parcel:
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(parcel)))

    def again(self) -> None:
        """Reports what was evaluated before this start: Tune may have died before it heard of it. It counts nothing twice."""
        step = checkpoints.newest(self.folder / CHECKPOINTS)
        if step is None:
            return
        past = [r for r in recorder.read(self.folder / METRICS, "eval") if r["step"] <= step]
        for record in past[-1:] if self.with_checkpoint else past:
            self(record)


@contextlib.contextmanager
def _parcel(folder: Path, step: int, origin: Mapping[str, Any]) -> Any:
    """A folder with one checkpoint and where it comes from; Tune copies it."""
    place = folder / f".parcel-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    name = f"step-{step:08d}"
    shutil.copytree(folder / CHECKPOINTS / name, place / name, copy_function=_link)
    _write(place / ORIGIN, origin)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _adopt(folder: Path, name: str, job: Job, settings: Mapping[str, Any]) -> bool:
    """Puts the checkpoint from which Tune wants the trial to go on, if any, in place of its own; keeps a note of an exploit."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return False
    with checkpoint.as_directory() as parcel:
        origin = json.loads((Path(parcel) / ORIGIN).read_text())
        step = f"step-{origin['step']:08d}"
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        part = folder / CHECKPOINTS / f".{step}"
        shutil.copytree(Path(parcel) / step, part)
    for rank in part.glob("rank-*.pt"):
        state = torch.load(rank, map_location="cpu", weights_only=True)
        torch.save(retuned(state, job.training), rank)
    os.replace(part, folder / CHECKPOINTS / step)
    if origin[TRIAL] != name:
        own = recorder.read(folder / METRICS, "eval")
        note = {
            "from": origin[TRIAL],
            "step": origin["step"],
            TIME: origin[TIME],
            "own": {"step": own[-1]["step"], METRIC: own[-1][METRIC]} if own else None,
            SETTINGS: dict(settings),
        }
        with (folder / EXPLOITS).open("a") as file:
            file.write(json.dumps(note) + "\n")
        own_recorder = recorder.Recorder(folder / METRICS, origin["step"])
        own_recorder.write("exploit", origin["step"], **{k: v for k, v in note.items() if k != "step"})
        own_recorder.close()
    return True


def retuned(state: dict[str, Any], training: Training) -> dict[str, Any]:
    """A checkpoint's state with the optimizer's settings of another job; the learner sets the learning rate itself.

    Groups without weight decay stay without it.
    """
    changed = {"momentum": training.momentum, "weight_decay": training.weight_decay, "nesterov": training.nesterov}
    for group in state["optimizer"]["param_groups"]:
        for key, value in changed.items():
            if value is not None and key in group and (key != "weight_decay" or group[key]):
                group[key] = value
    return state


class Member:
    """One data-parallel worker of a trial."""

    def address(self) -> tuple[str, int]:
        """A free port on this worker's node, for the group's meeting."""
        return hosts.free_port()

    def work(self, rank: int, world: int, address: tuple[str, int], job: Job, given: Given, folder: str) -> None:
        """Joins the group and learns; rank 0 leaves each evaluation for the trial and waits until it is passed on."""
        place = Path(folder)

        def leave(record: Report) -> None:
            _write(place / REPORT, dict(record))
            while (place / REPORT).exists():
                time.sleep(POLL_S)

        with hosts.meeting(job.launch, rank, world, address):
            _work(rank, world, job, given, place, leave)


def _group(job: Job, given: Given, folder: Path, report: Callable[[Report], None]) -> None:
    """Learns on actors in the trial's placement group, which are gone with it."""
    launch = job.launch
    make = ray.remote(Member).options(num_cpus=launch.cpus, num_gpus=launch.gpus, resources=dict(launch.resources) or None)
    members: list[Any] = [make.remote() for _ in range(launch.workers)]
    try:
        address = ray.get(members[0].address.remote(), timeout=launch.start_timeout_s)
        waiting = [m.work.remote(r, len(members), address, job, given, str(folder)) for r, m in enumerate(members)]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            try:
                ray.get(done)
            except RayError as error:
                raise original(error, "A worker of the trial") from None
            if (folder / REPORT).exists():
                report(json.loads((folder / REPORT).read_text()))
                (folder / REPORT).unlink()
    finally:
        for member in members:
            ray.kill(member)


def _write(path: Path, content: Any) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content) + "\n")
    os.replace(part, path)
