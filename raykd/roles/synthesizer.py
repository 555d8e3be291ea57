"""The synthesizer: a generator and what its images minimise; where there is no data, it makes the batches.

round     generator steps:  z -> images -> signals of teachers and student -> images_loss -> generator
          student steps:    z -> images (fixed) -> an ordinary training step
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raykd import models
from raykd.config import Job, Training
from raykd.data.keys import derive, torch_generator
from raykd.data.normalise import Normalise
from raykd.errors import DivergenceError
from raykd.exchange.bank import MadeBatch
from raykd.models.generators import Generator, reset
from raykd.roles.hearing import hear
from raykd.roles.learner import shapes_of
from raykd.roles.losses import BoundLoss, Plan
from raykd.roles.network import Facts, Tapped
from raykd.roles.optimisation import optimizer, rate, sync_gradients
from raykd.signals import Signal, Signals

Through = Callable[[Tensor, Mapping[str, tuple[Signal, ...]]], Mapping[str, Signals]]
"""Float images `[b c h w]` and the signals wanted of each teacher -> teacher -> signals that carry gradient to the images."""


@dataclass
class SynthesisReport:
    """What the generator's steps of one round did: terms of the last, mean over the images of all workers."""

    steps: int = 0
    terms: dict[str, float] = field(default_factory=dict)


def generator_of(job: Job, facts: Facts) -> Generator:
    """The generator that a job asks for, with fresh weights."""
    spec, stats = job.synthesis, facts.normalise
    known = Normalise.preset(stats) if isinstance(stats, str) else Normalise(*stats)
    return models.generator(
        str(spec.generator),
        shape=facts.shape,
        num_classes=facts.num_classes,
        latent=spec.latent or 1,
        mean=known.mean,
        std=known.std,
        **({"n": job.training.batch_size or 1} if spec.generator == "pixels" else {}) | dict(spec.options),
    )


class Synthesizer:
    """Makes images for one student, and learns from what teachers and student say of them.

    Everything trainable is the same on every worker: gradients are averaged over the images of all. What is drawn is keyed by
    (seed, round, rank).

    Args:
        job: resolved; its `synthesis` says how.
        plans: what the images minimise, connected.
        facts: of the data there would be.
        student: whose signals the images' loss reads.
        device: where the generator lives.
        rank: of this worker.
        world: number of workers.
    """

    def __init__(
        self,
        job: Job,
        plans: Sequence[Plan],
        facts: Facts,
        student: nn.Module,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.job, self.plans, self.facts, self.device = job, list(plans), facts, device
        self.rank, self.world, self.student = rank, world, student
        self.spec = job.synthesis
        self.dtype = torch.float64 if job.student.dtype == "float64" else torch.float32
        self.count = (job.training.batch_size or 1) // world
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(job.seed, "generator"))
            self.generator = generator_of(job, facts).to(device, self.dtype)
        asked = [s for plan in self.plans for s in plan.student]
        self.tapped = Tapped(job.student, student, asked, facts, device) if asked else None
        self.losses: dict[str, BoundLoss] = {}
        self.rate = rate(self._training())
        self.rounds = 0

    def _training(self) -> Training:
        """How the generator is trained, in the words of a student's training."""
        spec, training = self.spec, self.job.training
        betas = {"betas": tuple(spec.betas)} if spec.betas is not None and "adam" in str(spec.optimizer) else {}
        return Training(
            epochs=training.epochs,
            optimizer=spec.optimizer,
            lr=spec.lr,
            momentum=0.0,
            nesterov=False,
            weight_decay=spec.weight_decay,
            optimizer_options=betas,
            decay_norms=True,
            scheduler=spec.scheduler,
            milestones=spec.milestones,
            gamma=0.1,
            warmup_epochs=0.0,
        )

    @property
    def wanted(self) -> dict[str, tuple[Signal, ...]]:
        """Teacher -> the signals that the images' loss asks of it."""
        names = dict.fromkeys(t for plan in self.plans for t in plan.teachers)
        return {t: tuple(dict.fromkeys(s for plan in self.plans for s in plan.asks(t))) for t in names}

    def bind(self, through: Through) -> None:
        """Builds the images' connectors from the shapes of a first batch.

        Raises:
            SignalError: shapes that the loss cannot use.
        """
        batch = self.draw("probe", 0)
        with torch.no_grad():
            answers = through(batch["images"], self.wanted)
            student = self._of_student(batch["images"])
        for plan in self.plans:
            heard = hear(plan, self.plans, answers)
            roles = {"student": student} | (heard.roles if heard is not None else {})
            shapes = {role: shapes_of(found) for role, found in roles.items()}
            bound = BoundLoss(plan, shapes, self.facts, torch.empty(0, dtype=torch.int64), self.job)
            self.losses[plan.label] = bound.to(self.device, self.dtype)
        self.optimizer = optimizer(self._training(), [self.generator, *self.losses.values()])
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def draw(self, purpose: str, number: int) -> dict[str, Tensor]:
        """A batch: `latents`, `labels` (wanted classes) and their `images` `[b c h w]` float, with the generator's graph."""
        keyed = torch_generator(self.job.seed, "synthesis", purpose, number, self.rank)
        latents = torch.randn(self.count, self.spec.latent or 1, generator=keyed).to(self.device, self.dtype)
        labels = torch.randint(self.facts.num_classes, (self.count,), generator=keyed).to(self.device)
        return {"latents": latents, "labels": labels, "images": self.generator(latents, labels)}

    def learn(self, through: Through, time: float) -> SynthesisReport:
        """The generator's steps of one round.

        Args:
            through: asks the teachers.
            time: epochs done, for the schedule.

        Raises:
            DivergenceError: its loss is not finite; nothing of this step was updated.
        """
        report = SynthesisReport()
        modes = {m: m.training for m in self.student.modules()}
        self.student.train(self.spec.student_mode == "train")
        self.generator.train()
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.spec.lr or 0.0) * self.rate(time)
        kept = [p.requires_grad for p in self.student.parameters()]
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        try:
            for step in range(self.spec.generator_steps or 0):
                number = self.rounds * (self.spec.generator_steps or 1) + step
                torch.manual_seed(derive(self.job.seed, "generator step", number, self.rank))
                report.terms = self._step(through, number, int(time))
                report.steps += 1
        finally:
            for parameter, grad in zip(self.student.parameters(), kept):
                parameter.requires_grad_(grad)
            for module, mode in modes.items():
                module.training = mode
        self.rounds += 1
        return report

    def _step(self, through: Through, number: int, epoch: int) -> dict[str, float]:
        batch = self.draw("generator", number)
        self.optimizer.zero_grad(set_to_none=True)
        answers, student = through(batch["images"], self.wanted), self._of_student(batch["images"])
        everywhere = self.count * self.world
        terms: dict[str, Tensor] = {}
        for label, loss in self.losses.items():
            heard = hear(loss.plan, self.plans, answers)
            if heard is None:
                continue
            roles = {"student": student} | heard.roles
            share = loss.plan.share * heard.factor
            for term, value in loss(batch, roles, epoch, number, self.rank, 0, heard.of).items():
                mean = value.sum() / everywhere if value.ndim else value / self.world
                terms[term or label] = terms.get(term or label, torch.zeros((), device=self.device)) + share * mean
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        values = torch.stack([t.detach().double() for t in terms.values()])
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        bad = float(not (bool(torch.isfinite(values).all()) and bool(torch.isfinite(norm))))
        flags = sync_gradients(self.parameters, torch.cat([values.new_tensor([bad]), values]))
        if flags[0] > 0:
            shown = ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
            raise DivergenceError(
                f"Synthesis, round {self.rounds}: the images' loss or its gradient is not finite ({shown}); nothing was "
                "updated and the last checkpoint is intact. Lower synthesis.lr or the factor of that term."
            )
        self.optimizer.step()
        return dict(zip(terms, flags[1:].tolist()))

    def make(self, through: Through, number: int, version: int = -1, maker: int = 0) -> MadeBatch:
        """A batch for the bank: `synthesis.steps` updates of generator, noise or pixels for these images alone.

        With `reset="batch"` it is a function of its number, the teachers and the student as it is, whoever makes it.

        Args:
            through: asks the teachers.
            number: of the batch.
            version: the student's steps behind the snapshot that is loaded; -1: none is.
            maker: of the synthesizer, for its provenance.

        Raises:
            DivergenceError: the images' loss is not finite.
        """
        started, spec = time.monotonic(), self.spec
        torch.manual_seed(derive(self.job.seed, "made batch", number))
        if spec.reset == "batch":
            reset(self.generator, derive(self.job.seed, "fresh generator", number) % 2**63)
        self.student.eval().requires_grad_(False)
        self.generator.train()
        keyed = torch_generator(self.job.seed, "synthesis", "bank", number)
        latents = torch.randn(self.count, spec.latent or 1, generator=keyed).to(self.device, self.dtype)
        labels = torch.randint(self.facts.num_classes, (self.count,), generator=keyed).to(self.device)
        made = self._optimizer(latents)
        best, kept = math.inf, None
        terms: dict[str, Tensor] = {}
        for step in range(spec.steps or 1):
            images = self.generator(latents, labels)
            terms = self._terms(
                {"latents": latents, "labels": labels, "images": images}, self._moved(images, keyed), through, step
            )
            total = torch.stack(list(terms.values())).sum()
            if not bool(torch.isfinite(total)):
                shown = ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
                raise DivergenceError(
                    f"Synthesis, batch {number}: the images' loss is not finite ({shown}). Lower synthesis.lr."
                )
            if spec.keep == "best" and float(total.detach()) < best:
                best, kept = float(total.detach()), images.detach().clone()
            made.zero_grad(set_to_none=True)
            total.backward()
            made.step()
        with torch.no_grad():
            final = self.generator(latents, labels) if kept is None else kept
        pixels = (final.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        loss = float(torch.stack(list(terms.values())).sum().detach()) if kept is None else best
        score = self._disagreement(final.detach(), through)
        seconds = time.monotonic() - started
        return MadeBatch(number, pixels, labels.cpu().numpy(), version, maker, loss, score, round(seconds, 4))

    def _optimizer(self, latents: Tensor) -> Any:
        """A fresh optimizer for a batch of its own, the noise with it where it learns; else the one that goes on."""
        rate = float(self.spec.latents_lr or 0.0)
        if self.spec.reset == "batch":
            self.optimizer = optimizer(self._training(), [self.generator, *self.losses.values()])
        if not rate:
            return self.optimizer
        latents.requires_grad_(True)
        group = {**self.optimizer.defaults, "params": [latents], "lr": rate, "weight_decay": 0.0}
        if self.spec.reset == "batch":
            self.optimizer.add_param_group(group)
            return self.optimizer
        return _Both(self.optimizer, type(self.optimizer)([latents], **{k: v for k, v in group.items() if k != "params"}))

    def _moved(self, images: Tensor, keyed: torch.Generator) -> Tensor:
        """What teachers and student see of the images: rolled and mirrored at random, where the job says so."""
        if self.spec.jitter:
            across, down = (int(torch.randint(-self.spec.jitter, self.spec.jitter + 1, (), generator=keyed)) for _ in range(2))
            images = torch.roll(images, (down, across), (2, 3))
        if self.spec.flip and bool(torch.rand((), generator=keyed) < 0.5):
            images = images.flip(3)
        return images

    def _terms(self, batch: Mapping[str, Tensor], seen: Tensor, through: Through, step: int) -> dict[str, Tensor]:
        answers, student = through(seen, self.wanted), self._of_student(seen)
        terms: dict[str, Tensor] = {}
        for label, loss in self.losses.items():
            heard = hear(loss.plan, self.plans, answers)
            if heard is None:
                continue
            found = loss(batch, {"student": student} | heard.roles, 0, step, self.rank, 0, heard.of)
            for term, value in found.items():
                mean = loss.plan.share * heard.factor * value.mean()
                terms[term or label] = terms.get(term or label, torch.zeros((), device=self.device)) + mean
        return terms

    @torch.no_grad()
    def _disagreement(self, images: Tensor, through: Through) -> float:
        """KL(teachers || student) at temperature 1, mean over the images, nats; 0 where the images' loss reads no student."""
        if self.tapped is None:
            return 0.0
        answers = through(images, {teacher: (Signal("logits"),) for teacher in self.wanted})
        said = torch.stack([own["logits"].float().softmax(-1) for own in answers.values()]).mean(0)
        student = self.tapped.logits(images).float().log_softmax(-1)
        return float((said * (said.clamp_min(1e-12).log() - student)).sum(-1).mean())

    def _of_student(self, images: Tensor) -> Signals:
        return self.tapped(images) if self.tapped is not None else {}

    @torch.no_grad()
    def batch(self, number: int) -> dict[str, Tensor]:
        """A batch for the student's step `number`: images float, labels as wanted, `sample_index` and `augmentation_seed`."""
        self.generator.train()
        torch.manual_seed(derive(self.job.seed, "student batch", number, self.rank))
        drawn = self.draw("student", number)
        index = torch.arange(self.count, dtype=torch.int64) + (number * self.world + self.rank) * self.count
        return {
            "images": drawn["images"].detach().cpu(),
            "labels": drawn["labels"].cpu(),
            "sample_index": index,
            "augmentation_seed": torch.zeros(self.count, dtype=torch.int32),
        }

    @torch.no_grad()
    def show(self) -> dict[str, Tensor]:
        """Some images for the eye, always of the same noise: `images` and the classes they were `labels` for."""
        self.generator.eval()
        found = [self.draw("show", i) for i in range(math.ceil(self.spec.show / self.count))]
        return {name: torch.cat([f[name] for f in found])[: self.spec.show].cpu() for name in ("images", "labels")}

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; plain tensors and numbers."""
        return {
            "rounds": self.rounds,
            "generator": self.generator.state_dict(),
            "losses": {name: loss.state_dict() for name, loss in self.losses.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self.rounds = int(state["rounds"])
        self.generator.load_state_dict(state["generator"])
        for name, loss in self.losses.items():
            loss.load_state_dict(state["losses"][name])
        self.optimizer.load_state_dict(state["optimizer"])


class _Both:
    """Two optimizers that step together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As both."""
        for each in self.optimizers:
            each.zero_grad(set_to_none)

    def step(self) -> None:
        """As both."""
        for each in self.optimizers:
            each.step()
