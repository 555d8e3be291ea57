"""Static checks: everything that can be known to be wrong before any actor starts, all of it at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from raykd import catalogue, models
from raykd.config import Job, Network
from raykd.data.batches import Plan as Order
from raykd.data.normalise import Normalise
from raykd.data.sets import probe
from raykd.data.splits import HOLDOUT, has_split
from raykd.errors import JobFaults, RaykdError
from raykd.exchange import codec as codecs
from raykd.launch import assembly, peering, preflight, settings, shapes, stores
from raykd.launch.inspection import Inspection, RoleLine, SignalLine
from raykd.resolve import from_dict, resolve, to_dict
from raykd.roles.losses import Plan
from raykd.roles.losses import plans as connect
from raykd.roles.network import Facts, model_options
from raykd.roles.teacher import own_facts

SHOWN = 5  # faults of one split; a thousand shards may share one


def inspect(job: Job) -> Inspection:
    """Looks a job over without starting anything; faults are collected, not raised.

    A setting that is wrong by itself takes its default, so that the rest can be looked at; what depends on it is left out.
    """
    resolved, told = _resolved(job)
    if resolved is None:
        return Inspection(job, faults=told)
    found = _inspect(stores.settled(resolved), "", tuple(fault.partition(":")[0] for fault in told), {})
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


def _inspect(job: Job, path: str, spoiled: tuple[str, ...], beside: Mapping[str, Job]) -> Inspection:
    """A resolved job with its stages; `path` goes before each fault, `beside` are the stages that run before it."""
    found = Inspection(job)
    collect = _Collector(found.faults, path, spoiled)
    for check in (
        settings.names,
        settings.settings,
        settings.losses,
        settings.actors,
        settings.peers,
        settings.synthesis,
        settings.optimisation,
    ):
        collect.add(check(job))
    collect.add(settings.weights(job, tuple(beside)))
    stages = {**beside, **job.stages}
    if not collect.rests_on("data"):
        wrong, trains = _data(job)
        collect.add(wrong)
        trains = trains and not collect.told("data.test")
        known = collect.of("data", lambda: assembly.facts(job)) if trains else None
        if known is not None and assembly.makes_images(job):
            collect.of("data", lambda: assembly.check_beside(job, known))
        if known is not None and "student" not in job.teachers:
            share = len(job.peers) if job.exchange.shards == "disjoint" and job.peers else 1
            found.steps_per_epoch = _steps(job, known, collect, share)
            if job.peers and not collect.told("exchange"):
                _peers(job, known, found, collect, stages)
            elif not job.peers:
                _models(job, known, found, collect, stages)
    found.needs = [
        (need.what, need.count, need.resources.get("CPU", 0.0), need.resources.get("GPU", 0.0)) for need in preflight.needs(job)
    ]
    before = dict(beside)
    for name, stage in job.stages.items():
        found.faults += _inspect(stage, f"{path}stages.{name}.", spoiled, before).faults
        before[name] = stage
    return found


def _data(job: Job) -> tuple[list[str], bool]:
    """Faults of all splits, what several share told once; whether the training split is whole."""
    splits: dict[str, list[str]] = {}
    for split in ("train", "eval", "test"):
        if has_split(job.data, split) and getattr(job.data, split) != HOLDOUT:
            wrong = probe(job.data, split)
            more = [f"{len(wrong) - SHOWN} more faults like these."] if len(wrong) > SHOWN else []
            for fault in (f.removeprefix("data files: ").removeprefix("data file: ") for f in wrong[:SHOWN] + more):
                splits.setdefault(fault, []).append(f"data.{split}")
    found = [fault if fault.startswith("data.") else f"{', '.join(where)}: {fault}" for fault, where in splits.items()]
    found += [f"data.augmentation.{fault}" for fault in job.data.augmentation.faults()]
    return found, not any("data.train" in where for where in splits.values())


def _steps(job: Job, known: Facts, collect: _Collector, share: int = 1) -> int:
    size, training = job.training.batch_size or 1, job.training
    try:
        return Order(known.num_samples // share, size, job.data_seed, drop_last=training.drop_last).steps_per_epoch
    except RaykdError:
        most = f"expected at most the {known.num_samples} training samples, got {size}: no batch is full"
        collect.add([f"training.batch_size: {most}. Lower it, or set training.drop_last=False."])
        return 0


def _models(job: Job, known: Facts, found: Inspection, collect: _Collector, stages: Mapping[str, Job]) -> None:
    """Architectures, weights, layers, signals and connectors, by shapes alone."""
    specs: dict[str, Any] = {"student": job.student, **job.teachers}
    places = {name: "student" if name == "student" else f"teachers.{name}" for name in specs}
    built = _built(job, specs, places, known, found, collect, stages)
    if set(built) == set(specs) and "losses" not in collect.spoiled:
        plans: list[Plan] = []
        for name in job.losses:
            if not collect.told(f"losses.{name}") and not collect.rests_on(f"losses.{name}"):
                plans += collect.of(f"losses.{name}", lambda name=name: _plans(job, name, built, known)) or []
        _signals(job, plans, built, known, found, collect)
        _images(job, built, known, collect)
        for name in job.teachers:
            if not collect.told(f"teachers.{name}"):
                where = f"teachers.{name}.store"
                collect.add(collect.of(where, lambda name=name: stores.faults(job, plans, known, name)) or [])


def _built(
    job: Job,
    specs: Mapping[str, Any],
    places: Mapping[str, str],
    known: Facts,
    found: Inspection,
    collect: _Collector,
    stages: Mapping[str, Job],
) -> dict[str, shapes.Model]:
    """The models that can be built."""
    built: dict[str, shapes.Model] = {}
    for name, spec in specs.items():
        where = places[name]
        if getattr(spec, "codec", "dense") != "dense":
            collect.of(f"{where}.codec", lambda spec=spec: codecs.parse(spec.codec))
        skip = collect.rests_on(where) or collect.told(f"{where}.options")
        facts = own_facts(spec, known) if name in job.teachers else known
        model = None if skip else collect.of(where, lambda spec=spec, facts=facts: shapes.model(spec, facts))
        if model is None or not _normalises(spec, known, where, collect):
            continue
        built[name] = model
        found.roles.append(_line(job, name, spec, model.cost))
        collect.of(f"{where}.weights", lambda spec=spec, facts=facts: _weights_fit(stages, spec, facts))
    return built


def _peers(job: Job, known: Facts, found: Inspection, collect: _Collector, stages: Mapping[str, Job]) -> None:
    """As `_models`, of an online job: each peer's losses with what it hears of its neighbours."""
    specs: dict[str, Any] = {**job.peers, **job.teachers}
    places = {name: f"peers.{name}" if name in job.peers else f"teachers.{name}" for name in specs}
    built = _built(job, specs, places, known, found, collect, stages)
    if set(built) != set(specs) or "losses" in collect.spoiled:
        return
    parts = collect.of("losses", lambda: peering.parts(job, known))
    if parts is None:
        return
    batch = max((job.training.batch_size or 1) // job.launch.workers, 1)
    seen: dict[str, Any] = {}
    for name, model in built.items():
        asked = [s for part in parts.values() for plan in part.plans for s in plan.asks(name)]
        if name in parts:
            asked += [s for plan in parts[name].plans for s in (*plan.student, *plan.ema)]
        seen[name] = collect.of(places[name], lambda m=model, w=asked: shapes.signals(m, w, known, batch))
    if any(signals is None for signals in seen.values()):
        return
    codec = codecs.parse(job.exchange.codec)
    wrong = {name: seen[name]["logits"].shape[-1] for name in parts if seen[name]["logits"].shape[-1] != known.num_classes}
    if job.ce_weight and wrong:
        wanted = f"expected logits of {known.num_classes} classes (data.num_classes)"
        collect.add([f"peers.{name}.model: {wanted}, got {classes}." for name, classes in wrong.items()])
        return
    for name, part in parts.items():
        for signal in part.published if job.exchange.what == "signals" else ():
            shape = tuple(seen[name][signal.key].shape[1:])
            size = codecs.bytes_per_sample(shape, codec, signal.kind == "logits")
            found.signals.append(SignalLine(name, signal.key, shape, job.exchange.codec, size))
        own = {**seen, "student": seen[name]}
        models_of = {**built, "student": built[name]}
        for plan in part.plans:
            bound = collect.of(
                f"losses.{plan.name}",
                lambda plan=plan, part=part, own=own, near=models_of: _bound(part, plan, own, near, known, batch),
            )
            if bound is not None and bound[0]:
                found.connectors[f"{name}: {plan.label}"] = bound[0]
    found.notes += _peer_notes(job, known, built)


def _images(job: Job, built: dict[str, shapes.Model], known: Facts, collect: _Collector) -> None:
    """Whether what a job's own images minimise can be computed, and the generator makes them."""
    name = next((n for n, loss in job.losses.items() if catalogue.method(loss.method).images is not None), None)
    if name is None or collect.told(f"losses.{name}") or collect.told("synthesis.generator"):
        return
    plans = collect.of(f"losses.{name}", lambda: assembly.connect_images(job, known)) or []
    batch = max((job.training.batch_size or 1) // job.launch.workers, 1)
    seen = {}
    for role, model in built.items():
        wanted = [s for p in plans for s in (p.student if role == "student" else p.asks(role))]
        where = "student" if role == "student" else f"teachers.{role}"
        seen[role] = collect.of(where, lambda m=model, w=wanted: shapes.signals(m, w, known, batch))
    if any(signals is None for signals in seen.values()):
        return
    for plan in plans:
        collect.of(
            f"losses.{plan.name}",
            lambda plan=plan: shapes.bind(
                job, plan, seen, known, batch, images=True, more=shapes.facts_of_teacher(plan, built)
            ),
        )
    collect.of("synthesis", lambda: shapes.generator(job, known))


def _bound(
    part: peering.Part, plan: Plan, seen: Mapping[str, Any], built: Mapping[str, shapes.Model], known: Facts, batch: int
) -> tuple[int, bool]:
    shapes.check_layers(plan, built)
    return shapes.bind(part.job, plan, seen, known, batch)


def _peer_notes(job: Job, known: Facts, built: Mapping[str, shapes.Model]) -> list[str]:
    found = _notes(job, known, {**built, "student": next(iter(built.values()))})
    exchange = job.exchange
    if exchange.newest:
        found.append("exchange.staleness='newest': which copy answers depends on who is faster; not the same from run to run.")
    if exchange.codec != "dense" and exchange.what == "signals":
        found.append(f"exchange.codec: signals arrive within the error of {exchange.codec}.")
    weights = {name: built[name].cost.parameters * 4 for name in job.peers}
    if exchange.what == "weights":
        shown = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in weights.items())
        found.append(f"Weights travel every {exchange.every} steps to each that listens: {shown}.")
    return found


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
    role = "student" if name == "student" else "peer" if name in job.peers else "teacher"
    head = (name, role, spec.model, spec.weights, cost.parameters, cost.macs)
    launch = job.launch
    if name in job.peers:
        own = peering.peer_job(job, name).launch
        return RoleLine(*head, f"actor {spec.actor}" if spec.actor else "actors", launch.workers, own.cpus, own.gpus)
    if name == "student":
        return RoleLine(*head, launch.host, launch.workers, launch.cpus, launch.gpus)
    placement = f"{spec.placement}, actor {spec.actor}" if spec.actor is not None else spec.placement
    replicas = spec.replicas if spec.placement != "store" or assembly.pooled(spec) else 0
    return RoleLine(*head, placement, replicas, spec.cpus, spec.gpus)


def _weights_fit(stages: Mapping[str, Job], spec: Network, known: Facts) -> None:
    """Reads a file of weights into the model; with a stage's, the model must be the one that the stage trains."""
    if spec.weights in (None, "pretrained"):
        return
    if not str(spec.weights).startswith(assembly.STAGE):
        model = models.build(spec.model, known.num_classes, **model_options(spec, known))
        models.load_weights(model, str(spec.weights), expect_sha256=spec.weights_sha256)
        return
    name, peer = assembly.stage_of(spec.weights)
    stage = stages.get(str(name))
    if stage is None:
        return
    if peer not in (stage.peers or ("",)):
        wanted = f"'stage:{name}/<peer>' of {', '.join(stage.peers)}" if stage.peers else f"'stage:{name}', which has no peers"
        raise ValueError(f"expected {wanted}, got {spec.weights!r}. Name one.")
    taught: Network = stage.peers[peer] if peer else stage.student
    if _shapes(spec, known) == _shapes(taught, assembly.facts(stage)):
        return
    trained, got = (f"{s.model} {dict(s.options) or ''}".strip() for s in (taught, spec))
    raise ValueError(f"expected the model that {spec.weights} trains, {trained}, got {got}. Make them equal.")


def _shapes(spec: Network, known: Facts) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in assembly.meta_model(spec, known).state_dict().items()}


def _plans(job: Job, name: str, built: dict[str, shapes.Model], known: Facts) -> list[Plan]:
    """One loss connected to layers that exist."""
    alone = dataclasses.replace(job, losses={name: job.losses[name]})
    named = {role: models.stages(model.module) for role, model in built.items()}
    norms = assembly.norms(alone, known)
    plans = connect(alone, named, branches=built["student"].branches, norms=norms)
    for plan in plans:
        shapes.check_layers(plan, built)
    images = catalogue.method(job.losses[name].method).images
    read = any(s.layer for plan in plans for w in plan.wires for s in w.signals) or (images is not None and images.layers)
    if job.losses[name].layers and not read:
        raise ValueError(f"layers: {job.losses[name].method} reads no layers. Leave `layers` out.")
    return plans


def _signals(
    job: Job, plans: list[Plan], built: dict[str, shapes.Model], known: Facts, found: Inspection, collect: _Collector
) -> None:
    """What travels, and whether every loss can use it."""
    batch = max((job.training.batch_size or 1) // job.launch.workers, 1)
    seen = {}
    for name, model in built.items():
        wanted = [s for p in plans for s in ((*p.student, *p.ema) if name == "student" else p.asks(name))]
        where = "student" if name == "student" else f"teachers.{name}"
        seen[name] = collect.of(where, lambda m=model, w=wanted: shapes.signals(m, w, known, batch))
    for source, names in assembly.groups(job).items():
        codec = [collect.of(f"teachers.{name}.codec", lambda name=name: assembly.codec(job, plans, name)) for name in names]
        if any(c is None for c in codec) or any(seen[name] is None for name in names):
            continue
        asks = assembly.asks(job, plans, names)
        travels = [(ask.teacher, signal.key, ask.teacher) for ask in asks.of for signal in ask.signals]
        travels += [(source, aggregate.key, aggregate.teachers[0]) for aggregate in asks.aggregates]
        for who, key, teacher in travels:
            shape = tuple(seen[teacher][key if key in seen[teacher] else "logits"].shape[1:])
            size = codecs.bytes_per_sample(shape, codec[0], key == "logits" or key not in seen[teacher])
            found.signals.append(SignalLine(who, key, shape, job.teachers[teacher].codec, size))
    found.notes += _notes(job, known, built)
    if any(signals is None for signals in seen.values()):
        return
    classes = seen["student"]["logits"].shape[-1]
    if job.ce_weight and classes != known.num_classes:
        collect.add([f"student.model: expected logits of {known.num_classes} classes (data.num_classes), got {classes}."])
        return
    for plan in plans:
        bound = collect.of(
            f"losses.{plan.name}",
            lambda plan=plan: shapes.bind(job, plan, seen, known, batch, more=shapes.pieces_of(plan, built, known)),
        )
        if bound is None:
            continue
        if bound[0]:
            found.connectors[plan.label] = bound[0]
        if bound[1] and job.training.accumulate > 1:
            collect.add([f"training.accumulate: {plan.name} couples the whole batch, which accumulation splits. Set it to 1."])


def _notes(job: Job, known: Facts, built: dict[str, shapes.Model]) -> list[str]:
    """Where the result is not the same bit for bit wherever the job runs, and what a setting costs elsewhere."""
    found = []
    networks: dict[str, Network] = {"student": job.student, **job.teachers}
    half = [name for name, spec in networks.items() if spec.dtype == "bfloat16"]
    if half:
        found.append(f"{', '.join(half)} in bfloat16: the same within tolerance wherever they run, not bit for bit.")
    if job.launch.gpus or any(t.gpus for t in job.teachers.values()):
        found.append("GPUs: kernels choose their own order of addition; the same within tolerance, not bit for bit.")
    norms = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in built["student"].module.modules())
    if job.launch.workers > 1 and norms and not job.training.sync_batchnorm:
        found.append(
            f"{job.launch.workers} workers: each one's batch norm sees its own share of the batch, so another number of "
            "workers is another result. Statistics are averaged before each evaluation."
        )
    if assembly.tells_of_data(job):
        found.append(f"Real data: {assembly.real_data(job)}, beside the images it is measured on.")
    for name, teacher in job.teachers.items():
        if teacher.codec != "dense":
            found.append(f"teachers.{name}: signals arrive within the error of {teacher.codec}; the largest is in the result.")
        if teacher.inputs == "recipe" and teacher.placement == "pool":
            size = (job.training.batch_size or 1) // job.launch.workers
            image = known.shape[0] * known.shape[1] * known.shape[2]
            found.append(
                f"teachers.{name}: recipes send 12 bytes a sample instead of {image:,}; its replicas read and augment {size} "
                "images a request themselves, and decode the training set once on each node."
            )
    return found
