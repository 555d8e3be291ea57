"""metrics.jsonl read as it grows, and what its newest records say: speed, loss, waiting share, time left."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
WINDOW = 50
WARM_UP = 10
SHORTEST_S = 0.1
PEERS_WAIT = "peers_wait_s"


class Follower:
    """Reads the lines a growing file gained since the last call.

    A line without its end is left for the next call. A file that was replaced or cut back (a resumed run does that) is read
    from its start again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._inode = 0

    def read(self) -> tuple[list[Record], bool]:
        """New records, and whether the file was started over (then the records are all of it)."""
        try:
            file = self.path.open("rb")
        except OSError:
            return [], False
        with file:
            status = os.fstat(file.fileno())
            over = self._position > 0 and (status.st_ino != self._inode or status.st_size < self._position)
            self._inode = status.st_ino
            self._position = 0 if over else self._position
            file.seek(self._position)
            text = file.read()
        end = text.rfind(b"\n") + 1
        self._position += end
        return list(parse(text[:end].splitlines())), over


def parse(lines: Iterable[bytes | str]) -> Iterable[Record]:
    """Records of the lines that hold one."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


class Progress:
    """Where a training is, from its newest step records.

    Args:
        total_steps: of the whole training.
        clock: seconds that pass; time left is extrapolated from it, so that evaluations count.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps = total_steps
        self.step = 0
        self.epoch = 0
        self.live_steps = 0
        self.prepared: tuple[int, int] | None = None  # before the first step, while there is none: done, of how many `parts`
        self.parts = ""
        self._clock = clock
        self._recent: deque[Record] = deque(maxlen=WINDOW)
        self._from: tuple[float, int] | None = None
        self._began: tuple[float, int] | None = None
        self._prepared_at = 0.0

    def restart(self) -> None:
        """Forgets what was seen: the records follow once more."""
        self.step = self.epoch = self.live_steps = 0
        self._recent.clear()
        self._from = self._began = None

    def prepare(self, record: Record, live: bool = True) -> None:
        """Takes one record of what comes before the first step."""
        self.prepared, self.parts = (int(record["done"]), int(record["total"])), str(record["parts"])
        if not live:
            return
        if self._began is None:
            self._began = (self._clock(), self.prepared[0])
        self._prepared_at = self._clock()

    @property
    def prepared_left(self) -> float | None:
        """Seconds until the first step, extrapolated; None while that is not known."""
        if self.prepared is None or self._began is None or self.prepared[0] <= self._began[1]:
            return None
        done, total = self.prepared
        return (self._prepared_at - self._began[0]) / (done - self._began[1]) * (total - done)

    def add(self, record: Record, live: bool = True) -> None:
        """Takes one step record; `live` is False for what an earlier run wrote, which says nothing about speed now."""
        self.step, self.epoch = int(record["step"]), int(record.get("epoch", 0))
        self.prepared = None
        if not live:
            return
        if self._from is None:
            self._from = (self._clock(), self.step)
        self.live_steps += 1
        self._recent.append(record)

    @property
    def images_per_s(self) -> float | None:
        """Images a second over the newest steps."""
        seconds = self._sum("step_s")
        return self._sum("images") / seconds if seconds > 0 else None

    @property
    def wait_share(self) -> float | None:
        """Share of the step time spent waiting for teachers, over the newest steps."""
        return wait_share(self._recent)

    @property
    def settled_wait_share(self) -> float | None:
        """The same once, over a full window without the first steps; None before."""
        return wait_share(list(self._recent)[WARM_UP:]) if self.live_steps >= WINDOW else None

    @property
    def peer_wait_share(self) -> float | None:
        """Share of the step time spent waiting for peers, over the newest steps."""
        return wait_share(self._recent, PEERS_WAIT)

    @property
    def settled_peer_wait_share(self) -> float | None:
        """The same once, over a full window without the first steps; None before."""
        return wait_share(list(self._recent)[WARM_UP:], PEERS_WAIT) if self.live_steps >= WINDOW else None

    @property
    def loss(self) -> float | None:
        """Mean loss of the newest steps."""
        return self._mean([r.get("loss") for r in self._newest()])

    @property
    def terms(self) -> dict[str, float]:
        """Mean of each term, newest steps."""
        newest = self._newest()
        names = list(dict.fromkeys(name for r in newest for name in r.get("terms", {})))
        means = {name: self._mean([r.get("terms", {}).get(name) for r in newest]) for name in names}
        return {name: value for name, value in means.items() if value is not None}

    @property
    def seconds_left(self) -> float | None:
        """Extrapolated from the time since the first live step, evaluations included."""
        if self._from is None or self.step <= self._from[1] or self.total_steps < self.step:
            return None
        started, first = self._from
        elapsed = self._clock() - started
        if elapsed < SHORTEST_S:
            return None  # all that is known was read at once
        return elapsed / (self.step - first) * (self.total_steps - self.step)

    def _newest(self) -> list[Record]:
        return list(self._recent)[-20:]

    def _sum(self, name: str) -> float:
        return float(sum(r.get(name) or 0.0 for r in self._recent))

    @staticmethod
    def _mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None


def wait_share(records: Iterable[Record], name: str = "wait_s") -> float | None:
    """Share of the step time spent waiting: for teachers, or for peers (PEERS_WAIT); None where no time was recorded."""
    records = list(records)
    seconds = sum(r.get("step_s") or 0.0 for r in records)
    return sum(r.get(name) or 0.0 for r in records) / seconds if seconds > 0 else None
