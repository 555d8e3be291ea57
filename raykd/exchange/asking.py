"""What a student asks of the teachers of one actor: which signals of each, how they are written, what is combined there."""

from __future__ import annotations

from dataclasses import dataclass

from raykd.exchange.codec import Codec
from raykd.parts.aggregators import needs
from raykd.signals import Aggregate, Signal

SUM = "sum"  # who answers with the gradient at the images: the teachers of an actor together
GRAD = "input_grad"
KEYS = ("sample_index", "augmentation_seed")  # of a batch: what re-creates it, and what keys randomness


@dataclass(frozen=True)
class Ask:
    """Of one teacher: signals, and their codec."""

    teacher: str
    signals: tuple[Signal, ...]
    codec: Codec


@dataclass(frozen=True)
class Asks:
    """Of the teachers of one actor."""

    of: tuple[Ask, ...]
    aggregates: tuple[Aggregate, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the batch that must travel beside the images."""
        wanted = {name for aggregate in self.aggregates for name in needs(aggregate.how)}
        views = any(signal.view is not None for ask in self.of for signal in ask.signals)
        return (KEYS if views or "generator" in wanted else ()) + (("labels",) if "labels" in wanted else ())
