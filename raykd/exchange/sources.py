"""Sources that need no Ray: a teacher in the student's process, and the local backend's stand-in for a pool.

The seam between learner and knowledge is one call: `source.request(batch)` returns something whose `result()` is the signals of
that batch. Requests are answered in order; several may be in flight.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from raykd.exchange import codec as codecs
from raykd.signals import Signals

Fields = Mapping[str, Tensor]


class Pending(Protocol):
    """A request in flight."""

    def result(self) -> Signals:
        """Waits for the signals. Raises SourceError when no replica answers in time."""


class Source(Protocol):
    """Anything that answers "signals for this batch"."""

    stats: Stats
    window: int  # requests worth having in flight

    def request(self, fields: Fields) -> Pending:
        """Asks for the signals of one whole batch of a worker; never split, never merged."""

    def close(self) -> None:
        """Gives back what the source holds."""


class Answers(Protocol):
    """What a source needs of a teacher (roles.Teacher is one)."""

    def answer(self, fields: Mapping[str, Any]) -> codecs.Reply:
        """Encoded signals of one batch."""


@dataclass
class Stats:
    """What a source has done so far."""

    requests: int = 0
    retries: int = 0
    bytes_in: int = 0  # signals received
    bytes_out: int = 0  # fields sent
    teacher_s: float = 0.0  # working time of the teachers
    client_s: float = 0.0  # CPU time of this side: sending, receiving, decoding
    errors: dict[str, float] = field(default_factory=dict)  # largest measured codec errors

    def count(self, reply: codecs.Reply) -> None:
        """Adds one reply."""
        self.bytes_in += reply.num_bytes
        self.teacher_s += reply.seconds
        for name, value in reply.errors.items():
            self.errors[name] = max(self.errors.get(name, 0.0), value)


def to_send(fields: Fields, inputs: str) -> dict[str, np.ndarray]:
    """What travels to a teacher: the images (uint8), or only what re-creates them (12 bytes a sample)."""
    if inputs == "recipe":
        return {name: fields[name].numpy() for name in ("sample_index", "augmentation_seed")}
    return {"images": fields["images"].numpy()}


@dataclass(frozen=True)
class Done:
    """A request that is already answered."""

    signals: Signals

    def result(self) -> Signals:
        """The signals."""
        return self.signals


class InlineSource:
    """A teacher in this process; signals pass through their codec here as everywhere."""

    window = 1

    def __init__(self, teacher: Answers) -> None:
        self.teacher = teacher
        self.stats = Stats()

    def request(self, fields: Fields) -> Pending:
        """Computes the signals now."""
        reply = self.teacher.answer(fields)
        self.stats.requests += 1
        self.stats.count(reply)
        return Done(codecs.decode(reply.signals))

    def close(self) -> None:
        """Nothing to give back."""


class LocalSource(InlineSource):
    """A pool without Ray: request and reply are pickled as they would be on their way between processes."""

    def __init__(self, teacher: Answers, inputs: str = "pixels") -> None:
        super().__init__(teacher)
        self.inputs = inputs

    def request(self, fields: Fields) -> Pending:
        """Computes the signals now, out of a pickled copy of the request."""
        message = pickle.dumps(to_send(fields, self.inputs))
        reply = pickle.loads(pickle.dumps(self.teacher.answer(pickle.loads(message))))
        self.stats.requests += 1
        self.stats.bytes_out += len(message)
        self.stats.count(reply)
        return Done(codecs.decode(reply.signals))
