"""Sources that need no Ray: a teacher in the student's process, and the local backend's stand-in for a pool.

The seam between learner and knowledge is one call: `source.request(batch)` returns something whose `result()` is the signals of
that batch, of each teacher the source answers for. Requests are answered in order; several may be in flight.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from raykd.exchange.asking import KEYS, Asks
from raykd.exchange.codec import Reply
from raykd.signals import Signals

Fields = Mapping[str, Tensor]
Answers = Mapping[str, Signals]  # teacher, or key of an Aggregate -> its signals
Cotangents = Mapping[str, Mapping[str, np.ndarray]]  # teacher -> Signal.key -> a loss's gradient at that signal


class Pending(Protocol):
    """A request in flight."""

    def result(self) -> Answers:
        """Waits for the signals. Raises LostError when no replica is left, SourceError when none answers in time."""


class Source(Protocol):
    """Anything that answers "signals for this batch", for one teacher or several."""

    stats: Stats
    window: int  # requests worth having in flight
    drop: bool  # whether the training goes on without it when it is lost

    def request(self, fields: Fields) -> Pending:
        """Asks for the signals of one whole batch of a worker; never split, never merged."""

    def close(self) -> None:
        """Gives back what the source holds."""


@runtime_checkable
class Live(Protocol):
    """A source whose teachers answer for any image, and with gradients at these; see through.py."""

    asks: Asks
    stats: Stats
    backward: Stats

    def ask(self, images: np.ndarray, asks: Asks, cotangents: Cotangents | None = None) -> Pending:
        """Asks, of float images `[b c h w]`, for signals; with cotangents for `{SUM: {GRAD: dL/dimages}}` instead."""


class Committee(Protocol):
    """The teachers of one actor (roles.Committee is one)."""

    def answer(self, fields: Mapping[str, Any], asks: Asks) -> Reply:
        """Encoded signals of one batch."""

    def live(self, images: Tensor, asks: Asks) -> Answers:
        """Signals of float images, with a graph that leads back to these."""

    def input_grad(self, images: np.ndarray, asks: Asks, cotangents: Cotangents) -> Reply:
        """The gradient at float images of a loss on the signals asked for."""


@dataclass
class Stats:
    """What a source has done so far."""

    requests: int = 0
    retries: int = 0
    filled: int = 0  # requests for which a store had not every row, so that the live teacher answered
    bytes_in: int = 0  # signals received
    bytes_out: int = 0  # fields sent
    teacher_s: float = 0.0  # working time of the teachers
    client_s: float = 0.0  # CPU time of this side: sending, receiving, decoding
    errors: dict[str, float] = field(default_factory=dict)  # largest measured codec errors

    def count(self, reply: Reply) -> None:
        """Adds one reply."""
        self.bytes_in += reply.num_bytes
        self.teacher_s += reply.seconds
        for encoded in reply.teachers.values():
            for name, value in encoded.errors.items():
                self.errors[name] = max(self.errors.get(name, 0.0), value)


def to_send(fields: Fields, inputs: str, beside: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """What travels to a teacher: images (uint8) and fields `beside` them, or only what re-creates all (12 bytes a sample)."""
    return {name: fields[name].numpy() for name in (KEYS if inputs == "recipe" else ("images", *beside))}


def num_bytes(cotangents: Cotangents | None) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for own in (cotangents or {}).values() for array in own.values())


@dataclass(frozen=True)
class Done:
    """A request that is already answered."""

    answers: Answers

    def result(self) -> Answers:
        """The signals."""
        return self.answers


class InlineSource:
    """Teachers in this process; signals pass through their codec here as everywhere."""

    window = 1
    drop = False

    def __init__(self, committee: Committee, asks: Asks) -> None:
        self.committee, self.asks = committee, asks
        self.stats, self.backward = Stats(), Stats()

    def request(self, fields: Fields) -> Pending:
        """Computes the signals now."""
        return self._done(self.committee.answer(fields, self.asks), self.stats)

    def ask(self, images: np.ndarray, asks: Asks, cotangents: Cotangents | None = None) -> Pending:
        """Computes signals of float images, or their gradient, now; see Live."""
        if cotangents is None:
            return self._done(self.committee.answer({"images": images}, asks), self.stats)
        return self._done(self.committee.input_grad(images, asks, cotangents), self.backward)

    def live(self, images: Tensor, asks: Asks) -> Answers:
        """Signals of float images, with a graph that leads back to these."""
        started = time.perf_counter()
        found = self.committee.live(images, asks)
        self.stats.requests += 1
        self.stats.teacher_s += time.perf_counter() - started
        return found

    def _done(self, reply: Reply, stats: Stats) -> Done:
        stats.requests += 1
        stats.count(reply)
        return Done(reply.decoded())

    def close(self) -> None:
        """Nothing to give back."""


class LocalSource(InlineSource):
    """A pool without Ray: request and reply are pickled as they would be on their way between processes."""

    def __init__(self, committee: Committee, asks: Asks, inputs: str = "pixels") -> None:
        super().__init__(committee, asks)
        self.inputs = inputs

    def request(self, fields: Fields) -> Pending:
        """Computes the signals now, out of a pickled copy of the request."""
        message = pickle.dumps(to_send(fields, self.inputs, self.asks.fields))
        self.stats.bytes_out += len(message)
        return self._done(_copied(self.committee.answer(pickle.loads(message), self.asks)), self.stats)

    def ask(self, images: np.ndarray, asks: Asks, cotangents: Cotangents | None = None) -> Pending:
        """Computes signals of float images, or their gradient, now, out of a pickled copy of the request; see Live."""
        message = pickle.dumps((images, cotangents))
        stats = self.stats if cotangents is None else self.backward
        stats.bytes_out += len(message)
        images, cotangents = pickle.loads(message)
        if cotangents is None:
            return self._done(_copied(self.committee.answer({"images": images}, asks)), stats)
        return self._done(_copied(self.committee.input_grad(images, asks, cotangents)), stats)


def _copied(reply: Reply) -> Reply:
    found: Reply = pickle.loads(pickle.dumps(reply))
    return found
