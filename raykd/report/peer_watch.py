"""The peers of one run followed together: one line for all, and what is worth saying of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raykd.config import Job
from raykd.report import words
from raykd.report.follow import Progress, Record
from raykd.report.peer_tables import event_text, events, noted
from raykd.report.watch import ADVICE_ABOVE, Remark, Watch

ROOM = "peers"  # of a run folder
NAMED = 4  # peers whose notes are all printed; of more, the first one's


class PeerWatch(Watch):
    """One peer followed; its evaluations and losses are kept, for all peers to be told at once."""

    def __init__(
        self, path: str, job: Job, folder: Path, total_steps: int, clock: Callable[[], float] = time.monotonic, title: str = ""
    ) -> None:
        self.evals: dict[int, Record] = {}
        self.events: list[Record] = []
        self.folder, self.noted = folder, noted(folder)
        super().__init__(path, job, folder, total_steps, clock, title)

    def poll(self) -> list[Remark]:
        """As of a Watch; looks whether the driver has dropped the peer."""
        self.noted = self.noted or noted(self.folder)
        return super().poll()

    def _take(self, record: Record, live: bool) -> list[Remark]:
        if record.get("kind") == "rejoined" or (record.get("kind") == "dropped" and "peers" in record):
            self.events.append(record)
            return []
        return super()._take(record, live)

    def _evaluation(self, record: Record, live: bool) -> list[Remark]:  # noqa: ARG002
        self.evals[int(record.get("epoch", 0))] = record
        return []


class PeersWatch:
    """Follows the metrics of all peers of a run, `peers/<name>/metrics.jsonl`; used like a Watch.

    Args:
        path: of the training, as of a Watch.
        job: resolved.
        folder: of the run.
        total_steps: of each peer's training.
        clock: seconds that pass.
    """

    def __init__(
        self, path: str, job: Job, folder: Path, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.job = path, job
        self.title = words.title(path, job.name, peers=True)
        self.peers = {
            name: PeerWatch(path, job, folder / ROOM / name, total_steps, clock, f"{self.title}, peer {name}")
            for name in job.peers
        }
        self._told = self._evaluated()
        self._advised = False
        self._known = {_key(event) for event in self._events()}

    @property
    def progress(self) -> Progress:
        """Of the slowest peer."""
        return min((watch.progress for watch in self._there().values()), key=lambda p: p.step)

    def poll(self) -> list[Remark]:
        """Reads what is new and says what is worth reading."""
        remarks: list[Remark] = []
        named = NAMED if len(self.peers) <= NAMED else 1
        for place, watch in enumerate(self.peers.values()):
            remarks += [r for r in watch.poll() if r.kind == "warn" or place < named]
        remarks += self._lost_and_back()
        remarks += [self._evaluation(epoch) for epoch in range(self._told + 1, self._evaluated() + 1)]
        self._told = max(self._told, self._evaluated())
        return [r for r in remarks if r.text] + self._advice()

    def finish(self) -> list[Remark]:
        """As `poll`, with the evaluations that not all peers have."""
        remarks = self.poll()
        last = max((epoch for watch in self.peers.values() for epoch in watch.evals), default=-1)
        remarks += [r for epoch in range(self._told + 1, last + 1) if (r := self._evaluation(epoch)).text]
        self._told = max(self._told, last)
        return remarks

    def line(self) -> str:
        """The state of all in one line; steps are the slowest peer's. What a narrow terminal cuts off stands last."""
        there, epochs = self._there(), self.job.training.epochs
        slowest = min(there, key=lambda name: there[name].progress.step)
        progress, most = there[slowest].progress, max(watch.progress.step for watch in there.values())
        behind = f" ({slowest}; the first at {most:,})" if most > progress.step + 1 else ""
        parts = [
            self.title,
            f"{len(there)} peers",
            f"epoch {progress.epoch + 1}" + (f"/{epochs}" if epochs else ""),
            f"step {progress.step:,}/{progress.total_steps:,}{behind}",
        ]
        left = [p.seconds_left for p in self._progress().values() if p.seconds_left is not None]
        if left:
            parts.append(f"ETA {words.duration(max(left))}")
        speeds = [p.images_per_s for p in self._progress().values() if p.images_per_s is not None]
        if speeds:
            parts.append(f"{sum(speeds) / len(speeds):,.0f} img/s each")
        losses = {name: p.loss for name, p in self._progress().items() if p.loss is not None}
        if losses:
            parts.append("loss " + words.several({name: f"{loss:.3g}" for name, loss in losses.items()}, losses))
        waits = {name: p.peer_wait_share for name, p in self._progress().items() if p.peer_wait_share is not None}
        if waits and self._exchanges():
            parts.append("peer wait " + words.several({n: _short(share) for n, share in waits.items()}, waits))
        taught = [p.wait_share for p in self._progress().values() if p.wait_share is not None]
        if taught and self.job.teachers:
            parts.append(f"teacher wait {_short(sum(taught) / len(taught))}")
        return " · ".join(parts)

    def _there(self) -> Mapping[str, PeerWatch]:
        """The peers that are not lost."""
        lost = {event["peer"] for event in self._events() if event["kind"] == "dropped"}
        return {name: watch for name, watch in self.peers.items() if name not in lost} or self.peers

    def _progress(self) -> dict[str, Progress]:
        return {name: watch.progress for name, watch in self._there().items()}

    def _exchanges(self) -> bool:
        return bool(self.job.losses)

    def _events(self) -> list[dict[str, Any]]:
        return events({name: [*watch.events, *watch.noted] for name, watch in self.peers.items()})

    def _lost_and_back(self) -> list[Remark]:
        new = [event for event in self._events() if _key(event) not in self._known]
        self._known |= {_key(event) for event in new}
        return [Remark("warn", f"{self.title}: {event_text(event)}") for event in new]

    def _evaluated(self) -> int:
        """The last epoch that all peers have evaluated, or have come past."""
        return min(max(watch.evals, default=-1) for watch in self._there().values())

    def _evaluation(self, epoch: int) -> Remark:
        found = {name: watch.evals[epoch] for name, watch in self.peers.items() if epoch in watch.evals}
        if not found:
            return Remark("eval", "")
        top1 = {name: float(record["top1"]) for name, record in found.items()}
        shown = words.several({name: words.percent(value) for name, value in top1.items()}, top1)
        mean = f"; mean {words.percent(sum(top1.values()) / len(top1))}" if len(top1) > 1 else ""
        epochs = f"/{self.job.training.epochs}" if self.job.training.epochs else ""
        return Remark("eval", f"{self.title}: epoch {epoch + 1}{epochs}, eval top-1 {shown}{mean}")

    def _advice(self) -> list[Remark]:
        """Once: who sets the pace, where the others wait for it."""
        shares = {name: p.settled_peer_wait_share for name, p in self._progress().items()}
        known = {name: share for name, share in shares.items() if share is not None}
        if self._advised or len(known) < max(len(shares), 2):
            return []
        self._advised = True
        text = advice(self.job, known)
        return [Remark("note", f"{self.title}: {text}")] if text else []


def advice(job: Job, shares: Mapping[str, float]) -> str | None:
    """What to do about peers that wait for one of them; None where they hardly wait, or all of them do."""
    most, least = max(shares, key=lambda n: shares[n]), min(shares, key=lambda n: shares[n])
    if shares[most] <= ADVICE_ABOVE or shares[least] > shares[most] / 2 or job.launch.backend == "local":
        return None
    remedy = f"Give it more (peers.{least}.cpus, .gpus)"
    if job.exchange.what == "signals":
        remedy += ", or let the others go on with older copies of it (exchange.what='weights', exchange.staleness)"
    return (
        f"{most} waits {_short(shares[most])} of its time for peers; {least} waits least ({_short(shares[least])}) "
        f"and sets the pace. {remedy}."
    )


def _key(event: Mapping[str, Any]) -> tuple[Any, ...]:
    return (event["kind"], event["peer"]) if event["kind"] == "dropped" else (event["kind"], event["peer"], event["step"])


def _short(share: float) -> str:
    return f"{100 * share:.0f} %"
