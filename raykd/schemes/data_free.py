"""Data-free distillation, in lock-step or from a bank.

In lock-step the generator and the student take turns, in one process or in several:

    before the first step     `before` updates of the generator, where the method has any; a stop is heard between two
    every student_steps steps    generator_steps of the generator (roles/synthesizer.py), through teachers wherever they live
    every step                   a batch of images it makes, then a step of the student as with any other batch

Each of several workers has the same generator and images of its own; gradients are averaged.

With a bank, synthesizers make batches beside the student (in actors of their own, each with teachers and a student as it was
some steps ago), and the student draws from what they have made so far, augmented as the job says.

Nothing is read to learn from, unless the job says what share of each batch is (`synthesis.real`), or what images minimise is
read beside training images.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.utils import save_image

from raykd.config import Job
from raykd.data.augment import Keys, augment
from raykd.data.batches import Batch
from raykd.data.batches import Plan as Order
from raykd.data.keys import torch_generator
from raykd.data.sets import DataSet
from raykd.errors import DataError
from raykd.exchange.bank import Bank, MadeBatch
from raykd.exchange.sources import Source
from raykd.exchange.through import through
from raykd.models.generators import Pixels
from raykd.roles.beside import Beside
from raykd.roles.learner import Learner
from raykd.roles.losses import Plan
from raykd.roles.network import Facts, build, own_dtype, plain
from raykd.roles.synthesizer import SynthesisReport, Synthesizer, wants_classes
from raykd.signals import Signal, Signals

SHOWN = "images"  # folder of what was put out for the eye
BANK = "bank"  # folder of the bank
COLUMNS = 8
NO_LABEL = -100  # of a free image that nobody wanted to be of a class: no cross-entropy


class Made:
    """The batches of a job that makes its own images: a Feed.

    With training images beside, `synthesis.real` of each batch is read from these, augmented as the job says. Free pixels then
    begin as copies of some of them, have no label, and stay between black and white where `synthesis.clip` says so.
    """

    parts = "updates of the generator"

    def __init__(
        self,
        job: Job,
        plans: list[Plan],
        facts: Facts,
        learner: Learner,
        sources: Mapping[str, Source],
        order: Order,
        train: DataSet | None = None,
    ) -> None:
        self.job, self.learner, self.sources, self.order = job, learner, sources, order
        for source in sources.values():
            source.window = 1  # the next images are made by a generator that has learnt from this step
        student = plain(learner.student)
        dtype = own_dtype(job.student)
        self._beside = Beside(train, job, learner.rank, order.world, dtype) if train is not None else None
        self.synthesizer = Synthesizer(job, plans, facts, student, learner.device, learner.rank, order.world, self._beside)
        self._said = SynthesisReport()
        generator = self.synthesizer.generator
        self._free = generator if self._beside is not None and isinstance(generator, Pixels) else None
        if self._beside is not None and self._free is not None:
            self._free.become(self._beside.read("pixels", 0, len(self._free.pixels))["images"].to(learner.device))

    def first(self) -> Batch:
        """A batch for the probe before the training; binds the images' loss."""
        self.synthesizer.bind(self.through)
        return self._batch(0)

    def _batch(self, step: int) -> Batch:
        """What the student sees at a step: images read, where there are any, then images made."""
        made = self.synthesizer.batch(step)
        count = len(made["labels"])
        share = self.job.synthesis.real or 0.0
        read = min(max(round(share * count), 1), count - 1) if share else 0
        if self._beside is None or not read:
            return Batch(made)
        if self._free is not None:
            made["labels"] = torch.full_like(made["labels"], NO_LABEL)
        keyed = torch_generator(self.job.seed, "real", step, self.learner.rank)
        rows = torch.randperm(count, generator=keyed)[: count - read]
        real = self._beside.read("student", step, read, augmented=True)
        return Batch({name: torch.cat([value, made[name][rows]]) for name, value in real.items()})

    def through(self, images: torch.Tensor, wanted: Mapping[str, tuple[Signal, ...]]) -> Mapping[str, Signals]:
        """What the teachers say of float images, with gradient back to these."""
        return through(self.sources, images, wanted)

    def prepare(self) -> Iterator[tuple[int, int, dict[str, float]]]:
        """The generator's updates before the first step: after each how many are done, of how many, and its terms."""
        for terms in self.synthesizer.prepare(self.through):
            yield self.synthesizer.prepared, self.job.synthesis.before or 0, terms

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, from the student's step on."""
        rounds = self.job.synthesis.student_steps or 1
        while self.learner.step_count // self.order.steps_per_epoch == epoch:
            step = self.learner.step_count
            if step % rounds == 0:
                self._said = self.synthesizer.learn(self.through, step / self.order.steps_per_epoch)
                if self._free is not None and self.job.synthesis.clip:
                    self._free.clamp_()
            yield self._batch(step)

    def report(self) -> dict[str, Any]:
        """The terms of the generator's last step, once."""
        said, self._said = self._said, SynthesisReport()
        return {"images_terms": said.terms} if said.steps else {}

    def show(self, folder: Path, epoch: int) -> dict[str, Any]:
        """A grid of images as PNG, and what the teachers see in them (`sight`).

        Every worker calls it, as the teachers are asked; the first one writes.
        """
        found = self.synthesizer.show()
        if not len(found["labels"]):
            return {}
        images = found["images"].clamp(0, 1)
        confidence, seen = self.synthesizer.said(images.to(self.learner.device), self.through).cpu().max(dim=1)
        if self.learner.rank == 0:
            _grid(images.float(), folder, epoch)
        labels = found["labels"].numpy() if wants_classes(self.synthesizer.plans) else None
        return sight(seen.numpy(), confidence.numpy(), labels, self.synthesizer.facts.num_classes) | {"file": _file(epoch)}

    def state(self) -> dict[str, Any]:
        """Generator, its optimizer, connectors, critics with their optimizers."""
        return self.synthesizer.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self.synthesizer.load_state(state)

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(frozen=True)
class Snapshot:
    """A student as it was after `version` steps: its weights, or a reference to them."""

    version: int
    weights: Any


class Makers(Protocol):
    """Whoever makes batches for a bank."""

    room: int  # batches worth having under way

    def snapshot(self, version: int, weights: Mapping[str, torch.Tensor]) -> Snapshot:
        """Puts a student's weights, a copy on the CPU, where makers find them."""

    def ask(self, number: int, student: Snapshot | None) -> None:
        """Asks for a batch."""

    def take(self, wait: bool) -> list[MadeBatch]:
        """The batches that have come; with `wait`, at least one. Raises LostError when nobody is left to make any."""

    @property
    def asked(self) -> list[int]:
        """Numbers of the batches under way."""

    def state(self) -> list[dict[str, Any]]:
        """What each has learnt and remembers; asked for when no batch is under way."""

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Continues from `state()`."""

    def close(self) -> None:
        """Gives back what they hold."""


class Here:
    """A maker in the student's process: a batch is made when it is waited for."""

    room = 1

    def __init__(self, job: Job, plans: list[Plan], facts: Facts, sources: Mapping[str, Source], device: torch.device) -> None:
        self.work = Workshop(job, plans, facts, sources, device)
        self._asked: list[tuple[int, Snapshot | None]] = []

    def snapshot(self, version: int, weights: Mapping[str, torch.Tensor]) -> Snapshot:
        """The weights as they are given: nobody changes them."""
        return Snapshot(version, weights)

    def ask(self, number: int, student: Snapshot | None) -> None:
        """Notes it."""
        self._asked.append((number, student))

    def take(self, wait: bool) -> list[MadeBatch]:  # noqa: ARG002
        """Makes all that was asked for."""
        asked, self._asked = self._asked, []
        return [self.work.make(number, student) for number, student in asked]

    @property
    def asked(self) -> list[int]:
        """Numbers of the batches under way."""
        return [number for number, _ in self._asked]

    def state(self) -> list[dict[str, Any]]:
        """What it has learnt and remembers."""
        return [self.work.synthesizer.state()]

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Continues from `state()`."""
        self.work.synthesizer.load_state(states[0])

    def close(self) -> None:
        """Nothing to give back."""


class Workshop:
    """What makes batches, in any process: a generator, teachers of its own, a student as it was.

    Args:
        job: resolved.
        plans: what the images minimise.
        facts: of the data there would be.
        sources: of the teachers, in this process.
        device: where all of it lives.
        maker: its number among the synthesizers.
    """

    def __init__(
        self,
        job: Job,
        plans: list[Plan],
        facts: Facts,
        sources: Mapping[str, Source],
        device: torch.device,
        maker: int = 0,
    ) -> None:
        self.maker, self.sources, self.version = maker, sources, -1
        with torch.random.fork_rng(devices=[]):
            self.student = plain(build(job.student, facts, device)).eval()
        self.synthesizer = Synthesizer(job, plans, facts, self.student, device)
        self.synthesizer.bind(self.through)

    def through(self, images: torch.Tensor, wanted: Mapping[str, tuple[Signal, ...]]) -> Mapping[str, Signals]:
        """What the teachers say of float images, with gradient back to these."""
        return through(self.sources, images, wanted)

    def make(self, number: int, student: Snapshot | None) -> MadeBatch:
        """A batch, with the student as it was."""
        if student is not None and student.version != self.version:
            self.student.load_state_dict(student.weights)
            self.version = student.version
        return self.synthesizer.make(self.through, number, self.version, self.maker)


class Banked:
    """The batches of a student that learns from a bank, which synthesizers fill beside it: a Feed.

    It asks for as many batches as its makers have room for, while the bank wants more and the pace allows; it waits for them
    only until the student may begin.
    """

    parts = "batches of images"

    def __init__(
        self,
        job: Job,
        plans: list[Plan],
        facts: Facts,
        learner: Learner,
        makers: Makers,
        order: Order,
        folder: Path,
    ) -> None:
        self.job, self.facts, self.learner, self.makers, self.order = job, facts, learner, makers, order
        spec = job.synthesis
        place = folder / BANK if order.world == 1 else folder / BANK / f"rank-{learner.rank}"
        self.bank = Bank(place, spec.capacity or 1, spec.memory_bytes, spec.priority)
        self._reads_student = any(plan.student for plan in plans)
        self._remembers = spec.reset != "batch" or any(plan.method.trains for plan in plans)
        self._count = (job.training.batch_size or 1) // order.world
        self._wants_classes = wants_classes(plans)
        self._next, self._made, self._stale, self._damaged, self._waited = learner.rank, 0, 0, 0, 0.0
        self._filled = 0  # of the batches with which the student begins, the same in all workers
        self._again: list[int] = []  # batches that were under way at the checkpoint that this start goes on from
        self._snapshot: Snapshot | None = None
        self._weights: Mapping[str, torch.Tensor] = {}  # of that snapshot
        self._seconds: list[float] = []

    def first(self) -> Batch:
        """A batch for the probe before the training: noise in the shape of images."""
        keyed = torch_generator(self.job.seed, "probe", self.learner.rank)
        size = (self._count, *self.facts.shape)
        images = torch.randint(256, size, generator=keyed, dtype=torch.int64).to(torch.uint8)
        return _fields(images, torch.zeros(self._count, dtype=torch.int64), torch.arange(self._count))

    def prepare(self) -> Iterator[tuple[int, int, dict[str, float]]]:
        """The batches with which the student begins, one after the other: how many are there, of how many."""
        start = self.job.synthesis.start or 1
        while self._filled < start:
            self._fill(self.learner.step_count, self._filled + 1)
            self._filled += 1
            yield self._filled, start, {}

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, from the student's step on; teachers may be asked for some that it comes to later."""
        step = self.learner.step_count
        while step // self.order.steps_per_epoch == epoch:
            self._fill(self.learner.step_count, self.job.synthesis.start or 1)
            keyed = torch_generator(self.job.seed, "bank", step, self.learner.rank)
            yield self._viewed(self.bank.draw(self._count, keyed), step)
            step += 1

    def _viewed(self, drawn: Mapping[str, torch.Tensor], step: int) -> Batch:
        """Images of the bank as the job augments them: each by its own draws at each step."""
        index, data = drawn["sample_index"].numpy(), self.job.data
        keys = Keys(self.job.data_seed, np.full(len(index), step), index, data.view)
        images = torch.from_numpy(augment(drawn["images"].numpy(), keys, data.augmentation))
        return _fields(images, drawn["labels"], drawn["sample_index"])

    def _fill(self, step: int, least: int) -> None:
        """Takes what has come and asks for more; waits while there are fewer batches than `least`."""
        started = time.perf_counter()
        while True:
            self._ask(step)
            wait = len(self.bank) < least
            if wait and not self.makers.asked:
                raise DataError("synthesis: expected batches for the bank, none is under way. Raise synthesis.capacity.")
            for batch in self.makers.take(wait):
                self._take(batch, step)
            if len(self.bank) >= least:
                break
        self._waited += time.perf_counter() - started

    def _ask(self, step: int) -> None:
        spec = self.job.synthesis
        capacity, begun = spec.capacity or 1, len(self.bank) >= (spec.start or 1)
        while len(self.makers.asked) < self.makers.room:
            under_way = len(self.makers.asked)
            usable = self._made - self.bank.damaged  # what was damaged is made anew
            if spec.grow == "once" and usable + under_way >= capacity:
                return
            if begun and spec.pace and usable + under_way >= (spec.start or 1) + step // spec.pace:
                return
            if self._again:
                number = self._again.pop(0)
            else:
                number, self._next = self._next, self._next + self.order.world
            self.makers.ask(number, self._student(step))

    def _student(self, step: int) -> Snapshot | None:
        if not self._reads_student:
            return None
        spec = self.job.synthesis
        every = min(spec.snapshot_every, spec.staleness or spec.snapshot_every)
        if self._snapshot is None or step - self._snapshot.version >= every:
            now = plain(self.learner.student).state_dict()
            self._weights = {name: value.detach().cpu().clone() for name, value in now.items()}
            self._snapshot = self.makers.snapshot(step, self._weights)
        return self._snapshot

    def _take(self, batch: MadeBatch, step: int) -> None:
        most = self.job.synthesis.staleness
        if most is not None and batch.version >= 0 and step - batch.version > most:
            self._stale += 1
            return
        self._made += 1
        self._seconds.append(batch.seconds)
        self.bank.put(batch)

    def report(self) -> dict[str, Any]:
        """How full the bank is, how long the student waited for it since the last record, batches made or damaged since."""
        waited, self._waited = self._waited, 0.0
        seconds, self._seconds = self._seconds, []
        found: dict[str, Any] = {"bank": len(self.bank), "bank_wait_s": round(waited, 6)}
        damaged, self._damaged = self.bank.damaged - self._damaged, self.bank.damaged
        found |= {"damaged": damaged} if damaged else {}
        return found | ({"made": len(seconds), "made_s": round(sum(seconds), 4)} if seconds else {})

    def show(self, folder: Path, epoch: int) -> dict[str, Any]:
        """A grid of the images that came last as PNG, what teachers saw in them (`sight`), and what the bank holds."""
        if not self.job.synthesis.show:
            return {}
        last = self.bank.newest(self.job.synthesis.show)
        if self.learner.rank == 0:
            _grid(torch.from_numpy(last["images"]).float() / 255, folder, epoch)
        labels = last["label"] if self._wants_classes else None
        found = sight(last["seen"], last["confidence"], labels, self.facts.num_classes)
        found |= self.bank.summary(self.facts.num_classes, self.learner.step_count)
        return found | {"made": self._made, "stale": self._stale, "file": _file(epoch)}

    def state(self) -> dict[str, Any]:
        """The bank, the snapshot in use, and which batches were asked for; those under way are asked for again.

        Where makers go on from batch to batch, those under way are waited for, and what the makers remember is in it.
        """
        while self._remembers and self.makers.asked:
            for batch in self.makers.take(True):
                self._take(batch, self.learner.step_count)
        makers = self.makers.state() if self._remembers else []
        kept = {"version": self._snapshot.version, "weights": dict(self._weights)} if self._snapshot is not None else None
        counts = {"next": self._next, "made": self._made, "stale": self._stale, "filled": self._filled}
        found = {"bank": self.bank.state(), "snapshot": kept, "again": sorted([*self.makers.asked, *self._again])} | counts
        return found | ({"makers": makers} if makers else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self.bank.load_state(state["bank"])
        self._damaged = int(state["bank"].get("damaged", 0))
        self._next, self._made, self._stale = int(state["next"]), int(state["made"]), int(state["stale"])
        self._filled, self._again = int(state["filled"]), [int(number) for number in state["again"]]
        if state["snapshot"] is not None:
            self._weights = state["snapshot"]["weights"]
            self._snapshot = self.makers.snapshot(int(state["snapshot"]["version"]), self._weights)
        if "makers" in state:
            self.makers.load_state(state["makers"])

    def close(self) -> None:
        """Lets the makers go."""
        self.makers.close()


def _fields(images: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> Batch:
    seeds = torch.zeros(len(labels), dtype=torch.int32)
    return Batch(images=images, labels=labels, sample_index=index, augmentation_seed=seeds)


def sight(
    seen: NDArray[np.int64], confidence: NDArray[np.float32], labels: NDArray[np.int64] | None, num_classes: int
) -> dict[str, Any]:
    """What teachers see in images that are shown.

    Args:
        seen: [b], the class of each image; UNSEEN where nobody noted it, which counts for nothing but `shown`.
        confidence: [b], how sure they are of it.
        labels: [b], the classes wanted; None: none were.
        num_classes: c.

    Returns:
        `shown`, the number of images; `classes`, how many there are of each class; `confidences`, how sure teachers are of
        these, a mean each, None where there is no image; `confidence`, of all; `wanted`, the share in which they see what was
        wanted, None where nothing was.
    """
    known = seen >= 0
    counts = np.bincount(seen[known], minlength=num_classes)
    sums = np.bincount(seen[known], weights=confidence[known], minlength=num_classes)
    return {
        "shown": len(seen),
        "classes": counts.tolist(),
        "confidences": [float(total / n) if n else None for total, n in zip(sums, counts)],
        "confidence": float(sums.sum() / known.sum()) if known.any() else None,
        "wanted": float((seen == labels)[known].mean()) if labels is not None and known.any() else None,
    }


def _file(epoch: int) -> str:
    return f"{SHOWN}/epoch-{epoch + 1:04d}.png"


def _grid(images: torch.Tensor, folder: Path, epoch: int) -> None:
    (folder / SHOWN).mkdir(exist_ok=True)
    path = folder / _file(epoch)
    part = path.with_suffix(f".{os.getpid()}")
    save_image(images, part, format="png", nrow=COLUMNS)
    os.replace(part, path)
