"""Losses at work: the job's methods with their options, signals, connectors and schedules bound."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raykd import catalogue
from raykd.config import Job, Loss
from raykd.data.keys import derive, torch_generator
from raykd.errors import ConfigError, RaykdError, SignalError, near, told
from raykd.parts.aggregators import aggregators
from raykd.parts.branches import sigmoid_ramp
from raykd.roles.network import Facts
from raykd.roles.optimisation import world_size
from raykd.signals import CLASSES, LIST_ROLES, LOCAL, SOURCES, Aggregate, Signal, Wire, entering, is_norm, wires


@dataclass(frozen=True)
class Plan:
    """One loss of a job, connected: what to call and with what.

    It listens to nobody but the student, to one teacher, or to several: as a list (`teachers_...`) or as one aggregate.
    `teachers` may be peers, whatever the loss calls them.
    """

    name: str
    loss: Loss
    method: catalogue.Method
    teachers: tuple[str, ...]
    share: float
    wires: tuple[Wire, ...]
    aggregate: Aggregate | None = None
    classes: tuple[tuple[int, ...] | None, ...] = ()  # label_map of each teacher
    student_layers: tuple[str, ...] = ()
    late: bool = False  # what it hears is there only after the student's forward: of peers, of branches

    @property
    def label(self) -> str:
        """Name in metrics and checkpoints: `kd`, or `kd.resnet56` where the loss is applied to several teachers in turn."""
        return self.name if len(self.teachers) != 1 or self.share == 1.0 else f"{self.name}.{self.teachers[0]}"

    @property
    def lists(self) -> bool:
        """Whether it takes lists over teachers."""
        return any(w.parameter.role in LIST_ROLES for w in self.wires)

    @property
    def role(self) -> str | None:
        """What it calls whom it listens to: teacher, teachers, peer or peers."""
        return self.method.teacher_role

    @property
    def student(self) -> list[Signal]:
        """What it asks of the student."""
        return [s for w in self.wires if w.parameter.role == "student" for s in w.signals]

    @property
    def ema(self) -> list[Signal]:
        """What it asks of the student's averaged copy."""
        return [s for w in self.wires if w.parameter.role == "ema" for s in w.signals]

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """The layers it reads of its one teacher."""
        layered = (w.of(0) for w in self.wires if w.parameter.role == "teacher" and w.parameter.plural)
        return tuple(str(signal.layer) for signal in next(layered, ()))

    def reads(self, name: str) -> bool:
        """Whether it is called, or built, with a value of this name."""
        return name in (*self.method.parameters, *self.method.build_parameters, *self.method.judged)

    def asks(self, teacher: str) -> list[Signal]:
        """What it asks of a teacher."""
        if teacher not in self.teachers:
            return []
        place = self.teachers.index(teacher) if self.lists else 0
        return [s for w in self.wires if w.parameter.role in SOURCES for s in w.of(place)]


@dataclass(frozen=True)
class Neighbour:
    """A peer that a learner listens to: its share, the losses that hear it (empty: all), and its model's branches."""

    weight: float = 1.0
    losses: tuple[str, ...] = ()
    branches: int = 1


def plans(
    job: Job,
    stages: Mapping[str, list[str]],
    neighbours: Mapping[str, Neighbour] | None = None,
    branches: int = 1,
    norms: Mapping[str, list[str]] | None = None,
) -> list[Plan]:
    """Connects every loss of a resolved job.

    Args:
        job: resolved.
        stages: "student", each teacher's and each neighbour's name -> names of that model's stages, for layers="stages".
        neighbours: the peers that the student listens to.
        branches: of the student.
        norms: model -> its batch norms, for losses that read them; as `stages`.

    Raises:
        SignalError, ConfigError: a loss cannot be connected; the message names it.
    """
    found = []
    beside = neighbours or {}
    for name, loss in job.losses.items():
        method = catalogue.method(loss.method)
        role = method.teacher_role
        peers = {p: peer for p, peer in beside.items() if not peer.losses or name in peer.losses}
        everyone = {t: Neighbour(spec.weight) for t, spec in job.teachers.items()} | peers
        names = heard(loss, method, job.teachers, peers)
        if role and not names:
            if job.peers or neighbours is not None:
                continue  # this peer listens to nobody by this loss
            raise ConfigError(f"losses.{name}: {method.slug} listens to {_article(role)} and the job has none. {_remedy(role)}")
        try:
            found += _plans(name, loss, method, role, {t: everyone[t] for t in names}, job, stages, branches, norms)
            _check_views(method)
        except SignalError as error:
            raise SignalError(f"losses.{name}: {error}") from None
    return found


def heard(loss: Loss, method: catalogue.Method, teachers: Collection[str], peers: Collection[str]) -> tuple[str, ...]:
    """Whom a loss listens to, of frozen teachers and of the peers beside: those it names, else the peers where it is of peers
    or there are no teachers, else the teachers; nobody where it reads the student alone."""
    role = method.teacher_role
    if role is None:
        return ()
    if loss.teachers:
        return tuple(t for t in loss.teachers if t in teachers or t in peers)
    return tuple(peers if SOURCES[role] == "peers" or not teachers else teachers)


def image_plans(
    job: Job, stages: Mapping[str, list[str]], branches: int = 1, norms: Mapping[str, list[str]] | None = None
) -> list[Plan]:
    """Connects what the images of a job minimise that makes its own; none where it has data.

    Raises:
        SignalError, ConfigError: the loss cannot be connected; the message names it.
    """
    for name, loss in job.losses.items():
        method = catalogue.method(loss.method).images
        if method is None:
            continue
        role = method.teacher_role
        names = {t: Neighbour(job.teachers[t].weight) for t in heard(loss, method, job.teachers, ())}
        if role and not names:
            raise ConfigError(f"losses.{name}: {method.slug} listens to a teacher and the job has none. {_remedy(role)}")
        try:
            return _plans(name, loss, method, role, names, job, stages, branches, norms)
        except SignalError as error:
            raise SignalError(f"losses.{name}: {error}") from None
    return []


def _article(role: str) -> str:
    return "a peer" if SOURCES[role] == "peers" else "a teacher"


def _remedy(role: str) -> str:
    return "Add two or more to `peers`." if SOURCES[role] == "peers" else "Add one to `teachers`."


def _plans(
    name: str,
    loss: Loss,
    method: catalogue.Method,
    role: str | None,
    heard: Mapping[str, Neighbour],
    job: Job,
    stages: Mapping[str, list[str]],
    branches: int,
    norms: Mapping[str, list[str]] | None,
) -> list[Plan]:
    normed = {model: tuple(names) for model, names in (norms or {}).items()}
    own = _layers(loss, "student", stages, normed)
    teachers = tuple(heard)
    theirs = {t: _layers(loss, t, stages, normed) for t in teachers}
    weights = {t: neighbour.weight for t, neighbour in heard.items()}
    late = any(t not in job.teachers for t in teachers) or any(p.branches for p in method.signals)

    def plan(of: tuple[str, ...], share: float, aggregate: Aggregate | None = None) -> Plan:
        layers: dict[str, tuple[Any, ...]] = {"student": own, "ema": own}
        read: dict[str, Any] = {"student": normed.get("student", ()), "ema": normed.get("student", ())}
        counts: dict[str, Any] = {"student": branches, "ema": branches}
        if role is not None:
            lists = role in LIST_ROLES
            one = theirs[of[0]] if of and aggregate is None else ()
            layers[role] = tuple(theirs[t] for t in of) if lists else one
            own_norms = tuple(normed.get(t, ()) for t in of)
            read[role] = own_norms if lists else own_norms[0]
            counts[role] = tuple(heard[t].branches for t in of) if lists else heard[of[0]].branches
        wired = wires(method.parameters, layers, loss.options, catalogue.derived(), catalogue.views(), counts, read)
        _check_roles(wired, method)
        for layer_names in [theirs[t] for t in of] or [()]:
            _check_pairs(wired, loss, own, layer_names)
        classes = tuple(job.teachers[t].label_map if t in job.teachers else None for t in of)
        return Plan(name, loss, method, of, share, wired, aggregate, classes, own, late)

    if loss.aggregate is not None:
        if [p.name for p in method.signals if p.role in SOURCES] not in (["teacher_logits"], ["peer_logits"]):
            wanted = "a loss whose only signal of a teacher is teacher_logits"
            raise SignalError(f"aggregate: expected {wanted}, got {method.slug}. Leave `aggregate` out.")
        temperature = float(loss.options.get("temperature", 1.0))
        return [plan(teachers, 1.0, Aggregate(_aggregator(loss.aggregate), teachers, tuple(weights.values()), temperature))]
    if role is None or role in LIST_ROLES:
        return [plan(teachers, 1.0)]
    total = sum(weights.values()) or 1.0
    return [plan((t,), weights[t] / total) for t in teachers]


def _aggregator(name: str) -> str:
    known = aggregators()
    if name not in known:
        raise SignalError(f"aggregate: no aggregator {name!r}. {near(name, known)}")
    return name


def _layers(loss: Loss, model: str, stages: Mapping[str, list[str]], norms: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The layers a loss reads of the student, or of a teacher: of its own name where the loss names it, else of all.

    `stages` stands for all stages of the model, `norms` for what enters its batch norms.
    """
    if isinstance(loss.layers, Mapping):
        others = loss.layers.get("teacher", loss.layers.get("peer", ()))
        named = loss.layers.get(model, others if model != "student" else ())
    else:
        named = loss.layers or ()
    if tuple(named) == ("norms",):
        return tuple(entering(name) for name in norms.get(model, ()))
    return tuple(stages[model]) if tuple(named) == ("stages",) else tuple(named)


def _check_views(method: catalogue.Method) -> None:
    for parameter in method.signals:
        if LOCAL in (parameter.view or "").split("_"):
            raise SignalError(
                f"{parameter.name}: expected a view of images that a student learns from, got {LOCAL!r}. That view is there "
                "where images are made: read it in `images_loss`."
            )


def _check_roles(wired: tuple[Wire, ...], method: catalogue.Method) -> None:
    for wire in wired:
        if wire.parameter.role not in ("student", "ema", *SOURCES):
            raise SignalError(
                f"{wire.parameter.name}: expected a signal of student, ema, teacher or peer, got one of {wire.parameter.role} "
                f"({method.scheme} scheme). Nothing answers for that role here."
            )


def _check_pairs(wired: tuple[Wire, ...], loss: Loss, own: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    known = catalogue.derived()
    roles = {w.parameter.role.rstrip("s") for w in wired if w.parameter.plural and not is_norm(w.parameter.kind, known)}
    if "student" in roles and roles & {"teacher", "peer"} and len(own) != len(theirs):
        raise SignalError(
            f"layers: expected as many of the student as of the teacher, got {list(own)} and "
            f"{list(theirs)}. Name the pairs: layers={{'student': (...), 'teacher': (...)}}."
        )
    if roles and not own:
        raise SignalError(f"layers: {loss.method} reads layers and neither job nor method names any. Set `layers`.")


def schedule(text: str) -> Callable[[float], float]:
    """A loss's weight over time, as a factor of the epoch (a float, from 0).

    `constant`; `linear(E)`: min(e / E, 1); `sigmoid(E)`: exp(-5 (1 - e/E)^2) up to 1 (Laine and Aila, arXiv:1610.02242);
    `stop(E)`: 1 before epoch E, 0 from it on; `start(E)`: 0 before epoch E, 1 from it on; `decay(E)`: from 1 down to 0 at
    epoch E, linearly.

    Raises:
        ConfigError: no such schedule.
    """
    match = re.fullmatch(r"(linear|sigmoid|stop|start|decay)\((\d+(?:\.\d+)?)\)", text)
    if text == "constant":
        return lambda _: 1.0
    if match is None or float(match.group(2)) <= 0:
        known = "constant, linear(E), sigmoid(E), stop(E), start(E) or decay(E) with E > 0"
        raise ConfigError(f"schedule: expected {known}, got {text!r}.")
    kind, length = match.group(1), float(match.group(2))
    if kind == "linear":
        return lambda e: min(e / length, 1.0)
    if kind == "sigmoid":
        return lambda e: sigmoid_ramp(e, length)
    if kind == "stop":
        return lambda e: 1.0 if e < length else 0.0
    if kind == "start":
        return lambda e: 0.0 if e < length else 1.0
    return lambda e: max(1.0 - e / length, 0.0)


class BoundLoss(nn.Module):
    """A loss ready to be called every step; its parameters are connectors, its buffers memory.

    Args:
        plan: what it listens to.
        shapes: role -> key -> shape without the batch axis, from the probe batch; for `teachers` one such mapping a teacher.
        facts: of the training set.
        labels: of the training set, `[n]` int64.
        job: for seed and dtype.
        more: facts of the teacher, and parts of the networks, by name.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Mapping[str, Any],
        facts: Facts,
        labels: Tensor,
        job: Job,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.seed = job.seed
        self.weight = float(plan.loss.options["weight"]) * plan.share
        self.factor = schedule(str(plan.loss.options["schedule"]))
        self._num_classes = facts.num_classes
        self._workers = world_size()  # now: the group may be gone by the time one of them is lost
        self._sizes = {"images": tuple(facts.shape), "latents": (job.synthesis.latent or 1,)}
        self._facts = {"num_samples": facts.num_samples, "num_classes": facts.num_classes, "dataset_labels": labels}
        self._facts |= more or {}
        called = plan.method.accepts.get("forward" if plan.method.trains else "loss", ())
        self._options = self._chosen(called)
        self._target = plan.method.call()
        self.module: nn.Module | None = self._build(self._target, shapes) if plan.method.trains else None

    def forward(
        self,
        batch: Mapping[str, Tensor],
        signals: Mapping[str, Any],
        epoch: int,
        step: int,
        rank: int,
        chunk: int = 0,
        of: tuple[int, ...] = (),
    ) -> dict[str, Tensor]:
        """Terms of this loss, unweighted: name -> `[b]`, or `[]` where the loss couples the batch.

        Args:
            batch: fields of the batch.
            signals: role -> key -> tensor; for `teachers` a list of such mappings.
            epoch: from 0.
            step: global, from 0.
            rank: of this worker; keys the loss's randomness.
            chunk: part of an accumulated batch; keys it too.
            of: places of the plan's teachers that are in `signals`; empty: all.

        Raises:
            SignalError: the batch lacks a field, or the loss itself failed; the message says where.
        """
        there = of or tuple(range(len(self.plan.teachers)))
        values = self.values(signals, there)
        for name in self.plan.method.parameters:
            if name == CLASSES:
                values[name] = [self._classes(i, batch["labels"].device) for i in there]
            elif name not in values:
                values[name] = self._plain(name, batch, epoch, step, (rank, chunk))
        try:
            found = self._called()(**values, **self._options)
        except RaykdError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and self._workers > 1:  # another worker may have gone: the host starts anew
                raise
            raise SignalError(
                f"losses.{self.plan.name}: {self.plan.method.slug} failed with {told(error, str(self.plan.method.path))}."
            ) from error
        return found if isinstance(found, dict) else {"": found}

    def values(self, signals: Mapping[str, Any], there: tuple[int, ...] | None = None) -> dict[str, Any]:
        """This loss's signals by parameter name, of the roles that are in `signals`."""
        found = {
            w.parameter.name: w.pick(signals[w.parameter.role], there) for w in self.plan.wires if w.parameter.role in signals
        }
        return {name: self._seen(name, value) for name, value in found.items()}

    def _seen(self, name: str, value: Any) -> Any:
        """The student's logits at the classes of the loss's one teacher, where it knows others; any other value as it is."""
        classes = self.plan.classes[0] if self.plan.classes and not self.plan.lists else None
        if classes is None or name != "student_logits":
            return value
        if isinstance(value, Tensor):
            return value.index_select(-1, torch.tensor(classes, device=value.device))
        return (*value[:-1], len(classes))

    def _classes(self, place: int, device: torch.device) -> Tensor:
        own = self.plan.classes[place]
        return torch.tensor(own if own is not None else range(self._num_classes), device=device)

    def _called(self) -> Any:
        return self._target if self.module is None else self.module

    def _plain(self, name: str, batch: Mapping[str, Tensor], epoch: int, step: int, place: tuple[int, int]) -> Any:
        if name == "generator":
            return torch_generator(self.seed, "loss", self.plan.label, step, *place)
        if name in ("epoch", "step"):
            return epoch if name == "epoch" else step
        if name in self._facts:
            return self._facts[name]
        if name not in batch:
            raise SignalError(f"losses.{self.plan.name}: the batch has no field {name!r}. It has {', '.join(batch)}.")
        return batch[name]

    def _chosen(self, names: tuple[str, ...]) -> dict[str, Any]:
        options = self.plan.loss.options
        return {n: options[n] for n in names if n in options and n not in catalogue.RESERVED}

    def _build(self, target: Any, shapes: Mapping[str, Any]) -> nn.Module:
        by_name = self.values(shapes)
        by_name |= {CLASSES: [self._classes(i, torch.device("cpu")) for i in range(len(self.plan.teachers))]} | self._sizes
        arguments = {n: by_name[n] if n in by_name else self._fact(n) for n in self.plan.method.build_parameters}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "connector", self.plan.label))
            return target(**arguments, **self._chosen(self.plan.method.accepts.get("__init__", ())))

    def _fact(self, name: str) -> Any:
        if name not in self._facts:
            wanted = f"a signal of forward() or one of {', '.join(self._facts)}"
            raise SignalError(f"{self.plan.method.slug}: expected {wanted}, got {name!r}. {near(name, self._facts)}")
        return self._facts[name]

    def prepare(self) -> None:
        """Runs the method's `prepare` once, before step 0."""
        if "prepare" in self.plan.method.hooks:
            hook = self.plan.method.imported().prepare
            names = hook.__code__.co_varnames[1 : hook.__code__.co_argcount]
            hook(self._called(), **{n: self._fact(n) for n in names})

    def on_epoch(self, epoch: int) -> None:
        """Runs the method's `on_epoch` before each epoch."""
        if "on_epoch" in self.plan.method.hooks:
            self.plan.method.imported().on_epoch(self._called(), epoch)

    def targets(self, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The field `targets` of a batch that is to be made, where the method has a hook of that name.

        Args:
            labels: the classes wanted, `[b]` int64.
            generator: on the CPU; what is drawn follows from it.
        """
        if "targets" not in self.plan.method.hooks or self.plan.method.attribute != catalogue.IMAGES_LOSS:
            return {}
        return {"targets": self.plan.method.imported().targets(self._called(), labels, generator)}

    def critics(self, batch: Mapping[str, Tensor], epoch: int, step: int, rank: int) -> dict[str, Tensor]:
        """What each critic of images that are made minimises, by its name in the Module: `[b]`; none without the hook.

        Args:
            batch: its fields, without a graph.
            epoch: from 0.
            step: the generator's, from 0.
            rank: of this worker.
        """
        names = self.plan.method.judged
        if not names:
            return {}
        values = {name: self._plain(name, batch, epoch, step, (rank, 1)) for name in names}
        found: dict[str, Tensor] = self.plan.method.imported().critics(self._called(), **values)
        return found

    def step(self, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
        """Runs the method's `step`, an update of its own, at the start of each training step."""
        if "step" in self.plan.method.hooks:
            self.plan.method.imported().step(self._called(), learner, batch, signals)

    def after_forward(self, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
        """Runs the method's `after_forward`, an update of its own (a critic's), between the student's forward and the loss."""
        if "after_forward" in self.plan.method.hooks:
            self.plan.method.imported().after_forward(self._called(), learner, batch, signals)

    def before_forward(self, modify: Callable[[int, Callable[[Tensor], Tensor]], None], signals: Mapping[str, Any]) -> None:
        """Runs the method's `before_forward`, which may replace outputs of the student's layers in the coming forward."""
        if "before_forward" in self.plan.method.hooks:
            self.plan.method.imported().before_forward(self._called(), modify, **self.values(signals))
