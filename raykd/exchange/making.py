"""Synthesizers on Ray: who makes batches for a student's bank, wherever they live.

A batch is asked for by its number and is a function of it, of the teachers and of a student as it was: when a synthesizer dies,
what it had under way is asked of another one. Snapshots of the student are put into the object store once, by the student.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from raykd.errors import LostError, SourceError
from raykd.exchange.bank import MadeBatch
from raykd.exchange.pool import PATIENCE_S, original

SLICE_S = 5.0  # of a wait


@dataclass(frozen=True)
class Kept:
    """A student as it was after `version` steps; `weights` refers to them in the object store."""

    version: int
    weights: Any


@dataclass
class Far:
    """The synthesizers of one worker.

    Attributes:
        handles: of their actors.
        ahead: batches asked of each before the first has come.
        timeout_s: longest wait for a batch.
        restart_s: how long they are waited for when none is there.
    """

    handles: list[Any]
    ahead: int
    timeout_s: float
    restart_s: float
    retries: int = 0
    _under_way: dict[Any, tuple[int, Any, int]] = field(default_factory=dict)  # reference -> number, student, handle
    _later: list[tuple[float, int, Any]] = field(default_factory=list)  # when to ask again, number, student

    @property
    def room(self) -> int:
        """Batches worth having under way."""
        return self.ahead * len(self.handles)

    @property
    def asked(self) -> list[int]:
        """Numbers of the batches under way."""
        return [number for number, _, _ in self._under_way.values()] + [number for _, number, _ in self._later]

    def snapshot(self, version: int, weights: Mapping[str, torch.Tensor]) -> Kept:
        """Puts a student's weights where synthesizers find them."""
        return Kept(version, ray.put({name: value.detach().cpu().numpy() for name, value in weights.items()}))

    def ask(self, number: int, student: Kept | None) -> None:
        """Asks the synthesizer with the least to do."""
        load = [0] * len(self.handles)
        for _, _, place in self._under_way.values():
            load[place] += 1
        place = load.index(min(load))
        version, weights = (student.version, student.weights) if student is not None else (-1, None)
        self._under_way[self.handles[place].make.remote(number, version, weights)] = (number, student, place)

    def take(self, wait: bool) -> list[MadeBatch]:
        """The batches that have come; with `wait`, at least one.

        Raises:
            LostError: no synthesizer is left. SourceError: none has answered in time. Others: as they raised them.
        """
        started = time.monotonic()
        while True:
            self._again()
            refs = list(self._under_way)
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0) if refs else ([], [])
            found = [batch for ref in done if ref in self._under_way and (batch := self._come(ref)) is not None]
            if found or not wait or not self.asked:
                return found
            if time.monotonic() - started > self.timeout_s + self.restart_s:
                raise SourceError(
                    f"Synthesizers: expected a batch within {self.timeout_s + self.restart_s:g} s, got none. The last "
                    "checkpoint is intact; look at their logs, raise launch.request_timeout_s, resume."
                )
            pause = min([SLICE_S, *(max(due - time.monotonic(), 0.0) for due, _, _ in self._later)])
            if self._under_way:
                ray.wait(list(self._under_way), num_returns=1, timeout=pause)
            else:
                time.sleep(pause)

    def _again(self) -> None:
        """Asks once more for what is due."""
        now = time.monotonic()
        due, self._later = [e for e in self._later if e[0] <= now], [e for e in self._later if e[0] > now]
        for _, number, student in due:
            self.ask(number, student)

    def _come(self, ref: Any) -> MadeBatch | None:
        number, student, place = self._under_way.pop(ref)
        try:
            batch: MadeBatch = ray.get(ref)
            return batch
        except RayTaskError as error:
            raise original(error, "A synthesizer") from None
        except RayError as error:
            self.retries += 1
            why = type(error).__name__
            warnings.warn(f"A synthesizer is lost ({why}); batch {number} is made by another.", stacklevel=2)
            if isinstance(error, ActorDiedError):
                self._gone(place, why)
                self.ask(number, student)
            else:  # Ray is starting it again
                self._later.append((time.monotonic() + PATIENCE_S, number, student))
            return None

    def _gone(self, place: int, why: str) -> None:
        """A synthesizer that Ray does not start again; what others have under way keeps its place."""
        del self.handles[place]
        if not self.handles:
            raise LostError(f"All synthesizers are gone ({why}). The last checkpoint is intact: resume the run.")
        lost = [ref for ref, (_, _, p) in self._under_way.items() if p == place]
        moved = {ref: (n, s, p - (p > place)) for ref, (n, s, p) in self._under_way.items() if p != place}
        again = [self._under_way[ref][:2] for ref in lost]
        self._under_way = moved
        for number, student in again:
            self.ask(number, student)

    def state(self) -> list[dict[str, Any]]:
        """What each has learnt and remembers, where it lives and is not busy; one that Ray is starting again is waited for.

        Raises:
            LostError: none is left, or one did not come back in time. Others: as they raised them.
        """
        found: list[dict[str, Any]] = []
        deadline = time.monotonic() + self.timeout_s + self.restart_s
        while len(found) < len(self.handles):
            try:
                ref = self.handles[len(found)].state.remote()
                found.append(ray.get(ref, timeout=max(deadline - time.monotonic(), PATIENCE_S)))
            except RayTaskError as error:
                raise original(error, "A synthesizer") from None
            except ActorDiedError as error:
                why = type(error).__name__
                warnings.warn(f"A synthesizer is lost ({why}); what it remembered is not in the checkpoint.", stacklevel=2)
                self._gone(len(found), why)
            except RayError as error:
                if time.monotonic() >= deadline:
                    raise _lost(error) from None
                time.sleep(PATIENCE_S)
        return found

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Has each continue from what it knew, before anything is asked of it.

        Raises:
            LostError: one is gone. Others: as they raised them.
        """
        refs = [handle.load_state.remote(state) for handle, state in zip(self.handles, states)]
        try:
            ray.get(refs, timeout=self.timeout_s + self.restart_s)
        except RayTaskError as error:
            raise original(error, "A synthesizer") from None
        except RayError as error:
            raise _lost(error) from None

    def close(self) -> None:
        """Forgets what is under way; the actors belong to the run's driver."""
        self._under_way.clear()
        self._later.clear()


def _lost(error: RayError) -> LostError:
    return LostError(f"A synthesizer is lost ({type(error).__name__}). The last checkpoint is intact: resume the run.")
