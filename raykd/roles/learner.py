"""The learner: a student, its losses and its optimizer; one call is one optimizer step.

A student that exchanges signals with peers pauses in the middle of its step: `stepping` yields what it publishes, and goes on
with what its peers have published.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.hooks import RemovableHandle

from raykd.config import Job
from raykd.data.batches import VIEW
from raykd.data.keys import derive
from raykd.errors import ConfigError, DivergenceError, SignalError
from raykd.models.taps import replace_output
from raykd.roles.hearing import Heard, hear, with_aggregates
from raykd.roles.losses import BoundLoss, Plan
from raykd.roles.network import Facts, Tapped, build, input_shape, own_dtype
from raykd.roles.optimisation import all_sum, average_buffers, optimizer, rate, sync_gradients, world_size
from raykd.roles.pieces import pieces
from raykd.roles.teacher import own_facts
from raykd.signals import EMA, Signal, Signals

TeacherSignals = Mapping[str, Signals]  # teacher, peer, or key of an aggregate -> its signals
Exchange = Generator[Signals, TeacherSignals, Any]
"""Yields what the student publishes for a batch and is sent what its peers have published."""


@dataclass
class StepReport:
    """What one step did; sums over all workers."""

    loss: float
    terms: dict[str, float] = field(default_factory=dict)
    grad_norms: dict[str, float] = field(default_factory=dict)
    lr: float = 0.0
    stop: bool = False


class Learner:
    """Trains a student.

    Everything trainable, connectors included, is synchronised over the workers with explicit sums in fixed order. Randomness of
    a step (dropout, a loss's draws) is keyed by (seed, step, rank), so a resumed run repeats it.

    Args:
        job: resolved.
        plans: the job's losses, connected.
        facts: of the training data.
        labels: of the training set, `[n]`.
        device: where the student lives.
        steps_per_epoch: of the training loader.
        rank: of this worker.
        published: signals that its peers ask of the student.
    """

    def __init__(
        self,
        job: Job,
        plans: list[Plan],
        facts: Facts,
        labels: Tensor,
        device: torch.device,
        steps_per_epoch: int,
        rank: int = 0,
        published: Sequence[Signal] = (),
    ) -> None:
        self.job, self.rank, self.device = job, rank, device
        self.published = tuple(published)
        self.facts, self.labels, self.plans = facts, labels, plans
        self.steps_per_epoch = steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(job.seed, "student"))
            self.student = build(job.student, facts, device)
        if job.training.sync_batchnorm and world_size() > 1 and device.type == "cuda":
            self.student = nn.SyncBatchNorm.convert_sync_batchnorm(self.student)
        wanted = [s for plan in plans for s in plan.student] + [s for s in self.published if EMA not in s.views]
        wanted += [Signal("logits")] if job.ce_weight else []
        self.tapped = Tapped(job.student, self.student, wanted, facts, device)
        self.ema = self._averaged()
        self.ema_tapped = self._tapped_ema()
        self.losses: dict[str, BoundLoss] = {}
        self.rate = rate(job.training)
        self.step_count = 0

    def _averaged(self) -> AveragedModel | None:
        decay, warm = self.job.training.ema, self.job.training.ema_warmup
        if decay is None:
            return None

        @torch.no_grad()
        def average(ema: Any, model: Any, count: Any) -> None:
            now = min(decay, 1 - 1 / (int(count) + 1)) if warm else decay
            get_ema_multi_avg_fn(now)(ema, model, count)

        found = AveragedModel(self.student, multi_avg_fn=average, use_buffers=True)
        found.n_averaged.fill_(1)  # it begins as a copy
        found.module.eval()
        return found

    def _tapped_ema(self) -> Tapped | None:
        """What answers for the averaged copy; None where nobody asks."""
        asked = [s for plan in self.plans for s in plan.ema]
        asked += [without_ema(s) for s in self.published if EMA in s.views]
        if not asked:
            return None
        if self.ema is None:
            raise ConfigError("training.ema: a loss reads the averaged copy, and there is none. Set its decay, such as 0.999.")
        self.ema.module.requires_grad_(False)
        return Tapped(self.job.student, self.ema.module, asked, self.facts, self.device)

    def probing(self, batch: Mapping[str, Tensor], teacher_signals: TeacherSignals) -> Exchange:
        """Builds the connectors from the shapes of a probe batch; nothing of the student changes.

        Raises:
            SignalError: shapes that a loss cannot use.
        """
        modes = {m: m.training for m in self.student.modules()}
        self.student.eval()
        with torch.no_grad():
            student = self.tapped(batch["images"], views=_views(batch))
        for module, mode in modes.items():
            module.training = mode
        ema = self._ema_signals(batch)
        found = dict(teacher_signals)
        if self.exchanges:
            found |= yield self._publish(student, ema)
        answers = with_aggregates(self.plans, found, _on_cpu(batch), self.job.data_seed)
        for plan in self.plans:
            heard = hear(plan, self.plans, answers)
            roles = {"student": student, "ema": ema} | (heard.roles if heard is not None else {})
            try:
                shapes = {role: shapes_of(found) for role, found in roles.items()}
                bound = BoundLoss(plan, shapes, self.facts, self.labels, self.job, self._pieces(plan))
            except (SignalError, ValueError) as error:
                raise SignalError(f"losses.{plan.name}: {error}") from None
            bound.to(self.device, own_dtype(self.job.student)).prepare()
            self.losses[plan.label] = bound
        self.optimizer = optimizer(self.job.training, [self.student, *self.losses.values()])
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def _pieces(self, plan: Plan) -> dict[str, Any]:
        """Blocks of the student and tails of a frozen copy of the teacher, where the loss is built with them."""
        spec = self.job.teachers[plan.teachers[0]] if plan.teachers and plan.teachers[0] in self.job.teachers else None
        if spec is None:
            return {}
        facts = own_facts(spec, self.facts)
        shapes = input_shape(self.job.student, self.facts), input_shape(spec, facts)
        with torch.random.fork_rng(devices=[]):
            return pieces(plan, self.student, lambda: build(spec, facts, self.device), *shapes)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.job.training.steps(self.steps_per_epoch)

    def bind(self, batch: Mapping[str, Tensor], teacher_signals: TeacherSignals) -> None:
        """`probing` of a student without peers."""
        alone(self.probing(batch, teacher_signals))

    @property
    def exchanges(self) -> bool:
        """Whether it publishes to peers or listens to them."""
        teachers = {t for plan in self.plans for t in plan.teachers}
        return bool(self.published or teachers - set(self.job.teachers))

    def _publish(self, student: Signals, ema: Signals) -> Signals:
        kept = {s.key: student[s.key] for s in self.published if EMA not in s.views}
        return kept | {s.key: ema[without_ema(s).key] for s in self.published if EMA in s.views}

    def _ema_signals(self, batch: Mapping[str, Tensor]) -> Signals:
        if self.ema_tapped is None:
            return {}
        with torch.no_grad():
            return self.ema_tapped(batch["images"], views=_views(batch))

    def step(
        self, batch: Mapping[str, Tensor], teacher_signals: TeacherSignals, global_count: int, stop: bool = False
    ) -> StepReport:
        """`stepping` of a student without peers."""
        report: StepReport = alone(self.stepping(batch, teacher_signals, global_count, stop, exchange=False))
        return report

    def stepping(
        self,
        batch: Mapping[str, Tensor],
        teacher_signals: TeacherSignals,
        global_count: int,
        stop: bool = False,
        exchange: bool = True,
    ) -> Generator[Signals, TeacherSignals, StepReport]:
        """One optimizer step on this worker's whole batch.

        Args:
            batch: fields of this worker's batch, images uint8.
            teacher_signals: teacher (or key of an aggregate) -> signals of that batch; one that has gone is left out.
            global_count: samples in the batches of all workers together.
            stop: this worker was asked to stop; the report says whether any was.
            exchange: whether it pauses, after the student's forward, for the exchange with its peers.

        Raises:
            DivergenceError: a term is not finite; nothing was updated.
        """
        epoch = self.step_count // self.steps_per_epoch
        report = StepReport(0.0, lr=self._set_rate())
        measure = self._measures_gradients()
        self.student.train()
        self._reseed("step")
        self.optimizer.zero_grad(set_to_none=True)
        chunks = self.job.training.accumulate
        gradients: dict[str, Tensor] = {}
        answers = with_aggregates([p for p in self.plans if not p.late], teacher_signals, batch, self.job.data_seed)
        for chunk, (part, signals) in enumerate(_chunks(batch, answers, chunks, self.device)):
            terms = yield from self._terms(part, signals, global_count, epoch, chunk, exchange and self.exchanges)
            if measure:
                self._add_gradients(terms, gradients)
            total = torch.stack([t.to(torch.float64) if t.dtype == torch.float64 else t.float() for t in terms.values()]).sum()
            total.backward()
            for name, value in terms.items():
                report.terms[name] = report.terms.get(name, 0.0) + float(value.detach())
        self._share(report, stop)
        report.grad_norms = {name: float(all_sum(gradient).norm()) for name, gradient in gradients.items()}
        if self.job.training.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.job.training.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.student)
        self.step_count += 1
        return report

    def _reseed(self, *purpose: str) -> None:
        """Global randomness from here on is a function of seed, step and rank: whatever else runs in this process."""
        torch.manual_seed(derive(self.job.seed, *purpose, self.step_count, self.rank))

    def _terms(
        self,
        batch: Mapping[str, Tensor],
        signals: TeacherSignals,
        global_count: int,
        epoch: int,
        chunk: int,
        exchange: bool,
    ) -> Generator[Signals, TeacherSignals, dict[str, Tensor]]:
        """Weighted terms of this worker's loss, each already divided by the global count: name -> `[]`."""
        early = {label: hear(loss.plan, self.plans, signals) for label, loss in self.losses.items() if not loss.plan.late}
        for label, own in early.items():
            if own is not None:
                self.losses[label].step(self, batch, own.roles)
        student, ema = self._forward(batch, early), self._ema_signals(batch)
        if exchange:
            said = yield self._publish(student, ema)
            self._reseed("step", "late")
            signals = {**signals, **_moved(said, self.device)}
        heard = early | self._late(signals, batch)
        for label, own in heard.items():
            if own is not None:
                self.losses[label].after_forward(self, batch, {"student": student, "ema": ema} | own.roles)
        count = len(batch["labels"])
        terms = {}
        if self.job.ce_weight:
            terms["ce"] = self.job.ce_weight * self._cross_entropy(student["logits"], batch).sum() / global_count
        time = self.step_count / self.steps_per_epoch
        for label, loss in self.losses.items():
            if (own := heard[label]) is None:
                continue
            factor = loss.weight * loss.factor(time) * own.factor
            roles = {"student": student, "ema": ema} | own.roles
            for term, value in loss(batch, roles, epoch, self.step_count, self.rank, chunk, own.of).items():
                reduced = value.sum() / global_count if value.ndim else value * (count / global_count)
                terms[f"{label}.{term}" if term else label] = factor * reduced
        if not terms:
            raise ConfigError("ce_weight: 0 without any other loss leaves nothing to learn from. Set it, or add a loss.")
        return terms

    def _late(self, signals: TeacherSignals, batch: Mapping[str, Tensor]) -> dict[str, Heard | None]:
        """What the losses hear that had to wait for the student's forward; None where a loss listens to peers and none of
        them has said anything."""
        plans = [loss.plan for loss in self.losses.values() if loss.plan.late]
        said = [p for p in plans if not p.teachers or any(t in signals for t in p.teachers)]
        answers = with_aggregates(said, signals, batch, self.job.data_seed)
        return {p.label: hear(p, self.plans, answers) if p in said else None for p in plans}

    def _forward(self, batch: Mapping[str, Tensor], heard: Mapping[str, Heard | None]) -> Signals:
        """The student's signals, with what methods put into its layers for this forward."""
        handles: list[RemovableHandle] = []
        for label, own in heard.items():
            loss = self.losses[label]
            if own is None or "before_forward" not in loss.plan.method.hooks:
                continue
            layers = loss.plan.student_layers

            def modify(place: int, change: Callable[[Tensor], Tensor], layers: tuple[str, ...] = layers) -> None:
                handles.append(replace_output(self.student, layers[place], change))

            loss.before_forward(modify, own.roles)
        try:
            return self.tapped(batch["images"], views=_views(batch))
        finally:
            for handle in handles:
                handle.remove()

    def _cross_entropy(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        smooth = self.job.training.label_smoothing
        found = F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=smooth)
        if "mix_labels" in batch:
            other = F.cross_entropy(logits, batch["mix_labels"], reduction="none", label_smoothing=smooth)
            found = batch["mix_weight"].to(found.dtype) * found + (1 - batch["mix_weight"].to(found.dtype)) * other
        return found

    def _share(self, report: StepReport, stop: bool) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = math.isfinite(sum(report.terms.values())) and bool(torch.isfinite(norm))
        names = sorted(report.terms)
        values = [report.terms[n] for n in names]
        flags = torch.tensor([float(stop), float(not finite), *values], dtype=torch.float64, device=self.device)
        flags = sync_gradients(self.parameters, flags)
        if flags[1] > 0:
            shown = ", ".join(f"{n} {v:.4g}" for n, v in report.terms.items())
            raise DivergenceError(
                f"Step {self.step_count}: a loss or its gradient is not finite ({shown}); nothing was updated and the last "
                "checkpoint is intact. "
                "Lower the learning rate or the weight of that loss, or look at its teacher."
            )
        report.stop = bool(flags[0] > 0)
        report.terms = dict(zip(names, flags[2:].tolist()))
        report.loss = sum(report.terms.values())

    def _measures_gradients(self) -> bool:
        every = self.job.training.grad_norms_every
        return self.step_count == 0 or (every > 0 and self.step_count % every == 0)

    def _add_gradients(self, terms: Mapping[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Adds each term's gradient on the student, flat, to that of the parts of the batch before; 0 of a dead term."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        for name, term in terms.items():
            grads: Sequence[Tensor | None] = [None] * len(parameters)
            if term.requires_grad:
                grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                if all(g is None for g in grads):  # it trains connectors alone
                    continue
            flat = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, grads)])
            gradients[name] = gradients[name] + flat if name in gradients else flat

    def _set_rate(self) -> float:
        lr = float(self.job.training.lr or 0.0) * self.rate(self.step_count / self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def on_epoch(self, epoch: int) -> None:
        """Work between epochs that methods asked for."""
        for loss in self.losses.values():
            loss.on_epoch(epoch)

    def settle(self) -> None:
        """Makes batch-norm statistics equal on all workers, before an evaluation; every worker calls it."""
        average_buffers(self.student)
        if self.ema is not None:
            average_buffers(self.ema.module)

    def evaluated_model(self) -> nn.Module:
        """The model to evaluate, with its branches; the same on every worker once they have settled."""
        if self.job.training.evaluate == "ema" and self.ema is not None:
            return self.ema.module
        return self.student

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; plain tensors and numbers."""
        return {
            "step": self.step_count,
            "student": self.student.state_dict(),
            "losses": {name: loss.state_dict() for name, loss in self.losses.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self.step_count = int(state["step"])
        self.student.load_state_dict(state["student"])
        for name, loss in self.losses.items():
            loss.load_state_dict(state["losses"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def shapes_of(found: Any) -> Any:
    """Shapes without the batch axis of one model's signals, or of several models'."""
    if isinstance(found, list):
        return [shapes_of(own) for own in found]
    return {key: tuple(value.shape[1:]) for key, value in found.items()}


def alone(exchange: Generator[Any, Any, Any]) -> Any:
    """Runs to the end what never pauses: a student's step, or its whole training."""
    try:
        next(exchange)
    except StopIteration as done:
        return done.value
    raise AssertionError("a student without peers paused for an exchange")


def without_ema(signal: Signal) -> Signal:
    """The same signal of the model itself."""
    return dataclasses.replace(signal, view="_".join(v for v in signal.views if v != EMA) or None)


def _views(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The images of branches 1, 2, ... where each branch sees its own."""
    return [batch[name] for name in sorted((n for n in batch if n.startswith(VIEW)), key=lambda n: int(n[len(VIEW) :]))]


def _moved(found: TeacherSignals, device: torch.device) -> dict[str, Signals]:
    return {who: {key: value.to(device, non_blocking=True) for key, value in own.items()} for who, own in found.items()}


def _on_cpu(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in batch.items()}


def _chunks(batch: Mapping[str, Tensor], signals: TeacherSignals, count: int, device: torch.device) -> Any:
    """Splits batch and signals into `count` equal parts, on the device; one part is the batch itself."""
    fields = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    moved = _moved(signals, device)
    size = -(-len(fields["labels"]) // count)
    for start in range(0, len(fields["labels"]), size):
        part = slice(start, start + size) if count > 1 else slice(None)
        yield (
            {n: v[part] for n, v in fields.items()},
            {t: {k: v[part] for k, v in found.items()} for t, found in moved.items()},
        )
