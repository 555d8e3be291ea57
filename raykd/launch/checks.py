"""Static checks: everything that can be known to be wrong before any actor starts, all of it at once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from raykd import catalogue, models
from raykd.config import Job, Network, from_dict, resolve, to_dict
from raykd.data.batches import Plan as Order
from raykd.data.normalise import Normalise
from raykd.data.sets import probe
from raykd.data.splits import has_split
from raykd.errors import JobFaults, RaykdError, near
from raykd.exchange import codec as codecs
from raykd.launch import assembly, preflight, shapes
from raykd.launch.inspection import Inspection, RoleLine, SignalLine
from raykd.roles.losses import Plan, schedule
from raykd.roles.losses import plans as connect
from raykd.roles.network import Facts, model_options
from raykd.roles.optimisation import optimizer, rate

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]*")
SHOWN = 5  # faults of one split; a thousand shards may share one


def faults(job: Job) -> list[str]:
    """All static faults of a job and its stages, each with its path."""
    return inspect(job).faults


def inspect(job: Job) -> Inspection:
    """Looks a job over without starting anything; faults are collected, not raised.

    A setting that is wrong by itself takes its default, so that the rest can be looked at; what depends on it is left out.
    """
    resolved, told = _resolved(job)
    if resolved is None:
        return Inspection(job, faults=told)
    found = _inspect(resolved, "", tuple(fault.partition(":")[0] for fault in told))
    found.faults = told + found.faults
    return found


def _resolved(job: Job) -> tuple[Job | None, list[str]]:
    """The job with its open settings filled, and the faults of single settings; these have taken their defaults."""
    told: list[str] = []
    try:
        return resolve(job), told
    except JobFaults as error:
        data = to_dict(job)
        while True:
            new = [fault for fault in _each(error) if fault not in told]
            told += new
            if not new:
                return None, told
            for fault in new:
                _forget(data, fault.partition(":")[0])
            try:
                return resolve(from_dict(data)), told
            except JobFaults as next_error:
                error = next_error


def _forget(data: dict[str, Any], path: str) -> None:
    """Takes the setting at `path` out of a job's data, or what should have held it."""
    if path == "ce_weight":  # what the losses cannot agree on has no default
        data[path] = 1.0
        return
    parts = path.split(".")
    holders = [data]
    for part in parts[:-1]:
        if not isinstance(holders[-1].get(part), dict):
            break
        holders.append(holders[-1][part])
    depth = len(holders) - 1
    if parts[depth] not in holders[depth] and depth > 0:
        depth -= 1
    holders[depth].pop(parts[depth], None)


def _each(error: JobFaults) -> list[str]:
    """The faults of a JobFaults, one by one."""
    return [line.strip().partition(". ")[2] for line in str(error).splitlines()[1:]]


class _Collector:
    """Turns errors into faults that carry their path, each told once.

    Args:
        faults: the list that is added to.
        path: of the job, put before each.
        spoiled: settings known to be wrong; what is found in the same place rests on a default and is not told.
    """

    def __init__(self, faults: list[str], path: str, spoiled: tuple[str, ...]) -> None:
        self.faults, self.path = faults, path
        self.spoiled = tuple(s.removeprefix(path) for s in spoiled if s.startswith(path))

    def rests_on(self, place: str) -> bool:
        """Whether a setting in this place, or the place itself, is known to be wrong."""
        return any(s == place or s.startswith(f"{place}.") or place.startswith(f"{s}.") for s in self.spoiled)

    def add(self, found: Iterable[str]) -> None:
        for fault in found:
            place = fault.partition(":")[0]
            room = ".".join(place.split(".")[:2]) if place.startswith(("losses.", "teachers.")) else place
            if f"{self.path}{fault}" not in self.faults and not self.rests_on(room):
                self.faults.append(f"{self.path}{fault}")

    def of(self, where: str, attempt: Callable[[], Any]) -> Any:
        """What the attempt gives; None, and a fault, where it fails."""
        try:
            return attempt()
        except JobFaults as error:
            self.add(_each(error))
        except (RaykdError, ValueError, OSError) as error:
            text, last = str(error), where.rpartition(".")[2]
            self.add([text if text.startswith(where) else f"{where}: {text.removeprefix(f'{last}: ')}"])
        return None

    def told(self, place: str) -> bool:
        """Whether a fault of this place is known."""
        return any(f.removeprefix(self.path).startswith((f"{place}:", f"{place}.")) for f in self.faults)


def _inspect(job: Job, path: str, spoiled: tuple[str, ...]) -> Inspection:
    """A resolved job with its stages; `path` goes before each fault."""
    found = Inspection(job)
    collect = _Collector(found.faults, path, spoiled)
    for check in (_names, _settings, _losses, _optimisation, _weights):
        collect.add(check(job))
    if not collect.rests_on("data"):
        wrong, trains = _data(job)
        collect.add(wrong)
        known = collect.of("data", lambda: assembly.facts(job)) if trains else None
        if known is not None and "student" not in job.teachers:
            found.steps_per_epoch = _steps(job, known, collect)
            _models(job, known, found, collect)
    found.needs = [
        (need.what, need.count, need.resources.get("CPU", 0.0), need.resources.get("GPU", 0.0)) for need in preflight.needs(job)
    ]
    for name, stage in job.stages.items():
        found.faults += _inspect(stage, f"{path}stages.{name}.", spoiled).faults
    return found


def _names(job: Job) -> list[str]:
    """Names become parts of paths, of actors' names and of metrics."""
    named = [("name", job.name)] + [(room, n) for room in ("teachers", "losses", "stages") for n in getattr(job, room)]
    taken = {"teachers": ("student",), "losses": ("ce",)}
    found = [
        f"{room}: expected a name of letters, digits, '_', '+' and '-', got {name!r}. Rename it."
        for room, name in named
        if not NAME.fullmatch(name)
    ]
    found += [f"{room}.{name}: this name is raykd's own. Rename it." for room, name in named if name in taken.get(room, ())]
    return found


def _settings(job: Job) -> list[str]:
    """Settings that contradict each other."""
    launch, training, data = job.launch, job.training, job.data
    found = []
    if launch.backend == "local" and launch.workers > 1:
        found.append("launch.workers: the local backend has one worker. Set launch.backend='ray', or launch.workers=1.")
    size = training.batch_size or 1
    if size % launch.workers:
        found.append(f"training.batch_size: {size} is not divisible by launch.workers={launch.workers}. Change one of them.")
    elif (size // launch.workers) % training.accumulate:
        found.append(
            f"training.accumulate: {training.accumulate} does not divide a worker's batch of {size // launch.workers}."
        )
    if launch.device == "cuda" and (launch.gpus == 0 if launch.backend == "ray" else not torch.cuda.is_available()):
        have = "launch.gpus is 0" if launch.backend == "ray" else "this machine has none that torch can use"
        found.append(f"launch.device: 'cuda' needs a GPU, and {have}. Set launch.gpus, or launch.device='auto'.")
    if training.evaluate == "ema" and training.ema is None:
        found.append("training.evaluate: 'ema' needs training.ema, the decay of the averaged copy (for example 0.999).")
    if data.limit is not None and data.per_class is not None:
        found.append("data.limit: expected either limit or per_class, got both. Set one of them.")
    if job.teachers and not (has_split(data, "eval") or has_split(data, "test")):
        found.append("data.eval: the teachers are measured before the training, there is no split for it. Set it.")
    if "://" in job.runs:
        found.append(
            f"runs: expected a path that all nodes share, got the URI {job.runs!r}. Mount it, or use a shared file system."
        )
    return found


def _losses(job: Job) -> list[str]:
    """What is said of losses and teachers, without looking at models."""
    found = []
    heard: set[str] = set()
    for name, loss in job.losses.items():
        method = catalogue.method(loss.method)
        listens = any(p.startswith("teacher_") for p in method.parameters)
        teachers = [t for t in loss.teachers or job.teachers if t in job.teachers] if listens else []
        heard |= set(teachers)
        if loss.teachers and not listens:
            found.append(f"losses.{name}.teachers: {method.slug} listens to no teacher. Leave `teachers` out.")
        if listens and not job.teachers:
            found.append(f"losses.{name}: {method.slug} listens to a teacher and the job has none. Add one to `teachers`.")
        if teachers and not any(job.teachers[t].weight for t in teachers):
            found.append(f"losses.{name}: all teachers it listens to have weight 0. Set teachers.{teachers[0]}.weight.")
        try:
            schedule(str(loss.options.get("schedule", "constant")))
        except RaykdError as error:
            found.append(f"losses.{name}.{error}")
        found += _hooks(name, method)
    if not job.losses and job.teachers:
        found.append("losses: the job has teachers and no loss that listens to them. Add one, for example losses={'kd': {}}.")
    elif deaf := [t for t in job.teachers if t not in heard]:
        found += [f"teachers.{t}: no loss listens to this teacher. Name it in a loss's `teachers`, or remove it." for t in deaf]
    if not job.losses and not job.ce_weight:
        found.append("ce_weight: 0 without any other loss leaves nothing to learn from.")
    return found


def _hooks(name: str, method: catalogue.Method) -> list[str]:
    found = []
    if method.scheme != "offline":
        found.append(f"losses.{name}: {method.slug} is a method of the {method.scheme} scheme; this job is offline.")
    unheard = [h for h in method.hooks if h not in ("prepare", "on_epoch")]
    if unheard:
        found.append(f"losses.{name}: {method.slug} defines {', '.join(unheard)}, which the offline scheme does not call.")
    try:
        method.call()
    except Exception as error:
        found.append(f"losses.{name}: expected {method.module} to be importable, got {type(error).__name__}: {error}.")
    return found


def _optimisation(job: Job) -> list[str]:
    """Optimizer and scheduler, by two steps of a small layer."""

    def step() -> None:
        layer = torch.nn.Linear(2, 2)
        made = optimizer(job.training, [layer])
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.step()
        made.step()  # some options count from the second step on

    found = []
    attempts = (("training.scheduler", lambda: rate(job.training)), ("training.optimizer_options", step))
    for where, attempt in attempts:
        try:
            attempt()
        except RaykdError as error:
            found.append(str(error))
        except Exception as error:
            found.append(f"{where}: {job.training.optimizer}: {type(error).__name__}: {error}.".replace("..", "."))
    return found


def _weights(job: Job) -> list[str]:
    """Where weights come from, as far as it is said."""
    found = []
    specs: dict[str, Network] = {"student": job.student, **{f"teachers.{n}": t for n, t in job.teachers.items()}}
    for path, spec in specs.items():
        if "num_classes" in spec.options:
            found.append(f"{path}.options.num_classes: the number of classes comes from data.num_classes. Leave it out here.")
        if spec.weights is None and path.startswith("teachers."):
            found.append(f"{path}.weights: a teacher needs weights: a file, 'pretrained' or 'stage:<name>'.")
        if spec.weights_sha256 is not None and spec.weights in (None, "pretrained"):
            found.append(f"{path}.weights_sha256: expected a file of weights to compare with, got weights={spec.weights!r}.")
        if spec.weights == "pretrained" and spec.options:
            found.append(f"{path}.options: published weights come with the model as published. Leave options out.")
        if (spec.weights or "").startswith(assembly.STAGE):
            stage = str(spec.weights)[len(assembly.STAGE) :]
            if stage not in job.stages:
                found.append(f"{path}.weights: no stage {stage!r} in this job. {near(stage, job.stages)}")
    return found


def _data(job: Job) -> tuple[list[str], bool]:
    """Faults of all splits, what several share told once; whether the training split is whole."""
    splits: dict[str, list[str]] = {}
    for split in ("train", "eval", "test"):
        if has_split(job.data, split):
            wrong = probe(job.data, split)
            more = [f"{len(wrong) - SHOWN} more faults like these."] if len(wrong) > SHOWN else []
            for fault in (f.removeprefix("data files: ").removeprefix("data file: ") for f in wrong[:SHOWN] + more):
                splits.setdefault(fault, []).append(f"data.{split}")
    found = [fault if fault.startswith("data.") else f"{', '.join(where)}: {fault}" for fault, where in splits.items()]
    found += [f"data.augmentation.{fault}" for fault in job.data.augmentation.faults()]
    return found, not any("data.train" in where for where in splits.values())


def _steps(job: Job, known: Facts, collect: _Collector) -> int:
    size, training = job.training.batch_size or 1, job.training
    try:
        return Order(known.num_samples, size, job.seed, drop_last=training.drop_last).steps_per_epoch
    except RaykdError:
        most = f"expected at most the {known.num_samples} training samples, got {size}: no batch is full"
        collect.add([f"training.batch_size: {most}. Lower it, or set training.drop_last=False."])
        return 0


def _models(job: Job, known: Facts, found: Inspection, collect: _Collector) -> None:
    """Architectures, weights, layers, signals and connectors, by shapes alone."""
    specs: dict[str, Any] = {"student": job.student, **job.teachers}
    places = {name: "student" if name == "student" else f"teachers.{name}" for name in specs}
    built: dict[str, shapes.Model] = {}
    for name, spec in specs.items():
        where = places[name]
        if getattr(spec, "codec", "dense") != "dense":
            collect.of(f"{where}.codec", lambda spec=spec: codecs.parse(spec.codec))
        skip = collect.rests_on(where) or collect.told(f"{where}.options")
        model = None if skip else collect.of(where, lambda spec=spec: shapes.model(spec, known))
        if model is None or not _normalises(spec, known, where, collect):
            continue
        built[name] = model
        found.roles.append(_line(job, name, spec, model.cost))
        collect.of(f"{where}.weights", lambda spec=spec: _weights_fit(job, spec, known))
    if set(built) == set(specs) and "losses" not in collect.spoiled:
        plans: list[Plan] = []
        for name in job.losses:
            if not collect.told(f"losses.{name}") and not collect.rests_on(f"losses.{name}"):
                plans += collect.of(f"losses.{name}", lambda name=name: _plans(job, name, built)) or []
        _signals(job, plans, built, known, found, collect)


def _normalises(spec: Network, known: Facts, where: str, collect: _Collector) -> bool:
    """Whether the images can be normalised for this model; without numbers of its own it takes the data's."""
    stats = spec.normalise or known.normalise
    where = f"{where}.normalise" if spec.normalise else "data.normalise"

    def attempt() -> bool:
        found = Normalise.preset(stats) if isinstance(stats, str) else Normalise(*stats)
        found(torch.zeros((1, *known.shape), dtype=torch.uint8))
        return True

    return bool(collect.of(where, attempt))


def _line(job: Job, name: str, spec: Any, cost: models.Cost) -> RoleLine:
    head = (name, "student" if name == "student" else "teacher", spec.model, spec.weights, cost.parameters, cost.macs)
    launch = job.launch
    if name == "student":
        return RoleLine(*head, launch.host, launch.workers, launch.cpus, launch.gpus)
    return RoleLine(*head, spec.placement, spec.replicas, spec.cpus, spec.gpus)


def _weights_fit(job: Job, spec: Network, known: Facts) -> None:
    """Reads a file of weights into the model; with a stage's, the model must be the one that the stage trains."""
    if spec.weights in (None, "pretrained"):
        return
    if not str(spec.weights).startswith(assembly.STAGE):
        model = models.build(spec.model, known.num_classes, **model_options(spec, known))
        models.load_weights(model, str(spec.weights), expect_sha256=spec.weights_sha256)
        return
    stage = job.stages.get(str(spec.weights)[len(assembly.STAGE) :])
    if stage is None or _shapes(spec, known) == _shapes(stage.student, assembly.facts(stage)):
        return
    trained, got = (f"{s.model} {dict(s.options) or ''}".strip() for s in (stage.student, spec))
    raise ValueError(f"expected the model that {spec.weights} trains, {trained}, got {got}. Make them equal.")


def _shapes(spec: Network, known: Facts) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in assembly.meta_model(spec, known).state_dict().items()}


def _plans(job: Job, name: str, built: dict[str, shapes.Model]) -> list[Plan]:
    """One loss connected to layers that exist."""
    alone = dataclasses.replace(job, losses={name: job.losses[name]})
    plans = connect(alone, {role: models.stages(model.module) for role, model in built.items()})
    for plan in plans:
        shapes.check_layers(plan, built)
    if job.losses[name].layers and not any(s.layer for plan in plans for w in plan.wires for s in w.signals):
        raise ValueError(f"layers: {job.losses[name].method} reads no layers. Leave `layers` out.")
    return plans


def _signals(
    job: Job, plans: list[Plan], built: dict[str, shapes.Model], known: Facts, found: Inspection, collect: _Collector
) -> None:
    """What travels, and whether every loss can use it."""
    batch = max((job.training.batch_size or 1) // job.launch.workers, 1)
    seen = {}
    for name, model in built.items():
        role = "student" if name == "student" else "teacher"
        wanted = [s for p in plans if role == "student" or p.teacher == name for s in p.wanted(role)]
        where = "student" if name == "student" else f"teachers.{name}"
        seen[name] = collect.of(where, lambda m=model, w=wanted: shapes.signals(m, w, known, batch))
    for name, spec in job.teachers.items():
        codec = collect.of(f"teachers.{name}.codec", lambda name=name: assembly.codec(job, plans, name))
        for signal in assembly.wanted(plans, name) if codec is not None and seen[name] is not None else ():
            shape = tuple(seen[name][signal.key].shape[1:])
            size = codecs.bytes_per_sample(shape, codec, signal.kind == "logits")
            found.signals.append(SignalLine(name, signal.key, shape, spec.codec, size))
    if any(signals is None for signals in seen.values()):
        return
    classes = seen["student"]["logits"].shape[-1]
    if job.ce_weight and classes != known.num_classes:
        collect.add([f"student.model: expected logits of {known.num_classes} classes (data.num_classes), got {classes}."])
        return
    for plan in plans:
        bound = collect.of(f"losses.{plan.name}", lambda plan=plan: shapes.bind(job, plan, seen, known, batch))
        if bound is None:
            continue
        if bound[0]:
            found.connectors[plan.label] = bound[0]
        if bound[1] and job.training.accumulate > 1:
            collect.add([f"training.accumulate: {plan.name} couples the whole batch, which accumulation splits. Set it to 1."])
