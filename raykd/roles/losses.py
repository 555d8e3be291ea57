"""Losses at work: the job's methods with their options, signals, connectors and schedules bound."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raykd import catalogue
from raykd.config import Job, Loss
from raykd.data.keys import derive, torch_generator
from raykd.errors import ConfigError, RaykdError, SignalError, near, told
from raykd.roles.network import Facts
from raykd.roles.optimisation import world_size
from raykd.signals import Signal, Signals, Wire, wires

Layers = Mapping[str, list[str]]


@dataclass(frozen=True)
class Plan:
    """One loss of a job listening to one teacher (None: to the student only): what to call and with what."""

    name: str
    loss: Loss
    method: catalogue.Method
    teacher: str | None
    share: float
    wires: tuple[Wire, ...]

    @property
    def label(self) -> str:
        """Name in metrics and checkpoints: `kd`, or `kd.resnet56` where the loss listens to several teachers."""
        return self.name if self.teacher is None or self.share == 1.0 else f"{self.name}.{self.teacher}"

    def wanted(self, role: str) -> list[Signal]:
        """What this loss asks of a role."""
        return [s for w in self.wires if w.parameter.role == role for s in w.signals]


def plans(job: Job, stages: Mapping[str, list[str]]) -> list[Plan]:
    """Connects every loss of a resolved job.

    Args:
        job: resolved.
        stages: "student" and each teacher's name -> names of that model's stages, for layers="stages".

    Raises:
        SignalError, ConfigError: a loss cannot be connected; the message names it.
    """
    found = []
    for name, loss in job.losses.items():
        method = catalogue.method(loss.method)
        listens = any(p.startswith("teacher_") for p in method.parameters)
        teachers: list[str | None] = list(loss.teachers or job.teachers) if listens else [None]
        if not teachers:
            raise ConfigError(f"losses.{name}: {method.slug} listens to a teacher and the job has none. Add one to `teachers`.")
        total = sum(job.teachers[t].weight for t in teachers if t is not None) or 1.0
        for teacher in teachers:
            share = job.teachers[teacher].weight / total if teacher is not None else 1.0
            layers = {
                "student": _layers(loss, "student", stages["student"]),
                "teacher": _layers(loss, "teacher", stages[teacher]) if teacher is not None else (),
            }
            try:
                wired = wires(method.parameters, layers, loss.options, catalogue.derived())
                _check_roles(wired, method.scheme)
                _check_pairs(wired, loss, layers)
            except SignalError as error:
                raise SignalError(f"losses.{name}: {error}") from None
            found.append(Plan(name, loss, method, teacher, share, wired))
    return found


def _layers(loss: Loss, role: str, stages: list[str]) -> tuple[str, ...]:
    named = loss.layers.get(role, ()) if isinstance(loss.layers, Mapping) else (loss.layers or ())
    return tuple(stages) if named == ("stages",) else tuple(named)


def _check_roles(wired: tuple[Wire, ...], scheme: str) -> None:
    for wire in wired:
        if wire.parameter.role not in ("student", "teacher"):
            raise SignalError(
                f"{wire.parameter.name}: expected a signal of student or teacher, got one of {wire.parameter.role} "
                f"({scheme} scheme). Nothing answers for that role here."
            )


def _check_pairs(wired: tuple[Wire, ...], loss: Loss, layers: Mapping[str, tuple[str, ...]]) -> None:
    roles = {w.parameter.role for w in wired if w.parameter.plural}
    if {"student", "teacher"} <= roles and len(layers["student"]) != len(layers["teacher"]):
        raise SignalError(
            f"layers: expected as many of the student as of the teacher, got {list(layers['student'])} and "
            f"{list(layers['teacher'])}. Name the pairs: layers={{'student': (...), 'teacher': (...)}}."
        )
    if roles and not layers["student"]:
        raise SignalError(f"layers: {loss.method} reads layers and neither job nor method names any. Set `layers`.")


def schedule(text: str) -> Callable[[float], float]:
    """A loss's weight over time, as a factor of the epoch (a float, from 0).

    `constant`; `linear(E)`: min(e / E, 1); `sigmoid(E)`: exp(-5 (1 - e/E)^2) up to 1 (Laine and Aila, arXiv:1610.02242);
    `stop(E)`: 1 before epoch E, 0 from it on; `decay(E)`: from 1 down to 0 at epoch E, linearly.

    Raises:
        ConfigError: no such schedule.
    """
    match = re.fullmatch(r"(linear|sigmoid|stop|decay)\((\d+(?:\.\d+)?)\)", text)
    if text == "constant":
        return lambda _: 1.0
    if match is None or float(match.group(2)) <= 0:
        raise ConfigError(f"schedule: expected constant, linear(E), sigmoid(E), stop(E) or decay(E) with E > 0, got {text!r}.")
    kind, length = match.group(1), float(match.group(2))
    if kind == "linear":
        return lambda e: min(e / length, 1.0)
    if kind == "sigmoid":
        return lambda e: math.exp(-5.0 * (1.0 - e / length) ** 2) if e < length else 1.0
    if kind == "stop":
        return lambda e: 1.0 if e < length else 0.0
    return lambda e: max(1.0 - e / length, 0.0)


class BoundLoss(nn.Module):
    """A loss ready to be called every step; its parameters are connectors, its buffers memory.

    Args:
        plan: what it listens to.
        shapes: role -> key -> shape without the batch axis, from the probe batch.
        facts: of the training set.
        labels: of the training set, `[n]` int64.
        job: for seed and dtype.
    """

    def __init__(
        self, plan: Plan, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], facts: Facts, labels: Tensor, job: Job
    ) -> None:
        super().__init__()
        self.plan = plan
        self.seed = job.seed
        self.weight = float(plan.loss.options["weight"]) * plan.share
        self.factor = schedule(str(plan.loss.options["schedule"]))
        self._facts = {"num_samples": facts.num_samples, "num_classes": facts.num_classes, "dataset_labels": labels}
        called = plan.method.accepts.get("forward" if plan.method.trains else "loss", ())
        self._options = self._chosen(called)
        self._target = plan.method.call()
        self.module: nn.Module | None = self._build(self._target, shapes) if plan.method.trains else None

    def forward(
        self, batch: Mapping[str, Tensor], signals: Mapping[str, Signals], epoch: int, step: int, rank: int, chunk: int = 0
    ) -> dict[str, Tensor]:
        """Terms of this loss, unweighted: name -> `[b]`, or `[]` where the loss couples the batch.

        Args:
            batch: fields of the batch.
            signals: role -> key -> tensor.
            epoch: from 0.
            step: global, from 0.
            rank: of this worker; keys the loss's randomness.
            chunk: part of an accumulated batch; keys it too.

        Raises:
            SignalError: the batch lacks a field, or the loss itself failed; the message says where.
        """
        values = {w.parameter.name: w.pick(signals[w.parameter.role]) for w in self.plan.wires}
        for name in self.plan.method.parameters:
            if name not in values:
                values[name] = self._plain(name, batch, epoch, step, (rank, chunk))
        try:
            found = self._called()(**values, **self._options)
        except RaykdError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and world_size() > 1:  # another worker may have gone: the host starts anew
                raise
            raise SignalError(
                f"losses.{self.plan.name}: {self.plan.method.slug} failed with {told(error, str(self.plan.method.path))}."
            ) from error
        return found if isinstance(found, dict) else {"": found}

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

    def _build(self, target: Any, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> nn.Module:
        by_name = {w.parameter.name: w.pick(dict(shapes[w.parameter.role])) for w in self.plan.wires}
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
