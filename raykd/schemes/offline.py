"""Offline distillation: frozen teachers, one student.

    driver   checks, starts teachers, watches
    worker   batch s+w ──request──> teacher replicas             window of w requests in flight
             batch s   <──signals── (in order)
             student forward, losses, backward ──sum of gradients──> the other workers
             optimizer step; every so often: checkpoint, evaluation

`learn` is the whole of one worker; `learning` is the same as a generator, which pauses where the student exchanges signals
with its peers (raykd/schemes/online.py). It runs in the driver's process (local backend), in Ray Train workers and in actor
groups alike; with more than one worker the host has set up torch.distributed.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from raykd.config import Job
from raykd.data.batches import Batch as Fields
from raykd.data.batches import Plan as Order
from raykd.data.batches import batch_of, evaluation_batches, recipe
from raykd.data.loader import Loader
from raykd.data.sets import DataSet
from raykd.data.splits import has_split, open_data
from raykd.errors import Interrupted, LostError
from raykd.exchange.sources import Pending, Source
from raykd.models import Branched
from raykd.resolve import reads_images
from raykd.roles import checkpoints
from raykd.roles.evaluator import Accuracy, evaluate, evaluate_branches
from raykd.roles.learner import Learner, alone
from raykd.roles.losses import Plan
from raykd.roles.network import Facts, branching_of, pick_device, plain
from raykd.roles.optimisation import all_sum, world_size
from raykd.roles.process import settle
from raykd.roles.recorder import Recorder, read
from raykd.roles.teacher import check_finite
from raykd.schemes import data_free
from raykd.signals import Signal, Signals

Batch = Mapping[str, Tensor]
PROBE = "probe.json"  # shapes of the teachers' signals
TOLD_S, KEPT_S = 1.0, 60.0  # before the first step: seconds between two records, and between two checkpoints


class Link(Protocol):
    """What a student keeps of its peers between steps."""

    drop: bool  # whether the training goes on without a peer that is lost

    def meets(self, step: int) -> bool:
        """Whether there is an exchange at this step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""

    def stats(self) -> dict[str, dict[str, Any]]:
        """Neighbour -> what was exchanged with it."""

    def close(self) -> None:
        """Leaves its peers."""


class Feed(Protocol):
    """Where batches come from: read, or made."""

    parts: str  # what `prepare` counts, as a person is told

    def prepare(self) -> Iterator[tuple[int, int, dict[str, float]]]:
        """What it does before the first step, from where it is on; after each part: how many are done, of how many, terms."""

    def epoch(self, epoch: int) -> Iterator[Fields]:
        """The batches of an epoch: what is left of it if the training is within it, else all."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""

    def report(self) -> dict[str, Any]:
        """What the next step record says of it."""

    def show(self, folder: Path, epoch: int) -> dict[str, Any]:
        """Puts out some of its images for the eye; what the record of the evaluation says of them."""

    def close(self) -> None:
        """Gives back what it holds."""


class Read:
    """Batches read from a data set, made ahead by threads or processes."""

    parts = ""

    def __init__(self, train: DataSet, order: Order, job: Job, start: tuple[int, int]) -> None:
        launch = job.launch
        self.loader = Loader(
            train, order, job.data.augmentation, start=start, prefetch=launch.prefetch, processes=launch.loader_processes
        )

    def prepare(self) -> Iterator[tuple[int, int, dict[str, float]]]:
        """Nothing."""
        return iter(())

    def epoch(self, epoch: int) -> Iterator[Fields]:
        """As Feed."""
        return self.loader.epoch(epoch)

    def state(self) -> dict[str, Any]:
        """Nothing: a batch is a function of its keys."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""

    def report(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def show(self, folder: Path, epoch: int) -> dict[str, Any]:  # noqa: ARG002
        """Nothing."""
        return {}

    def close(self) -> None:
        """Stops the loader."""
        self.loader.close()


@dataclass(frozen=True)
class Meeting:
    """How a student meets its peers.

    Attributes:
        link: to them.
        published: signals they ask of it.
        margin: steps after which all of them have heard that one was asked to stop.
        at: step of the checkpoint that all of them have; None: each begins with its newest.
        rejoin: step at which it joins the others again, with the weights of its newest checkpoint; None: that checkpoint's.
    """

    link: Link
    published: tuple[Signal, ...]
    margin: int = 0
    at: int | None = None
    rejoin: int | None = None


@dataclass(frozen=True)
class Offer:
    """What a student has at an exchange, before the update of `step`; -1 is the probe before the training.

    Attributes:
        step: of the run.
        version: optimizer steps behind its weights.
        signals: what its peers ask of it.
        batch: that it is learning from.
        weights: gives those of the student, as it is now.
        stop_at: it ends before this step.
    """

    step: int
    version: int
    signals: Signals
    batch: Batch
    weights: Callable[[], Mapping[str, Tensor]]
    stop_at: int | None = None


@dataclass(frozen=True)
class Said:
    """What a student gets at an exchange: its peers' signals, the versions behind them, who is lost, and when they end."""

    answers: Mapping[str, Signals] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    stop_at: int | None = None
    waited: float = 0.0


Learning = Generator[Offer, Said, Any]


@dataclass(frozen=True)
class Setting:
    """What the launch hands to every worker beside the job.

    Attributes:
        plans: the connected losses.
        facts: of the training data.
        folder: of the run.
        should_stop: asked before every step; True ends the training after a checkpoint.
        on_eval: told by rank 0, after each evaluation and the checkpoint that follows it: epoch, step, top1, top5, count, and
            the checkpoint's folder.
        meeting: how the student meets its peers; None: it has none.
        images: what images minimise that are made instead of read.
        makers: gives who fills a bank of them, for a student on this device; None: generator and student take turns.
    """

    plans: list[Plan]
    facts: Facts
    folder: Path
    should_stop: Callable[[], bool] = lambda: False
    on_eval: Callable[[dict[str, Any]], None] | None = None
    meeting: Meeting | None = None
    images: list[Plan] = field(default_factory=list)
    makers: Callable[[torch.device], Any] | None = None


def learn(rank: int, world: int, job: Job, sources: Mapping[str, Source], setting: Setting) -> dict[str, Any]:
    """Trains a student without peers on one worker; resumes from the newest committed checkpoint of the run folder.

    Args:
        rank: of this worker.
        world: number of workers; torch.distributed is set up where it is above 1.
        job: resolved.
        sources: where signals come from, each of one teacher or of several.
        setting: the connected losses, facts of the data, the run folder.

    Returns:
        The run's result: accuracies, steps and seconds since the last start; `best` on rank 0 only.

    Raises:
        Interrupted: a stop was asked for; a checkpoint was written. DivergenceError, SourceError: as their docs say.
    """
    found: dict[str, Any] = alone(learning(rank, world, job, sources, setting))
    return found


def learning(rank: int, world: int, job: Job, sources: Mapping[str, Source], setting: Setting) -> Learning:
    """`learn` of a student that may have peers: yields an Offer at each exchange and is sent what was Said."""
    settle(job.launch.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.launch.tf32
    made = bool(setting.images)
    train = open_data(job.data, "train", job.data_seed) if not made or reads_images(job) else None
    order = _order(job, setting.facts.num_samples if made or train is None else len(train), world, rank)
    device = pick_device(job.launch.device, job.launch.gpus)
    meeting = setting.meeting
    labels = torch.empty(0, dtype=torch.int64) if made or train is None else torch.tensor(train.labels)
    published = meeting.published if meeting is not None else ()
    learner = Learner(job, setting.plans, setting.facts, labels, device, order.steps_per_epoch, rank, published)
    if job.student.branching.views == "own" and isinstance(learner.student, Branched):
        order = replace(order, views=learner.student.count)
    feed: Feed | None = None
    if made or train is None:
        own = (job, setting.images, setting.facts, learner)
        made_by = setting.makers(device) if setting.makers is not None else None
        made_feed = (
            data_free.Made(*own, sources, order, train)
            if made_by is None
            else data_free.Banked(*own, made_by, order, setting.folder)
        )
        feed, first = made_feed, made_feed.first()
    else:
        first = batch_of(train, order, job.data.augmentation, 0, 0)
    lost = yield from _bind(learner, first | recipe(first, 0), sources, setting.folder / PROBE, rank)
    places = setting.folder / "checkpoints"
    step = _of_rank_0(checkpoints.newest(places, most=meeting.at if meeting is not None else None))
    lag = 0
    if step is not None:
        state = checkpoints.load(places, step, rank, world)
        learner.load_state(state)
        if feed is not None:
            feed.load_state(state["feed"])
        lag = int(state.get("lag", 0))
        if meeting is not None:
            meeting.link.load_state(state.get("peers", {}))
    if rank == 0 and step is not None and meeting is not None:
        checkpoints.forget(places, after=step)
    recorder = Recorder(setting.folder / "metrics.jsonl", learner.step_count) if rank == 0 else None
    if meeting is not None and meeting.rejoin is not None and meeting.rejoin > learner.step_count:
        if recorder is not None:
            recorder.write("rejoined", meeting.rejoin, version=learner.step_count - lag)
        lag += meeting.rejoin - learner.step_count
        learner.step_count = meeting.rejoin
    if feed is None and train is not None:
        feed = Read(train, order, job, order.position(learner.step_count))
    assert feed is not None
    try:
        found = yield from _Run(rank, world, job, sources, setting, feed, order, learner, recorder, lag=lag).all(lost)
        return found
    finally:
        if recorder is not None:
            recorder.close()
        feed.close()
        for source in sources.values():
            source.close()
        if meeting is not None:
            meeting.link.close()


def _order(job: Job, samples: int, world: int, rank: int) -> Order:
    """Which samples this worker sees, and in which views."""
    training, data = job.training, job.data
    return Order(
        samples,
        training.batch_size or 1,
        job.data_seed,
        drop_last=training.drop_last,
        world=world,
        rank=rank,
        augmentation_epochs=data.augmentation_epochs,
        first_view=data.view,
    )


def _bind(
    learner: Learner, batch: Batch, sources: Mapping[str, Source], kept: Path, rank: int
) -> Generator[Offer, Said, list[str]]:
    """The probe: one real batch through every teacher and the student, before the first step of this start.

    Names the sources that were lost before it and that the training may go on without. Their parts are built from the shapes
    of the run's first probe, so that its checkpoints fit.
    """
    queue: deque[tuple[Batch, dict[str, Pending]]] = deque([(batch, {})])
    gone = _ask(queue, sources)
    signals: dict[str, dict[str, Signals]] = {}
    for name, answer in queue[0][1].items():
        try:
            signals[name] = dict(answer.result())
        except LostError:
            gone |= _droppable(name, sources)
    lost = _agreed(gone, sources)
    if lost and not kept.exists():
        raise LostError(
            f"Teacher {', '.join(lost)}: no replica is left, and there was none to begin with. Start the run again."
        )
    before = json.loads(kept.read_text()) if lost else {}
    for name in lost:
        shapes = before[name].items()
        signals[name] = {t: {key: torch.zeros(shape) for key, shape in found.items()} for t, found in shapes}
    answers = {t: found for own in signals.values() for t, found in own.items()}
    for name, found in answers.items():
        check_finite(name, found)
    if rank == 0 and not lost:
        shapes_of_all = {n: {t: {k: list(v.shape) for k, v in f.items()} for t, f in own.items()} for n, own in signals.items()}
        kept.write_text(json.dumps(shapes_of_all) + "\n")
    probing = learner.probing({name: value.to(learner.device) for name, value in batch.items()}, answers)
    yield from _paused(probing, lambda signals: Offer(-1, 0, signals, batch, learner.student.state_dict))
    return lost


def _paused(
    exchange: Generator[Signals, Mapping[str, Signals], Any],
    offer: Callable[[Signals], Offer],
    heard: Callable[[Said], Mapping[str, Signals]] = lambda said: said.answers,
) -> Learning:
    """Runs the learner's part of an exchange, which pauses once or not at all."""
    try:
        signals = next(exchange)
    except StopIteration as done:
        return done.value
    said = yield offer(signals)
    try:
        exchange.send(heard(said))
    except StopIteration as done:
        return done.value
    raise AssertionError("a step has one exchange")


@dataclass
class _Run:
    """One worker's loop over epochs and steps."""

    rank: int
    world: int
    job: Job
    sources: Mapping[str, Source]
    setting: Setting
    feed: Feed
    order: Order
    learner: Learner
    recorder: Recorder | None
    last: Accuracy | None = None
    best: Mapping[str, Any] | None = None  # of rank 0
    lost: set[str] = field(default_factory=set)  # sources
    dropped: dict[str, int] = field(default_factory=dict)  # teacher or peer -> the first step without it
    branches: list[Accuracy] = field(default_factory=list)  # of the last evaluation, where the student has several; last: all
    lag: int = 0  # steps that were never trained, as it had left its peers
    stop_at: int | None = None  # the training ends before this step
    said: Said = Said()  # of the last exchange

    def all(self, lost: list[str]) -> Learning:
        """All epochs, evaluation, export; without the sources that are `lost` already."""
        training = self.job.training
        started, first = time.time(), self.learner.step_count
        self._remember(lost)
        past = read(self.setting.folder / "metrics.jsonl", "eval") if self.rank == 0 else []
        self.best = max(past, key=lambda r: r["top1"], default=None)
        last_step = self.learner.total_steps
        self._prepare()
        while self.learner.step_count < last_step:
            epoch = self.learner.step_count // self.order.steps_per_epoch
            yield from self._epoch(epoch, last_step)
            done = self.learner.step_count >= last_step
            measured = done or (epoch + 1) % training.eval_every == 0
            if measured:
                self._evaluate(epoch)
            if done or self._due():
                self._checkpoint()
            tell = self.setting.on_eval if measured and self.rank == 0 else None
            if tell is not None and self.last is not None:
                self._tell(epoch, self.last, tell)
        return self._finish(time.time() - started, self.learner.step_count - first)

    def _prepare(self) -> None:
        """What the feed does before the first step. A stop is heard after each part; what is done is kept now and then.

        Raises:
            Interrupted: a stop was asked for; a checkpoint was written.
        """
        told, kept = time.monotonic() - TOLD_S, time.monotonic()
        for done, total, terms in self.feed.prepare():
            if self.recorder is not None and (time.monotonic() - told >= TOLD_S or done == total):
                told = time.monotonic()
                counted = {"done": done, "total": total, "parts": self.feed.parts, "terms": terms}
                self.recorder.write("prepared", self.learner.step_count, **counted)
            own = (self.setting.should_stop(), time.monotonic() - kept >= KEPT_S)
            stop, due = (all_sum(torch.tensor(own, dtype=torch.float32)) > 0).tolist()
            if stop or due or done == total:
                self._checkpoint()
                kept = time.monotonic()
            if stop:
                raise Interrupted(
                    f"Stopped after {done:,} of {total:,} {self.feed.parts} before the first step; a checkpoint was written."
                )

    def _epoch(self, epoch: int, last_step: int) -> Learning:
        """The steps of an epoch, or what is left of it. Its last checkpoint is the caller's, after the evaluation."""
        if self.learner.step_count % self.order.steps_per_epoch == 0:
            self.learner.on_epoch(epoch)
        last_step = min(last_step, (epoch + 1) * self.order.steps_per_epoch)
        left = last_step - self.learner.step_count
        batches = (batch | recipe(batch, self.order.view(epoch)) for batch in islice(self.feed.epoch(epoch), left))
        mark = time.perf_counter()
        sources = {name: source for name, source in self.sources.items() if name not in self.lost}
        for batch, signals, waited in ahead(batches, sources, self._lose):
            count = self._count(epoch)
            report = yield from self._step(batch, signals, count)
            now = time.perf_counter()
            self._record(report, epoch, count, waited, now - mark)
            mark = now
            if report.stop:
                margin = self.setting.meeting.margin if self.setting.meeting is not None else 0
                self._end_at(self.learner.step_count + margin)
            if self.learner.step_count >= last_step:
                return
            ends = self.stop_at is not None and self.learner.step_count >= self.stop_at
            if ends or (self.job.training.checkpoint_every and self._due()):
                self._checkpoint()
            if ends:
                raise Interrupted(f"Stopped at step {self.learner.step_count}; a checkpoint was written.")

    def _step(self, batch: Batch, signals: Mapping[str, Signals], count: int) -> Learning:
        """One step of the learner, with an exchange in its middle where there is one."""
        step, meeting = self.learner.step_count, self.setting.meeting
        meets = meeting is not None and meeting.link.meets(step)
        stepping = self.learner.stepping(batch, signals, count, self.setting.should_stop(), exchange=meets)

        def offer(found: Signals) -> Offer:
            return Offer(step, step - self.lag, found, batch, self.learner.student.state_dict, self.stop_at)

        self.said = Said()
        report = yield from _paused(stepping, offer, self._heard)
        return report

    def _heard(self, said: Said) -> Mapping[str, Signals]:
        """What its peers have said, without those that a worker of this student has lost."""
        self.said = said
        names = sorted({t for plan in self.setting.plans for t in plan.teachers if t not in self.job.teachers})
        meeting = self.setting.meeting
        gone = sorted(said.gone)
        if meeting is not None and meeting.link.drop and self.world > 1 and names:
            gone = _by_all(set(gone) | (set(names) & set(self.dropped)), names)
        for peer in gone:
            if peer not in self.dropped:
                self.dropped[peer] = self.learner.step_count
                warnings.warn(f"Peer {peer!r} is lost: step {self.learner.step_count} goes on without it.", stacklevel=2)
                if self.recorder is not None:
                    self.recorder.write("dropped", self.learner.step_count, peers=[peer])
        if said.stop_at is not None:
            self._end_at(said.stop_at)
        return {peer: found for peer, found in said.answers.items() if peer not in self.dropped}

    def _end_at(self, step: int) -> None:
        """The training ends before this step; the earliest that anybody has named counts."""
        self.stop_at = step if self.stop_at is None else min(step, self.stop_at)

    def _lose(self, names: list[str]) -> None:
        """Sources are lost and the training goes on without their teachers."""
        self.lost |= set(names)
        gone = [t for name in names for t, spec in self.job.teachers.items() if name in (t, spec.actor)]
        for teacher in gone:
            self.dropped.setdefault(teacher, self.learner.step_count)
            warnings.warn(f"Teacher {teacher!r} is lost: step {self.learner.step_count} goes on with the others.", stacklevel=2)
        if self.recorder is not None:
            self.recorder.write("dropped", self.learner.step_count, teachers=gone)

    def _remember(self, lost: list[str]) -> None:
        """What earlier starts recorded of teachers that were lost; the others are back. Peers that were lost stay away."""
        away: dict[str, int] = {}
        peers: dict[str, int] = {}
        for record in read(self.setting.folder / "metrics.jsonl") if self.rank == 0 else []:
            if record.get("kind") == "dropped":
                away |= {t: int(record["step"]) for t in record.get("teachers", []) if t not in away}
                peers |= {p: int(record["step"]) for p in record.get("peers", []) if p not in peers}
            elif record.get("kind") == "returned":
                away = {teacher: step for teacher, step in away.items() if teacher not in record["teachers"]}
        still = [t for t, spec in self.job.teachers.items() if {t, spec.actor} & set(lost)]
        back = [teacher for teacher in away if teacher not in still]
        if back and self.recorder is not None:
            self.recorder.write("returned", self.learner.step_count, teachers=back)
        self.lost = set(lost)
        self.dropped = peers | {teacher: away.get(teacher, self.learner.step_count) for teacher in still}
        if any(teacher not in away for teacher in still):
            self._lose(lost)

    def _tell(self, epoch: int, accuracy: Accuracy, tell: Callable[[dict[str, Any]], None]) -> None:
        places = self.setting.folder / "checkpoints"
        newest = checkpoints.newest(places)
        found = {"epoch": epoch, "step": self.learner.step_count, **_as_dict(accuracy)}
        tell(found | {"checkpoint": places / f"step-{newest:08d}" if newest is not None else None})

    def _due(self) -> bool:
        """Whether a checkpoint is due at this step; without a number of steps, at the end of each epoch."""
        every = self.job.training.checkpoint_every or self.order.steps_per_epoch
        return self.learner.step_count % every == 0

    def _count(self, epoch: int) -> int:
        """Samples in the batches of all workers at the coming step."""
        return len(self.order.global_batch(epoch, self.learner.step_count - epoch * self.order.steps_per_epoch))

    def _record(self, report: Any, epoch: int, count: int, waited: float, seconds: float) -> None:
        made = self.feed.report()
        if self.recorder is None:
            return
        more: dict[str, Any] = {"grad_norms": report.grad_norms} if report.grad_norms else {}
        more |= made
        if self.setting.meeting is not None:
            more |= {"peers_wait_s": round(self.said.waited, 6), "versions": dict(self.said.versions)}
        self.recorder.write(
            "step",
            self.learner.step_count,
            epoch=epoch,
            loss=report.loss,
            terms=report.terms,
            lr=report.lr,
            images=count,
            wait_s=round(waited, 6),
            step_s=round(seconds, 6),
            **more,
        )

    def _evaluate(self, epoch: int) -> None:
        accuracy = self.last = self._accuracy("eval")
        shown = self.feed.show(self.setting.folder, epoch)
        if self.recorder is None:
            return
        record: dict[str, Any] = {"epoch": epoch, **({"shown": shown} if shown else {})}
        if accuracy is None:
            if shown:
                self.recorder.write("shown", self.learner.step_count, **record)
            return
        record |= _as_dict(accuracy)
        if self.branches:
            record["branches"] = [_as_dict(found) for found in self.branches]
        self.recorder.write("eval", self.learner.step_count, **record)
        if self.best is None or accuracy.top1 > self.best["top1"]:
            self.best = record
            self._export("student_best.safetensors")

    def _accuracy(self, split: str) -> Accuracy | None:
        if not has_split(self.job.data, split):
            return None
        dataset = open_data(self.job.data, split, self.job.data_seed)
        self.learner.settle()
        model, tapped = self.learner.evaluated_model(), self.learner.tapped
        modes = {m: m.training for m in model.modules()}
        model.eval()
        batches = evaluation_batches(dataset, max(self.job.training.batch_size or 1, 128), rank=self.rank, world=self.world)
        branching, other = branching_of(self.job.student), model if model is not self.learner.student else None
        if branching is None or not isinstance(model, Branched):
            found = [evaluate(lambda x: tapped.logits(x, other), batches)]
        else:
            same = branching.kind in ("split", "widths") or (branching.kind == "exits" and branching.classes == 1)
            found = evaluate_branches(lambda x: tapped.branches(x, other), batches, model.count if same else 1)
            self.branches = found
        for module, mode in modes.items():
            module.training = mode
        return found[0]

    def _export(self, name: str) -> None:
        model = plain(self.learner.evaluated_model())
        _save(model.state_dict(), self.setting.folder / name)

    def _export_branches(self) -> None:
        """Branches 1, 2, ... that are whole models, each as the plain model it is."""
        model, branching = self.learner.evaluated_model(), branching_of(self.job.student)
        if isinstance(model, Branched) and branching is not None and branching.kind == "split":
            for i in range(1, model.count):
                _save(model.state_of(i), self.setting.folder / f"student_branch{i}.safetensors")

    def _checkpoint(self) -> None:
        meeting = self.setting.meeting
        beside = {"peers": meeting.link.state(), "lag": self.lag} if meeting is not None else {}
        checkpoints.save(
            self.setting.folder / "checkpoints",
            self.learner.step_count,
            self.rank,
            self.world,
            self.learner.state() | beside | {"feed": self.feed.state()},
            _barrier,
            self.job.training.keep_checkpoints,
        )

    def _finish(self, seconds: float, steps: int) -> dict[str, Any]:
        last, test = self.last or self._accuracy("eval"), self._accuracy("test")
        result: dict[str, Any] = {
            "steps": self.learner.step_count,
            "epochs": round(self.learner.step_count / self.order.steps_per_epoch, 3),
            "seconds": round(seconds, 3),
            "steps_this_time": steps,
            "last": _as_dict(last) if last else None,
            "test": _as_dict(test) if test else None,
            "exchange": _exchanged(self.sources),
            "dropped": self.dropped,
        }
        if self.branches:
            *each, together = [_as_dict(found) for found in self.branches]
            result["branches"] = {"each": each, "ensemble": together, "split": "test" if test else "eval"}
        if self.setting.meeting is not None:
            result["edges"] = self.setting.meeting.link.stats()
        if self.rank == 0:
            self._export("student.safetensors")
            self._export_branches()
            best = self.best
            result["best"] = {k: best[k] for k in ("top1", "top5", "count", "epoch")} if best else None
        return result


def ahead(
    batches: Iterable[Batch], sources: Mapping[str, Source], lost: Callable[[list[str]], None] | None = None
) -> Iterator[tuple[Batch, dict[str, Signals], float]]:
    """Keeps each source's window of requests in flight and yields (batch, signals by teacher, seconds waited) in order.

    A source with `drop` that is lost is left out from then on, by all workers from the same step; `lost` is told its name.
    """
    queue: deque[tuple[Batch, dict[str, Pending]]] = deque()
    stream = iter(batches)
    asked_of = dict(sources)
    while True:
        widest = max((source.window for source in asked_of.values()), default=1)
        while len(queue) < widest and (batch := next(stream, None)) is not None:
            queue.append((batch, {}))
        gone = _ask(queue, asked_of)
        if not queue:
            return
        batch, pending = queue.popleft()
        started = time.perf_counter()
        signals: dict[str, dict[str, Signals]] = {}
        for name in asked_of:
            try:
                if name not in gone:
                    signals[name] = dict(pending[name].result())
            except LostError:
                gone |= _droppable(name, asked_of)
        for name in (found := _agreed(gone, asked_of)):
            del asked_of[name]
            signals.pop(name, None)
        if found and lost is not None:
            lost(found)
        yield batch, {t: s for answers in signals.values() for t, s in answers.items()}, time.perf_counter() - started


def _ask(queue: Iterable[tuple[Batch, dict[str, Pending]]], sources: Mapping[str, Source]) -> set[str]:
    """Asks every source for the batches of its window; names those that are lost."""
    gone: set[str] = set()
    for place, (batch, asked) in enumerate(queue):
        for name, source in sources.items():
            if name not in asked and name not in gone and place < source.window:
                try:
                    asked[name] = source.request(batch)
                except LostError:
                    gone |= _droppable(name, sources)
    return gone


def _droppable(name: str, sources: Mapping[str, Source]) -> set[str]:
    """The name, where the training may go on without that source; else the error that is being handled goes on."""
    if not sources[name].drop:
        raise
    return {name}


def _agreed(gone: set[str], sources: Mapping[str, Source]) -> list[str]:
    """Sources that any worker has lost."""
    shared = world_size() > 1 and any(source.drop for source in sources.values())
    return _by_all(gone, list(sources)) if shared else sorted(gone)


def _by_all(gone: set[str], names: list[str]) -> list[str]:
    """Sources that any worker has lost, known to all."""
    flags = all_sum(torch.tensor([float(name in gone) for name in names]))
    return [name for name, flag in zip(names, flags.tolist()) if flag]


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous().cpu().clone() for name, value in state.items()}, path)


def _barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def _of_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() > 1:
        box = [value]
        dist.broadcast_object_list(box, 0)
        value = box[0]
    return value


def _exchanged(sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """What the sources of all workers have done since the last start: sums, and the largest codec errors."""
    own = {name: vars(source.stats) for name, source in sources.items()}
    if world_size() == 1:
        return own
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, own)
    found: dict[str, dict[str, Any]] = {}
    for name, stats in own.items():
        found[name] = {key: sum(other[name][key] for other in everyone) for key in stats if key != "errors"}
        errors = [other[name]["errors"] for other in everyone]
        found[name]["errors"] = {key: max(e.get(key, 0.0) for e in errors) for e in errors for key in e}
    return found


def _as_dict(accuracy: Accuracy) -> dict[str, Any]:
    return {"top1": accuracy.top1, "top5": accuracy.top5, "count": accuracy.count}
