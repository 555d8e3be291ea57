"""Static checks: everything that can be known to be wrong before any actor starts, all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from raykd import catalogue, models
from raykd.config import Job, Network, each_job, resolve
from raykd.data.batches import Plan as Order
from raykd.data.sets import probe
from raykd.data.splits import has_split
from raykd.errors import JobFaults, RaykdError, near
from raykd.exchange import codec as codecs
from raykd.launch import assembly, preflight
from raykd.launch.inspection import Inspection, RoleLine, SignalLine
from raykd.roles.losses import BoundLoss, Plan, schedule
from raykd.roles.network import Facts, Tapped, input_shape, model_options
from raykd.roles.optimisation import optimizer, rate


def faults(job: Job) -> list[str]:
    """All static faults of a resolved job and its stages, each with its path."""
    return [fault for found in each_job(job, lambda path, one: inspect_one(one, path).faults) for fault in found]


def inspect(job: Job) -> Inspection:
    """Looks a job over without starting anything; faults are collected, not raised."""
    try:
        job = resolve(job)
    except JobFaults as error:
        lines = [line.strip().split(". ", 1)[-1] for line in str(error).splitlines()[1:]]
        return Inspection(job, faults=lines)
    found = inspect_one(job)
    for name, stage in job.stages.items():
        found.faults += [f"stages.{name}.{fault}" for fault in inspect(stage).faults]
    return found


def inspect_one(job: Job, path: str = "") -> Inspection:
    """One resolved job without its stages; `path` goes before each fault."""
    found = Inspection(job)
    collect = _Collector(found.faults, path)
    for check in (_settings, _stage_names):
        collect.add(check(job))
    known = collect.of("data", lambda: assembly.facts(job))
    collect.add(_data(job))
    if known is not None:
        _models(job, known, found, collect)
        size = job.training.batch_size or 1
        plan = collect.of(
            "training.batch_size", lambda: Order(known.num_samples, size, job.seed, drop_last=job.training.drop_last)
        )
        found.steps_per_epoch = plan.steps_per_epoch if plan is not None else 0
        if plan is not None and found.steps_per_epoch == 0:
            collect.add(
                [f"training.batch_size: {size} is more than the {known.num_samples} training samples, no batch is full."]
            )
    found.needs = [
        (need.what, need.count, need.resources.get("CPU", 0.0), need.resources.get("GPU", 0.0)) for need in preflight.needs(job)
    ]
    return found


class _Collector:
    """Turns errors into faults that carry their path."""

    def __init__(self, faults: list[str], path: str) -> None:
        self.faults, self.path = faults, path

    def add(self, faults: list[str]) -> None:
        self.faults += [f"{self.path}{fault}" for fault in faults if f"{self.path}{fault}" not in self.faults]

    def of(self, where: str, attempt: Callable[[], Any]) -> Any:
        try:
            return attempt()
        except JobFaults as error:
            self.add([line.strip() for line in str(error).splitlines()[1:]])
        except (RaykdError, ValueError, OSError) as error:
            text = str(error)
            self.add([text if text.startswith(where) else f"{where}: {text}"])
        return None


def _settings(job: Job) -> list[str]:
    """Settings that contradict each other."""
    launch, training = job.launch, job.training
    found = []
    if launch.backend == "local" and launch.workers > 1:
        found.append("launch.workers: the local backend has one worker. Set launch.backend='ray', or launch.workers=1.")
    size = training.batch_size or 1
    if size % launch.workers:
        found.append(f"training.batch_size: {size} is not divisible by launch.workers={launch.workers}. Change one of them.")
    if (size // max(launch.workers, 1)) % training.accumulate:
        found.append(
            f"training.accumulate: {training.accumulate} does not divide a worker's batch of {size // launch.workers}."
        )
    if not job.losses and job.teachers:
        found.append("losses: the job has teachers and no loss that listens to them. Add one, for example losses={'kd': {}}.")
    if not job.losses and not job.ce_weight:
        found.append("ce_weight: 0 without any other loss leaves nothing to learn from.")
    if training.evaluate == "ema" and training.ema is None:
        found.append("training.evaluate: 'ema' needs training.ema, the decay of the averaged copy (for example 0.999).")
    if "://" in job.runs:
        found.append(
            f"runs: expected a path that all nodes share, got the URI {job.runs!r}. Mount it, or use a shared file system."
        )
    for name, loss in job.losses.items():
        try:
            schedule(str(loss.options.get("schedule", "constant")))
        except RaykdError as error:
            found.append(f"losses.{name}.{error}")
        found += _hooks(name, loss.method)
    for attempt in (lambda: rate(training), lambda: optimizer(training, [torch.nn.Linear(2, 2)])):
        try:
            attempt()
        except (RaykdError, ValueError, TypeError) as error:
            text = str(error)
            found.append(text if text.startswith("training.") else f"training.optimizer_options: {text}")
    return found


def _hooks(name: str, slug: str) -> list[str]:
    method = catalogue.method(slug)
    found = []
    if method.scheme != "offline":
        found.append(f"losses.{name}: {slug} is a method of the {method.scheme} scheme; this job is offline.")
    unheard = [h for h in method.hooks if h not in ("prepare", "on_epoch")]
    if unheard:
        found.append(f"losses.{name}: {slug} defines {', '.join(unheard)}, which the offline scheme does not call.")
    return found


def _stage_names(job: Job) -> list[str]:
    found = []
    specs: dict[str, Network] = {"student": job.student, **{f"teachers.{n}": t for n, t in job.teachers.items()}}
    for path, spec in specs.items():
        if spec.weights is None or spec.weights == "pretrained":
            if spec.weights is None and path.startswith("teachers."):
                found.append(f"{path}.weights: a teacher needs weights: a file, 'pretrained' or 'stage:<name>'.")
            continue
        if spec.weights.startswith(assembly.STAGE):
            stage = spec.weights[len(assembly.STAGE) :]
            if stage not in job.stages:
                found.append(f"{path}.weights: no stage {stage!r} in this job. {near(stage, job.stages)}")
    return found


def _data(job: Job) -> list[str]:
    found = []
    for split in ("train", "eval", "test"):
        if has_split(job.data, split):
            found += [f"data.{split}: {fault}" for fault in probe(job.data, split)]
    found += [f"data.augmentation.{fault}" for fault in job.data.augmentation.faults()]
    return found


def _models(job: Job, known: Facts, found: Inspection, collect: _Collector) -> None:
    """Architectures, weights, layers, signals and connectors, by shapes alone."""
    specs: dict[str, Any] = {"student": job.student, **job.teachers}
    built = {}
    for name, spec in specs.items():
        where = "student" if name == "student" else f"teachers.{name}"
        model = collect.of(where, lambda spec=spec: assembly.meta_model(spec, known))
        if model is None:
            continue
        line = collect.of(where, lambda name=name, spec=spec, model=model: _role(job, name, spec, model, known))
        if line is None:
            continue
        built[name] = model
        found.roles.append(line)
        if spec.weights and spec.weights != "pretrained" and not spec.weights.startswith(assembly.STAGE):
            collect.of(f"{where}.weights", lambda spec=spec: _weights_fit(spec, known))
        if getattr(spec, "codec", "dense") != "dense":
            collect.of(f"{where}.codec", lambda spec=spec: codecs.parse(spec.codec))
    if set(built) == set(specs):
        collect.of("losses", lambda: _signals(job, built, known, found, collect))


def _role(job: Job, name: str, spec: Any, model: torch.nn.Module, known: Facts) -> RoleLine:
    cost = models.cost(model, input_shape(spec, known))
    if name == "student":
        launch = job.launch
        return RoleLine(
            name,
            "student",
            spec.model,
            spec.weights,
            cost.parameters,
            cost.macs,
            launch.host,
            launch.workers,
            launch.cpus,
            launch.gpus,
        )
    return RoleLine(
        name,
        "teacher",
        spec.model,
        spec.weights,
        cost.parameters,
        cost.macs,
        spec.placement,
        spec.replicas,
        spec.cpus,
        spec.gpus,
    )


def _weights_fit(spec: Network, known: Facts) -> None:
    model = models.build(spec.model, known.num_classes, **model_options(spec, known))
    models.load_weights(model, str(spec.weights), expect_sha256=spec.weights_sha256)


def _signals(job: Job, built: dict[str, torch.nn.Module], known: Facts, found: Inspection, collect: _Collector) -> None:
    plans = assembly.connect(job, known)
    if job.training.accumulate > 1 and (coupled := sorted({p.name for p in plans if assembly.couples_batch(p)})):
        collect.add(
            [f"training.accumulate: {', '.join(coupled)} couple the whole batch, which accumulation splits. Set it to 1."]
        )
    shapes = {}
    for name, model in built.items():
        spec = job.student if name == "student" else job.teachers[name]
        signals = [
            s
            for p in plans
            for s in (p.wanted("student") if name == "student" else p.wanted("teacher") if p.teacher == name else [])
        ]
        shapes[name] = collect.of(f"{name}", lambda s=spec, m=model, w=signals: _shapes(s, m, w, known))
    for name, spec in job.teachers.items():
        codec = collect.of(f"teachers.{name}.codec", lambda name=name: assembly.codec(job, plans, name))
        for signal in assembly.wanted(plans, name) if codec is not None and shapes.get(name) else ():
            shape = shapes[name][signal.key]
            found.signals.append(
                SignalLine(name, signal.key, shape, spec.codec, codecs.bytes_per_sample(shape, codec, signal.kind == "logits"))
            )
    if all(v is not None for v in shapes.values()):
        for plan in plans:
            collect.of(f"losses.{plan.name}", lambda plan=plan: _connectors(job, plan, shapes, known, found))


def _shapes(spec: Network, model: torch.nn.Module, signals: Any, known: Facts) -> dict[str, tuple[int, ...]]:
    """Shapes without the batch axis, from one forward on the meta device."""
    tapped = Tapped(spec, model.eval(), signals, known, torch.device("meta"))
    try:
        with torch.no_grad():
            seen = tapped(torch.zeros((2, *known.shape), dtype=torch.uint8, device="meta"))
    finally:
        tapped.close()
    return {key: tuple(value.shape[1:]) for key, value in seen.items()}


def _connectors(job: Job, plan: Plan, shapes: dict[str, Any], known: Facts, found: Inspection) -> None:
    roles = {"student": shapes["student"]} | ({"teacher": shapes[plan.teacher]} if plan.teacher else {})
    with torch.device("meta"):
        loss = BoundLoss(plan, roles, known, torch.zeros(known.num_samples, dtype=torch.int64), job)
    count = sum(p.numel() for p in loss.parameters())
    if count:
        found.connectors[plan.label] = count
