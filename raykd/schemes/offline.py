"""Offline distillation: frozen teachers, one student.

    driver   checks, starts teachers, watches
    worker   batch s+w ──request──> teacher replicas             window of w requests in flight
             batch s   <──signals── (in order)
             student forward, losses, backward ──sum of gradients──> the other workers
             optimizer step; every so often: checkpoint, evaluation

`learn` is the whole of one worker. It runs in the driver's process (local backend), in Ray Train workers and in actor groups
alike; with more than one worker the host has set up torch.distributed.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from raykd.config import Job
from raykd.data.batches import Plan as Order
from raykd.data.batches import evaluation_batches, make_batch, recipe
from raykd.data.loader import Loader
from raykd.data.sets import DataSet
from raykd.data.splits import has_split, open_data
from raykd.errors import Interrupted, LostError
from raykd.exchange.sources import Pending, Source
from raykd.roles import checkpoints
from raykd.roles.evaluator import Accuracy, evaluate
from raykd.roles.learner import Learner
from raykd.roles.losses import Plan
from raykd.roles.network import Facts, pick_device
from raykd.roles.optimisation import all_sum, world_size
from raykd.roles.recorder import Recorder, read
from raykd.roles.teacher import check_finite
from raykd.signals import Signals

Batch = Mapping[str, Tensor]
PROBE = "probe.json"  # shapes of the teachers' signals


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
    """

    plans: list[Plan]
    facts: Facts
    folder: Path
    should_stop: Callable[[], bool] = lambda: False
    on_eval: Callable[[dict[str, Any]], None] | None = None


def learn(rank: int, world: int, job: Job, sources: Mapping[str, Source], setting: Setting) -> dict[str, Any]:
    """Trains the student on one worker; resumes from the newest committed checkpoint of the run folder.

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
    torch.set_num_threads(job.launch.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.launch.tf32
    train = open_data(job.data, "train", job.seed)
    size, drop_last = job.training.batch_size or 1, job.training.drop_last
    views = job.data.augmentation_epochs
    order = Order(len(train), size, job.seed, drop_last=drop_last, world=world, rank=rank, augmentation_epochs=views)
    device = pick_device(job.launch.device, job.launch.gpus)
    labels = torch.tensor(train.labels)
    learner = Learner(job, setting.plans, setting.facts, labels, device, order.steps_per_epoch, rank)
    first = make_batch(train, order.indices(0, 0), job.data.augmentation, job.seed, 0)
    lost = _bind(learner, first | recipe(first, 0), sources, setting.folder / PROBE, rank)
    places = setting.folder / "checkpoints"
    step = _of_rank_0(checkpoints.newest(places))
    if step is not None:
        learner.load_state(checkpoints.load(places, step, rank, world))
    recorder = Recorder(setting.folder / "metrics.jsonl", learner.step_count) if rank == 0 else None
    try:
        return _Run(rank, world, job, sources, setting, train, order, learner, recorder).all(lost)
    finally:
        if recorder is not None:
            recorder.close()
        for source in sources.values():
            source.close()


def _bind(learner: Learner, batch: Batch, sources: Mapping[str, Source], kept: Path, rank: int) -> list[str]:
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
    learner.bind({name: value.to(learner.device) for name, value in batch.items()}, answers)
    return lost


@dataclass
class _Run:
    """One worker's loop over epochs and steps."""

    rank: int
    world: int
    job: Job
    sources: Mapping[str, Source]
    setting: Setting
    train: DataSet
    order: Order
    learner: Learner
    recorder: Recorder | None
    last: Accuracy | None = None
    best: Mapping[str, Any] | None = None  # of rank 0
    lost: set[str] = field(default_factory=set)  # sources
    dropped: dict[str, int] = field(default_factory=dict)  # teacher -> the first step without it

    def all(self, lost: list[str]) -> dict[str, Any]:
        """All epochs, evaluation, export; without the sources that are `lost` already."""
        training, launch = self.job.training, self.job.launch
        started, first = time.time(), self.learner.step_count
        self._remember(lost)
        past = read(self.setting.folder / "metrics.jsonl", "eval") if self.rank == 0 else []
        self.best = max(past, key=lambda r: r["top1"], default=None)
        last_step = self.order.steps_per_epoch * (training.epochs or 1)
        if training.max_steps is not None:
            last_step = min(last_step, training.max_steps)
        at, ready, beside = self.order.position(first), launch.prefetch, launch.loader_processes
        with Loader(self.train, self.order, self.job.data.augmentation, start=at, prefetch=ready, processes=beside) as loader:
            while self.learner.step_count < last_step:
                epoch = self.learner.step_count // self.order.steps_per_epoch
                self._epoch(loader, epoch, last_step)
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

    def _epoch(self, loader: Loader, epoch: int, last_step: int) -> None:
        """The steps of an epoch, or what is left of it. Its last checkpoint is the caller's, after the evaluation."""
        if self.learner.step_count % self.order.steps_per_epoch == 0:
            self.learner.on_epoch(epoch)
        last_step = min(last_step, (epoch + 1) * self.order.steps_per_epoch)
        left = last_step - self.learner.step_count
        batches = (batch | recipe(batch, self.order.view(epoch)) for batch in islice(loader.epoch(epoch), left))
        mark = time.perf_counter()
        sources = {name: source for name, source in self.sources.items() if name not in self.lost}
        for batch, signals, waited in ahead(batches, sources, self._lose):
            count = self._count(epoch)
            report = self.learner.step(batch, signals, count, self.setting.should_stop())
            now = time.perf_counter()
            self._record(report, epoch, count, waited, now - mark)
            mark = now
            if self.learner.step_count >= last_step:
                return
            if report.stop or (self.job.training.checkpoint_every and self._due()):
                self._checkpoint()
            if report.stop:
                raise Interrupted(f"Stopped at step {self.learner.step_count}; a checkpoint was written.")

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
        """What earlier starts recorded of teachers that were lost; the others are back."""
        away: dict[str, int] = {}
        for record in read(self.setting.folder / "metrics.jsonl") if self.rank == 0 else []:
            if record.get("kind") == "dropped":
                away |= {teacher: int(record["step"]) for teacher in record["teachers"] if teacher not in away}
            elif record.get("kind") == "returned":
                away = {teacher: step for teacher, step in away.items() if teacher not in record["teachers"]}
        still = [t for t, spec in self.job.teachers.items() if {t, spec.actor} & set(lost)]
        back = [teacher for teacher in away if teacher not in still]
        if back and self.recorder is not None:
            self.recorder.write("returned", self.learner.step_count, teachers=back)
        self.lost = set(lost)
        self.dropped = {teacher: away.get(teacher, self.learner.step_count) for teacher in still}
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
        if self.recorder is None:
            return
        norms = {"grad_norms": report.grad_norms} if report.grad_norms else {}
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
            **norms,
        )

    def _evaluate(self, epoch: int) -> None:
        accuracy = self.last = self._accuracy("eval")
        if self.recorder is not None and accuracy is not None:
            record = {"epoch": epoch, **_as_dict(accuracy)}
            self.recorder.write("eval", self.learner.step_count, **record)
            if self.best is None or accuracy.top1 > self.best["top1"]:
                self.best = record
                self._export("student_best.safetensors")

    def _accuracy(self, split: str) -> Accuracy | None:
        if not has_split(self.job.data, split):
            return None
        dataset = open_data(self.job.data, split, self.job.seed)
        self.learner.settle()
        model = self.learner.evaluated_model().eval()
        tapped = self.learner.tapped
        batches = evaluation_batches(dataset, max(self.job.training.batch_size or 1, 128), rank=self.rank, world=self.world)
        if model is self.learner.student:
            return evaluate(lambda x: tapped(x)["logits"], batches)
        return evaluate(lambda x: model(tapped.inputs(x)), batches)

    def _export(self, name: str) -> None:
        model = self.learner.evaluated_model()
        save_file({k: v.contiguous().cpu().clone() for k, v in model.state_dict().items()}, self.setting.folder / name)

    def _checkpoint(self) -> None:
        checkpoints.save(
            self.setting.folder / "checkpoints",
            self.learner.step_count,
            self.rank,
            self.world,
            self.learner.state(),
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
        if self.rank == 0:
            self._export("student.safetensors")
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
