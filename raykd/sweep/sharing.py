"""The teachers of a sweep: how all trials share them, what they forbid to search, how often they computed.

store   the driver keeps their outputs once (raykd.launch.storing); trials read them and no teacher runs beside a trial
pool    the driver starts their replicas once; all trials ask these
none    every trial holds its own, in its process: only to measure what sharing saves
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raykd.config import Augmentation, Data, Job, Loss
from raykd.data.batches import Plan as Order
from raykd.data.splits import HOLDOUT
from raykd.launch import assembly, preflight, replicas, storing
from raykd.launch.checks import inspect
from raykd.launch.observer import Observer
from raykd.launch.preflight import Need
from raykd.resolve import resolve
from raykd.roles.network import Facts
from raykd.signals import Signal
from raykd.sweep import space as spaces
from raykd.sweep.plan import Plan, epochs_of
from raykd.sweep.space import Space

STORE = "store"
MOST_VARIANTS = 256  # of one loss, looked at for the signals they need
OWN_TEACHERS = "set share='none', which gives every trial its own teachers"


@dataclass(frozen=True)
class Shared:
    """What a trial needs to reach the sweep's teachers.

    Attributes:
        share: store | pool | none.
        store: folder of the kept outputs.
        epochs: whose views it keeps.
        computed: images that teachers computed for it, all teachers together.
        handles: source -> its replicas.
    """

    share: str
    store: str | None = None
    epochs: int | None = None
    computed: int = 0
    handles: Mapping[str, list[Any]] = field(default_factory=dict)


def refused(job: Job, path: str, share: str) -> str | None:
    """Why a path cannot be searched while teachers are shared like this."""
    teacher = re.fullmatch(r"teachers\.[^.]+\.(\w+)(\..*)?", path)
    if share == "none" or not job.teachers or (teacher and teacher[1] in ("weight", "on_loss")):
        return None
    if path.startswith("teachers"):
        return f"it changes what the shared teachers answer. Take it out, or {OWN_TEACHERS}."
    if path.startswith("data.") and share == "store":
        return f"it changes what the kept outputs were computed from. Take it out, or {OWN_TEACHERS}."
    recipes = any(spec.inputs == "recipe" for spec in job.teachers.values())
    if path.startswith("data.") and (recipes or not path.startswith("data.augmentation.")):
        return f"it changes what the shared replicas are given. Take it out, or {OWN_TEACHERS}."
    return None


def faults(job: Job) -> list[str]:
    """Settings of the job that contradict this way of sharing."""
    return [
        f"teachers.{name}.placement: a sweep keeps outputs of its own, of the training images that are not held out, and needs "
        "the live teacher. Set placement='pool'."
        for name, spec in job.teachers.items()
        if spec.placement == "store"
    ]


def trial_faults(job: Job, space: Space, plan: Plan) -> list[str]:
    """What makes the store unable to stand for the teachers in every trial."""
    if plan.share != "store" or not job.teachers:
        return []
    told = []
    cut = [name for name, spec in job.teachers.items() if spec.codec.startswith("topk")]
    for path, domain in space.items():
        ends = spaces.extremes(domain)
        if not path.startswith("losses."):
            continue
        if cut and path.endswith("temperature"):
            told.append(
                f"{path}: teachers.{cut[0]}.codec cuts the kept outputs at one temperature. Use codec='fp16', or share='pool'."
            )
        elif spaces.finite(domain) is None and len({_wanted(job.replace(**{path: end})) for end in ends}) > 1:
            told.append(f"{path}: each of its values asks the teachers for another signal. Use tune.choice, or share='pool'.")
    if not told:
        told += inspect(union(held_out(job, plan), space)).faults
    return told


def held_out(job: Job, plan: Plan) -> Job:
    """The job on the part of the training set that is learnt from."""
    return dataclasses.replace(job, data=dataclasses.replace(job.data, holdout=plan.holdout), baseline=False)


def union(job: Job, space: Space) -> Job:
    """A job whose losses ask the teachers for everything that any trial's losses ask for.

    Raises:
        RaykdError: a trial's losses do not fit the models.
    """
    known: set[Signal | str] = set()
    losses: dict[str, Loss] = {}
    for name in job.losses:
        for place, loss in enumerate(variants(job, space, name)):
            wanted = _wanted(dataclasses.replace(job, losses={name: loss}))
            if not wanted <= known:
                losses[name if place == 0 else f"{name}-{place}"] = loss
                known |= wanted
    return dataclasses.replace(job, losses=losses, ce_weight=1.0)


def variants(job: Job, space: Space, name: str) -> list[Loss]:
    """The loss as the job has it, and with every combination of the few-valued settings that are searched in it."""
    room = f"losses.{name}"
    few = {p: v for p, d in space.items() if (p == room or p.startswith(f"{room}.")) and (v := spaces.finite(d))}
    combinations = itertools.islice(itertools.product(*few.values()), MOST_VARIANTS)
    found = [job.losses[name]] if room not in few else []
    return found + [job.replace(**dict(zip(few, chosen))).losses[name] for chosen in combinations]


def _wanted(job: Job) -> frozenset[Any]:
    """(teacher, signal) of everything a job's losses ask for."""
    job = resolve(dataclasses.replace(job, ce_weight=1.0))
    found = assembly.connect(job, assembly.facts(job))
    return frozenset((name, signal) for name in job.teachers for signal in assembly.wanted(found, name))


@contextlib.contextmanager
def teachers(job: Job, space: Space, plan: Plan, folder: Path, observer: Observer) -> Iterator[Shared]:
    """The teachers for the length of the trials, paid for once.

    Args:
        job: weights of stages in place.
        space: of the sweep.
        plan: of the sweep.
        folder: of the sweep.
        observer: hears of a store that is built.
    """
    job = held_out(job, plan)
    if not job.teachers or plan.share == "none":
        yield Shared("none")
    elif plan.share == "store":
        epochs = views(job, space)
        kept = storing.build(union(job, space), folder / STORE, epochs, observer)
        yield Shared("store", str(folder / STORE), epochs, kept["rows"] * len(kept["forwards"]))
    else:
        ready = resolve(job)
        handles = replicas.start(ready, assembly.facts(ready))
        try:
            yield Shared("pool", handles=handles)
        finally:
            replicas.stop(handles)


def views(job: Job, space: Space) -> int:
    """Epochs whose views the store keeps: as the job says, one where all look alike, else as many as a trial has."""
    if job.data.augmentation_epochs is not None:
        return job.data.augmentation_epochs
    if job.data.augmentation == Augmentation():
        return 1
    return max(longest(job, space))


def longest(job: Job, space: Space) -> list[int]:
    """Epochs that trials may have."""
    values = [{p: v} for p, d in space.items() if p.startswith("training.") for v in spaces.extremes(d)]
    return [epochs_of(job, settings) for settings in [{}, *values]]


def for_trial(job: Job, plan: Plan, shared: Shared) -> Job:
    """A trial's job: judged on what is held out, `test` out of reach, teachers where the sweep has them."""
    data = dataclasses.replace(job.data, holdout=plan.holdout, eval=HOLDOUT, test=None, eval_limit=None)
    specs = dict(job.teachers)
    if shared.share == "store":
        data = dataclasses.replace(data, augmentation_epochs=shared.epochs)
        specs = {n: dataclasses.replace(s, placement="store", store=shared.store, fill="none") for n, s in specs.items()}
    elif shared.share == "none":
        specs = {n: dataclasses.replace(s, placement="inline", actor=None) for n, s in specs.items()}
    return dataclasses.replace(job, data=data, teachers=specs, stages={}, baseline=False)


def needs(job: Job, share: str, trials: int) -> list[Need]:
    """What so many trials and the shared teachers reserve."""
    own = dataclasses.replace(job, teachers=job.teachers if share == "pool" else {})
    workers, *pools = preflight.needs(own)
    return [dataclasses.replace(workers, what="trial workers", count=trials * workers.count), *pools]


def concurrent(job: Job, share: str, nodes: Mapping[str, Mapping[str, float]], most: int) -> int:
    """How many trials fit beside the shared teachers, at most `most`."""
    count = 0
    while count < most and preflight.fit(needs(job, share, count + 1), nodes).fits:
        count += 1
    return count


def one_trial(job: Job, known: Facts) -> int:
    """Images that live teachers compute for one whole trial, all teachers together."""
    training = job.training
    order = Order(known.num_samples, training.batch_size or 1, job.data_seed, drop_last=training.drop_last)
    images = sum(len(order.global_batch(0, step)) for step in range(order.steps_per_epoch))
    return images * (training.epochs or 1) * len(job.teachers)


def described(data: Data) -> str:
    """What trials are judged on, in words."""
    return f"{100 * data.holdout:g} % of the training images, of each class alike"
