"""The synthesizer: a generator and what its images minimise; where there is no data, it makes the batches.

round     generator steps:  z -> images -> critics, where there are any, learn them from training images
                            -> signals of teachers and student -> images_loss -> generator
          student steps:    z -> images (fixed) -> an ordinary training step

z is new at each of these steps, or one for all of a round (`synthesis.noise`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from raykd.models.generators import Generator, Pixels, reset
from raykd.parts.views import local_view
from raykd.roles.beside import Beside
from raykd.roles.hearing import hear
from raykd.roles.learner import shapes_of
from raykd.roles.losses import BoundLoss, Plan
from raykd.roles.meta import Route
from raykd.roles.network import Facts, Tapped, own_dtype
from raykd.roles.optimisation import all_sum, optimizer, rate, sync_gradients
from raykd.signals import CLASSIFIER, LOCAL, REAL, Signal, Signals

Through = Callable[[Tensor, Mapping[str, tuple[Signal, ...]]], Mapping[str, Signals]]
"""Float images `[b c h w]` and the signals wanted of each teacher -> teacher -> signals that carry gradient to the images."""


@dataclass
class SynthesisReport:
    """What the generator's steps of one round did: terms of the last, mean over the images of all workers."""

    steps: int = 0
    terms: dict[str, float] = field(default_factory=dict)


def generator_of(job: Job, facts: Facts) -> Generator:
    """The generator that a job asks for, with fresh weights."""
    spec, known = job.synthesis, _normalise(facts)
    return models.generator(
        str(spec.generator),
        shape=facts.shape,
        num_classes=facts.num_classes,
        latent=spec.latent or 1,
        mean=known.mean,
        std=known.std,
        **({"n": job.training.batch_size or 1} if spec.generator == "pixels" else {}) | dict(spec.options),
    )


def wants_classes(plans: Sequence[Plan]) -> bool:
    """Whether images are to be of the classes they are labelled with: their loss reads these, or draws its targets by them."""
    return any(plan.reads("labels") or "targets" in plan.method.hooks for plan in plans)


def _normalise(facts: Facts) -> Normalise:
    stats = facts.normalise
    return Normalise.preset(stats) if isinstance(stats, str) else Normalise(*stats)


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
        beside: training images, where a loss reads some.
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
        beside: Beside | None = None,
    ) -> None:
        self.job, self.plans, self.facts, self.device = job, list(plans), facts, device
        self.rank, self.world, self.student, self.beside = rank, world, student, beside
        self.spec = job.synthesis
        self.dtype = own_dtype(job.student)
        self.count = (job.training.batch_size or 1) // world
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(job.seed, "generator"))
            self.generator = generator_of(job, facts).to(device, self.dtype)
        self.asked = tuple(dict.fromkeys(s for plan in self.plans for s in plan.student))
        asked = [signal.without(LOCAL) for signal in self.asked]
        self.tapped = Tapped(job.student, student, asked, facts, device) if asked else None
        self.losses: dict[str, BoundLoss] = {}
        self.rate = rate(self._training())
        self.rounds = self.prepared = 0  # rounds, and updates before the first of them, that are done

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
        modes = {m: m.training for m in self.student.modules()}
        self.student.eval()
        with torch.no_grad():
            answers, student = self._ask(through, batch["images"], batch["images"], self._views("probe", 0))
        for module, mode in modes.items():
            module.training = mode
        for plan in self.plans:
            heard = hear(plan, self.plans, answers)
            roles = {"student": student} | (heard.roles if heard is not None else {})
            shapes = {role: shapes_of(found) for role, found in roles.items()}
            more = self._of_teacher(plan, through, batch["images"])
            bound = BoundLoss(plan, shapes, self.facts, torch.empty(0, dtype=torch.int64), self.job, more)
            self.losses[plan.label] = bound.to(self.device, self.dtype)
        self.optimizer = optimizer(self._training(), [self.generator, *self.losses.values()])
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.spec.reset == "meta":
            rate = float(self.spec.lr or 0.0) * (self.spec.steps or 1)
            self.meta = optimizer(dataclasses.replace(self._training(), lr=rate), [self.generator])

    @torch.no_grad()
    def _of_teacher(self, plan: Plan, through: Through, images: Tensor) -> dict[str, Tensor]:
        """Facts of the teacher that a loss asks for once, wherever it lives."""
        if not plan.reads(CLASSIFIER):
            return {}
        classifier = Signal("classifier")
        found = through(images[:1], {plan.teachers[0]: (classifier,)})
        return {CLASSIFIER: found[plan.teachers[0]][classifier.key].to(self.device, self.dtype)}

    def _beside(self, batch: Mapping[str, Tensor], drawn: Mapping[str, Mapping[str, Tensor]], label: str) -> dict[str, Tensor]:
        """The fields of a batch as one loss reads them."""
        fields = {**batch, **drawn[label]}
        if any(plan.reads("normalised_images") for plan in self.plans):
            fields["normalised_images"] = _normalise(self.facts)(batch["images"], self.dtype)
        return fields

    def _targets(self, purpose: str, number: int, labels: Tensor) -> dict[str, dict[str, Tensor]]:
        """What each loss wants of each image of a batch, drawn once."""
        found = {}
        for label, loss in self.losses.items():
            keyed = torch_generator(self.job.seed, "synthesis", "targets", purpose, number, self.rank)
            own = loss.targets(labels, keyed)
            found[label] = {name: value.to(self.device, self.dtype) for name, value in own.items()}
        return found

    def draw(self, purpose: str, number: int) -> dict[str, Tensor]:
        """A batch: `latents`, `labels` (wanted classes) and their `images` `[b c h w]` float, with the generator's graph."""
        keyed = torch_generator(self.job.seed, "synthesis", *self._key(purpose, number), self.rank)
        latents = torch.randn(self.count, self.spec.latent or 1, generator=keyed).to(self.device, self.dtype)
        labels = torch.randint(self.facts.num_classes, (self.count,), generator=keyed).to(self.device)
        return {"latents": latents, "labels": labels, "images": self.generator(latents, labels)}

    def _key(self, purpose: str, number: int) -> tuple[str, int]:
        """What a batch's noise is keyed by: the step it is for, or the round which that step is in."""
        before, steps = self.spec.before or 0, {"generator": self.spec.generator_steps, "student": self.spec.student_steps}
        if self.spec.noise != "round" or purpose not in steps or (purpose == "generator" and number < before):
            return purpose, number
        return "round", (number - before if purpose == "generator" else number) // (steps[purpose] or 1)

    def prepare(self, through: Through) -> Iterator[dict[str, float]]:
        """The generator's updates before the first round, from where they are on; yields the terms of each.

        Raises:
            DivergenceError: its loss is not finite; nothing of this update was done.
        """
        while not self.rounds and self.prepared < (self.spec.before or 0):
            with self._learning(0.0):
                terms = self._update(through, self.prepared, 0)
            self.prepared += 1
            yield terms

    def learn(self, through: Through, time: float) -> SynthesisReport:
        """The generator's steps of one round.

        Args:
            through: asks the teachers.
            time: epochs done, for the schedule.

        Raises:
            DivergenceError: its loss is not finite; nothing of this step was updated.
        """
        report = SynthesisReport()
        first = (self.spec.before or 0) + self.rounds * (self.spec.generator_steps or 0)
        with self._learning(time):
            for number in range(first, first + (self.spec.generator_steps or 0)):
                report.terms = self._update(through, number, int(time))
                report.steps += 1
        self.rounds += 1
        return report

    @contextlib.contextmanager
    def _learning(self, time: float) -> Iterator[None]:
        """The generator may learn, the student may not; afterwards the student is as it was."""
        modes = {m: m.training for m in self.student.modules()}
        self.student.train(self.spec.student_mode == "train")
        self.generator.train()
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.spec.lr or 0.0) * self.rate(time)
        kept = [p.requires_grad for p in self.student.parameters()]
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, grad in zip(self.student.parameters(), kept):
                parameter.requires_grad_(grad)
            for module, mode in modes.items():
                module.training = mode

    def _update(self, through: Through, number: int, epoch: int) -> dict[str, float]:
        torch.manual_seed(derive(self.job.seed, "generator step", number, self.rank))
        batch = self.draw("generator", number) | self._read(number)
        judged = self._judge(batch, number, epoch)
        self.optimizer.zero_grad(set_to_none=True)
        drawn, keyed = self._targets("generator", number, batch["labels"]), self._views("generator", number)
        terms = self._terms(through, batch, batch["images"], drawn, keyed, (epoch, number, 0))
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        values = torch.stack([t.detach().double() for t in terms.values()])
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        bad = float(not (bool(torch.isfinite(values).all()) and bool(torch.isfinite(norm))))
        flags = sync_gradients(self.parameters, torch.cat([values.new_tensor([bad]), values]))
        if flags[0] > 0:
            raise self._diverged("the images' loss or its gradient", terms, "synthesis.lr or the factor of that term")
        self.optimizer.step()
        return judged | dict(zip(terms, flags[1:].tolist()))

    def _read(self, number: int) -> dict[str, Tensor]:
        """Training images beside the batch of a generator's step, where a loss reads some."""
        if self.beside is None or not any(plan.reads(name) for plan in self.plans for name in REAL):
            return {}
        found = self.beside.read("generator", number, self.count)
        return {"real_images": found["images"].to(self.device), "real_labels": found["labels"].to(self.device)}

    def _judge(self, batch: Mapping[str, Tensor], number: int, epoch: int) -> dict[str, float]:
        """Each critic of the images learns first: what it minimised by its name, the mean over the images of all workers."""
        found: dict[str, float] = {}
        fixed = {name: value.detach() for name, value in batch.items()}
        for loss in self.losses.values():
            for name, losses in loss.critics(fixed, epoch, number, self.rank).items():
                mean = all_sum(losses.detach().double().sum() / (self.count * self.world))
                if not bool(torch.isfinite(mean)):
                    raise self._diverged("what a critic minimises", {name: mean}, "its rate")
                critic: Any = getattr(loss.module, name)
                critic.update(losses)
                found[name] = float(mean)
        return found

    def _diverged(self, what: str, terms: Mapping[str, Tensor], lower: str) -> DivergenceError:
        shown = ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
        return DivergenceError(
            f"Synthesis, round {self.rounds}: {what} is not finite ({shown}); it was not updated and the last checkpoint is "
            f"intact. Lower {lower}."
        )

    def make(self, through: Through, number: int, version: int = -1, maker: int = 0) -> MadeBatch:
        """A batch for the bank: `synthesis.steps` updates of generator, noise or pixels for these images alone.

        With `reset="batch"` it is a function of its number, the teachers and the student as it is, whoever makes it; where the
        images' loss learns or remembers something, also of that.

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
        route = Route(self.generator, str(spec.meta)) if spec.reset == "meta" else None
        made, drawn = self._optimizer(latents), self._targets("bank", number, labels)
        best, kept = math.inf, None
        terms: dict[str, Tensor] = {}
        for step in range(spec.steps or 1):
            images = self.generator(latents, labels)
            batch, seen = {"latents": latents, "labels": labels, "images": images}, self._moved(images, keyed)
            terms = self._terms(through, batch, seen, drawn, keyed, (0, step, number))
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
            if route is not None:
                route.note()
            made.step()
            if spec.clip and isinstance(self.generator, Pixels):
                self.generator.clamp_()
        with torch.no_grad():
            final = self.generator(latents, labels) if kept is None else kept
        if route is not None:
            route.back()
            self.meta.step()
        pixels = (final.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        loss = float(torch.stack(list(terms.values())).sum().detach()) if kept is None else best
        kept_as = torch.from_numpy(pixels).to(self.device, self.dtype) / 255
        said = self.said(kept_as, through)
        confidence, seen = said.max(dim=1)
        score, seconds = self._disagreement(kept_as, said), round(time.monotonic() - started, 4)
        notes = {"seen": seen.cpu().numpy(), "confidence": confidence.float().cpu().numpy()}
        return MadeBatch(number, pixels, labels.cpu().numpy(), version, maker, loss, score, seconds, **notes)

    def _optimizer(self, latents: Tensor) -> Any:
        """A fresh optimizer for a batch of its own, the noise with it where it learns; else the one that goes on."""
        rate, fresh = float(self.spec.latents_lr or 0.0), self.spec.reset != "never"
        if fresh:
            self.optimizer = optimizer(self._training(), [self.generator, *self.losses.values()])
        if not rate:
            return self.optimizer
        latents.requires_grad_(True)
        group = {**self.optimizer.defaults, "params": [latents], "lr": rate, "weight_decay": 0.0}
        if fresh:
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

    def _terms(
        self,
        through: Through,
        batch: Mapping[str, Tensor],
        seen: Tensor,
        drawn: Mapping[str, Mapping[str, Tensor]],
        keyed: torch.Generator,
        when: tuple[int, int, int],
    ) -> dict[str, Tensor]:
        """Terms of the images' loss, this worker's share of the mean over the images of all: name -> `[]`.

        Args:
            through: asks the teachers.
            batch: its fields.
            seen: the images as teachers and student see them.
            drawn: what each loss wants of each image.
            keyed: draws the parts of images that losses read.
            when: epoch, step and number of the batch, for what losses draw.
        """
        answers, student = self._ask(through, batch["images"], seen, keyed)
        terms: dict[str, Tensor] = {}
        for label, loss in self.losses.items():
            heard = hear(loss.plan, self.plans, answers)
            if heard is None:
                continue
            epoch, step, number = when
            roles, share = {"student": student} | heard.roles, loss.plan.share * heard.factor
            found = loss(self._beside(batch, drawn, label), roles, epoch, step, self.rank, number, heard.of)
            for term, value in found.items():
                mean = value.sum() / (self.count * self.world) if value.ndim else value / self.world
                terms[term or label] = terms.get(term or label, torch.zeros((), device=self.device)) + share * mean
        return terms

    @torch.no_grad()
    def said(self, images: Tensor, through: Through) -> Tensor:
        """What teachers see in images: the mean of their class distributions, `[b c]`."""
        asked = self.wanted or self.job.teachers  # an images' loss may listen to none
        answers = through(images, {teacher: (Signal("logits"),) for teacher in asked})
        return torch.stack([own["logits"].float().softmax(-1) for own in answers.values()]).mean(0)

    @torch.no_grad()
    def _disagreement(self, images: Tensor, said: Tensor) -> float:
        """KL(teachers || student) at temperature 1, mean over the images, nats; 0 where the images' loss reads no student."""
        if self.tapped is None:
            return 0.0
        student = self.tapped.logits(images).float().log_softmax(-1)
        return float((said * (said.clamp_min(1e-12).log() - student)).sum(-1).mean())

    def _ask(
        self, through: Through, images: Tensor, seen: Tensor, keyed: torch.Generator
    ) -> tuple[dict[str, Signals], Signals]:
        """What teachers and student say of images as they see them, and of parts of the images where a loss reads these."""
        wanted, own = self.wanted, self.asked
        straight = {teacher: tuple(s for s in asked if LOCAL not in s.views) for teacher, asked in wanted.items()}
        answers = {teacher: dict(found) for teacher, found in through(seen, straight).items()}
        student = dict(self.tapped(seen)) if self.tapped is not None else {}
        local = {teacher: [s for s in asked if LOCAL in s.views] for teacher, asked in wanted.items()}
        mine = [s for s in own if LOCAL in s.views]
        if not (any(local.values()) or mine):
            return answers, student
        parts = local_view(images, keyed)
        found = through(parts, {t: tuple(s.without(LOCAL) for s in asked) for t, asked in local.items() if asked})
        for teacher, said in found.items():
            answers[teacher] |= {s.key: said[s.without(LOCAL).key] for s in local[teacher]}
        if self.tapped is not None and mine:
            again = self.tapped(parts)
            student |= {s.key: again[s.without(LOCAL).key] for s in mine}
        return answers, student

    def _views(self, purpose: str, number: int) -> torch.Generator:
        return torch_generator(self.job.seed, "synthesis", "views", purpose, number, self.rank)

    @torch.no_grad()
    def batch(self, number: int) -> dict[str, Tensor]:
        """A batch for the student's step `number`: images float, labels as wanted, `sample_index` and `augmentation_seed`."""
        self.generator.train()
        _, own = self._key("student", number)
        torch.manual_seed(derive(self.job.seed, "student batch", own, self.rank))
        drawn = self.draw("student", number)
        index = torch.arange(self.count, dtype=torch.int64) + (own * self.world + self.rank) * self.count
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
            "prepared": self.prepared,
            "generator": self.generator.state_dict(),
            "losses": {name: loss.state_dict() for name, loss in self.losses.items()},
            "optimizer": self.optimizer.state_dict(),
        } | ({"meta": self.meta.state_dict()} if self.spec.reset == "meta" else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self.rounds = int(state["rounds"])
        self.prepared = int(state.get("prepared", 0))
        self.generator.load_state_dict(state["generator"])
        for name, loss in self.losses.items():
            loss.load_state_dict(state["losses"][name])
        if self.spec.mode == "lockstep" or self.spec.reset == "never":  # else each batch has an optimizer of its own
            self.optimizer.load_state_dict(state["optimizer"])
        if self.spec.reset == "meta":
            self.meta.load_state_dict(state["meta"])


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
