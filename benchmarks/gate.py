"""Segments: rows live in processes of their own and run a few steps at a time, in turn, so that all see the same machine.

    driver                       worker process of a row
    start                        set up, then the row's loop; its first `gate()` says "ready" and waits
    segment(n)  ---- n ---->     n steps; the next `gate()` sends their times and waits again
    stop        ---- None -->    `gate()` is True: the loop ends, the row's findings are sent

A row calls `gate()` once a step, before the step. Nothing of a row that waits takes CPU time but Ray's idle processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True)
class Segment:
    """Steps `first`, `first + 1`, ... of a row: seconds of each, and what its counters (CPU seconds, bytes) did meanwhile."""

    first: int
    seconds: list[float]
    counters: dict[str, float]


class Gate:
    """The worker's side. `probe` gives a row's own counters; it is called outside of timed steps."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.probe: Callable[[], Mapping[str, float]] = dict
        self._wanted, self._first, self._count = 0, 0, 0
        self._marks: list[float] = []
        self._before: dict[str, float] = {}

    def __call__(self) -> bool:
        """Marks the begin of a step, or waits for the next segment. True: end the loop."""
        self._marks.append(time.perf_counter())
        if len(self._marks) > self._wanted and self._pause():
            return True
        self._count += 1
        return False

    def _pause(self) -> bool:
        after = self._counters()
        spent = {name: after[name] - self._before.get(name, 0.0) for name in after}
        seconds = [b - a for a, b in zip(self._marks, self._marks[1:])]
        self._pipe.send(Segment(self._first, seconds, spent))
        try:
            wanted = self._pipe.recv()
        except EOFError:
            wanted = None
        if wanted is None:
            return True
        self._wanted, self._first = wanted, self._count
        self._before = self._counters()
        self._marks = [time.perf_counter()]
        return False

    def _counters(self) -> dict[str, float]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return {"cpu_s": time.process_time(), "faults": float(faults), **self.probe()}


Row = Callable[[Any, Gate], Mapping[str, Any]]


def _work(row: Row, scene: Any, pipe: Connection) -> None:
    """A worker process: one row from its start to its end."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    try:
        found = dict(row(scene, Gate(pipe)))
        pipe.send(("found", found))
    except BaseException:
        with contextlib.suppress(OSError):  # the driver may be gone
            pipe.send(("error", traceback.format_exc()))


class RowFailed(RuntimeError):
    """A row's process reported an error, or died."""


@dataclass
class Worker:
    """The driver's side of one row."""

    name: str
    row: Row
    scene: Any
    segments: list[Segment] = field(default_factory=list)
    _process: Any = None

    def start(self) -> None:
        """Starts the process; `wait` tells when it is ready."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(self.row, self.scene, theirs), name=self.name)
        self._process.start()
        theirs.close()

    def wait(self, timeout_s: float = 300.0) -> Any:
        """The next message.

        Raises:
            RowFailed: an error, or silence.
        """
        if not self._pipe.poll(timeout_s):
            raise RowFailed(f"{self.name}: no sign of life for {timeout_s:g} s.")
        try:
            message = self._pipe.recv()
        except EOFError:
            raise RowFailed(f"{self.name}: the process died.") from None
        if isinstance(message, tuple) and message[0] == "error":
            raise RowFailed(f"{self.name}:\n{message[1]}")
        return message

    def run(self, steps: int) -> None:
        """One segment."""
        self._pipe.send(steps)
        self.segments.append(self.wait())

    def stop(self) -> Mapping[str, Any]:
        """Ends the row and returns what it found."""
        self._pipe.send(None)
        found = self.wait()[1]
        self._process.join(30)
        return found

    def kill(self) -> None:
        """Ends the process whatever it does."""
        if self._process is None:
            return
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
