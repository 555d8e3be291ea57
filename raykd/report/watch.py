"""One training followed: what is worth saying about it. No terminal here, so that all of it can be tested as text."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raykd.config import Job
from raykd.report import words
from raykd.report.follow import Follower, Progress, Record

ADVICE_ABOVE = 0.15


class Remark(NamedTuple):
    """One line to print; `kind` is eval, note or warn."""

    kind: str
    text: str


class Watch:
    """Follows one training's metrics.jsonl.

    What the file holds already when a resumed run begins is taken in silence.

    Args:
        path: of the training: "" for the job itself, "baseline", "stages.<name>".
        job: resolved.
        folder: of the training.
        total_steps: of the whole training.
        clock: seconds that pass.
        title: of its lines; None: the path in words.
    """

    def __init__(
        self,
        path: str,
        job: Job,
        folder: Path,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
        title: str | None = None,
    ) -> None:
        self.path, self.job = path, job
        self.title = title or words.title(path, job.name, bool(job.peers))
        self.progress = Progress(total_steps, clock)
        self._follower = Follower(folder / "metrics.jsonl")
        self._best: tuple[float, int] | None = None
        self._evaluated = self._looked = -1  # step of the last evaluation, and of the last images, that were told
        self._advised = False
        self._shown_norms = False
        self._judged: dict[str, int] = {}
        for record in self._follower.read()[0]:
            self._take(record, live=False)

    def poll(self) -> list[Remark]:
        """Reads what is new and says what is worth reading."""
        records, over = self._follower.read()
        known = self.progress.step if over else -1
        if over:
            self.progress.restart()
        remarks = []
        for record in records:
            remarks += self._take(record, live=int(record.get("step", 0)) > known)
        return [*remarks, *self._advice()]

    def finish(self) -> list[Remark]:
        """As `poll`, when the training has ended."""
        return self.poll()

    def line(self) -> str:
        """The state in one line."""
        progress, epochs = self.progress, self.job.training.epochs
        if progress.prepared is not None:
            done, total = progress.prepared
            left = progress.prepared_left
            return f"{self.title} · {done:,}/{total:,} {progress.parts} before the first step" + (
                f" · {words.duration(left)} left" if left is not None else ""
            )
        parts = [
            self.title,
            f"epoch {progress.epoch + 1}" + (f"/{epochs}" if epochs else ""),
            f"step {progress.step:,}/{progress.total_steps:,}",
        ]
        if progress.images_per_s is not None:
            parts.append(f"{progress.images_per_s:,.0f} img/s")
        if progress.loss is not None:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in progress.terms.items())
            parts.append(f"loss {progress.loss:.4g}" + (f" ({terms})" if len(progress.terms) > 1 else ""))
        if progress.wait_share is not None and self.job.teachers:
            parts.append(f"teacher wait {progress.wait_share:.0%}".replace("%", " %"))
        if progress.seconds_left is not None:
            parts.append(f"ETA {words.duration(progress.seconds_left)}")
        return " · ".join(parts)

    def _take(self, record: Record, live: bool) -> list[Remark]:
        if record.get("kind") == "eval":
            return self._evaluation(record, live) + self._shown(record, live)
        if record.get("kind") == "shown":
            return self._shown(record, live)
        if record.get("kind") == "dropped" and "teachers" in record:
            names = ", ".join(record["teachers"])
            text = f"{self.title}: teacher {names} is lost; the others go on without it from step {record['step']:,}"
            return [Remark("warn", text)] if live else []
        if record.get("kind") == "prepared":
            self.progress.prepare(record, live)
        if record.get("kind") != "step":
            return []
        self.progress.add(record, live)
        if live and record.get("damaged"):
            text = f"{self.title}: damaged files of the bank: {record['damaged']}; batches are made in their place"
            return [Remark("warn", text)]
        return self._norms(record["grad_norms"], self.progress.epoch) if live and record.get("grad_norms") else []

    def _evaluation(self, record: Record, live: bool) -> list[Remark]:
        if record["step"] <= self._evaluated:
            return []
        self._evaluated = int(record["step"])
        epoch = int(record.get("epoch", 0)) + 1
        if self._best is None or record["top1"] > self._best[0]:
            self._best = (float(record["top1"]), epoch)
        best = "" if self._best[1] == epoch else f"; best so far {words.percent(self._best[0])} (epoch {self._best[1]})"
        epochs = f"/{self.job.training.epochs}" if self.job.training.epochs else ""
        text = f"{self.title}: epoch {epoch}{epochs}, eval {words.sentence(record)}{best}{branches_text(record)}"
        return [Remark("eval", text)] if live else []

    def _shown(self, record: Record, live: bool) -> list[Remark]:
        shown = record.get("shown")
        if not shown or record["step"] <= self._looked:
            return []
        self._looked = int(record["step"])
        return [Remark("eval", f"{self.title}: images: {words.images(shown)} -> {shown['file']}")] if live else []

    def _norms(self, norms: Mapping[str, float], epoch: int) -> list[Remark]:
        remarks = []
        terms = [name for name in norms if name != "ce"]
        if terms and not self._shown_norms:
            remarks.append(Remark("note", f"{self.title}: gradient norms on the student: {norms_text(norms)}"))
            self._shown_norms = True
        for name in terms:
            if epoch < self._starts(name):
                continue
            seen = self._judged[name] = self._judged.get(name, 0) + 1
            if seen == self._judges_at(name) and not norms[name] > 0:
                speaker = "peers say" if self.job.peers else "teacher says"
                remarks.append(Remark("warn", _dead(self.title, name, norms[name], speaker)))
        return remarks

    def _judges_at(self, term: str) -> int:
        """Which of a term's norms is judged: the first, but the second where its schedule starts at weight 0."""
        return 2 if self._schedule(term).startswith("linear") else 1

    def _starts(self, term: str) -> float:
        """The epoch before which a term has weight 0."""
        found = re.fullmatch(r"start\((\d+\.?\d*)\)", self._schedule(term))
        return float(found[1]) if found else 0.0

    def _schedule(self, term: str) -> str:
        loss = self.job.losses.get(term.split(".")[0])
        return str(loss.options.get("schedule", "")) if loss is not None else ""

    def _advice(self) -> list[Remark]:
        share = self.progress.settled_wait_share
        if self._advised or share is None:
            return []
        self._advised = True
        text = advice(self.job, share)
        return [Remark("note", f"{self.title}: {text}")] if text else []


def advice(job: Job, share: float) -> str | None:
    """What to do about a student that waits for its teachers; None where it hardly waits or nothing can be added.

    A pool that is the bottleneck answers r requests at a time; without waiting the student would take (1 - share) of its step
    time, so r / (1 - share) replicas would keep up.
    """
    pooled = [name for name, teacher in job.teachers.items() if teacher.placement == "pool"]
    if share <= ADVICE_ABOVE or not pooled or job.launch.backend == "local":
        return None
    waiting = f"waiting {100 * share:.0f} % for teachers: "
    if len(pooled) > 1:
        return waiting + f"add replicas ({', '.join(f'teachers.{name}.replicas' for name in pooled)})"
    replicas = job.teachers[pooled[0]].replicas
    wanted = math.ceil(replicas / max(1.0 - share, 0.05))
    return waiting + f"add replicas (teachers.{pooled[0]}.replicas: {replicas} now, {wanted} would keep up if they fit)"


def norms_text(norms: Mapping[str, float]) -> str:
    """`ce 1.2, kd 0.6 (0.5 x ce)`."""
    ce = norms.get("ce")
    shown = []
    for name, value in norms.items():
        ratio = f" ({value / ce:.3g} x ce)" if ce and name != "ce" else ""
        shown.append(f"{name} {value:.4g}{ratio}")
    return ", ".join(shown)


def branches_text(record: Mapping[str, Any]) -> str:
    """`; ensemble of 3 branches 91.20 %`, where an evaluation is of several."""
    each = (record.get("branches") or [])[:-1]
    return f"; ensemble of {len(each)} branches {words.percent(record['branches'][-1]['top1'])}" if len(each) > 1 else ""


def _dead(title: str, term: str, norm: Any, speaker: str) -> str:
    return (
        f"{title}: the gradient of {term!r} on the student is {norm:g}: the term is dead. Look at "
        f"losses.{term.split('.')[0]}: its weight, its schedule, the layers it reads, and whether the {speaker} anything."
    )
