"""Teachers: frozen models that derive and encode what a job's losses ask for, one or several in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raykd.config import Teacher as TeacherSpec
from raykd.data.keys import batch_key
from raykd.errors import SourceError
from raykd.exchange import codec as codecs
from raykd.exchange.asking import Asks
from raykd.roles.hearing import combine
from raykd.roles.network import Facts, Tapped, build
from raykd.signals import Signal, Signals

Restore = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]


class Teacher:
    """One frozen model: evaluation mode, no gradient, no state that a request could change.

    Args:
        spec: the job's teacher.
        facts: of the training data.
        device: where the model lives.
        name: in the job, for messages.
    """

    def __init__(self, spec: TeacherSpec, facts: Facts, device: torch.device, name: str = "teacher") -> None:
        self.spec, self.facts, self.device, self.name = spec, own_facts(spec, facts), device, name
        self.model = build(spec, self.facts, device).eval().requires_grad_(False)
        self.tapped = Tapped(spec, self.model, (), self.facts, device)

    @torch.no_grad()
    def signals(self, images: Tensor, wanted: tuple[Signal, ...], key: int | None = None) -> Signals:
        """The wanted signals of uint8 images `[b c h w]`; batch axis first, contiguous.

        Args:
            images: on any device.
            wanted: which; what was never asked for before is tapped from now on.
            key: of the batch, for views that draw.
        """
        if not set(wanted) <= set(self.tapped.signals):
            before, every = self.tapped, (*self.tapped.signals, *wanted)
            self.tapped = Tapped(self.spec, self.model, every, self.facts, self.device)
            before.close()
        found = self.tapped(images, key, wanted)
        return {signal.key: found[signal.key].contiguous() for signal in wanted}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits `[b c]` of uint8 images `[b c h w]`."""
        return self.tapped.logits(images)


class Committee:
    """The teachers of one process; any replica answers any request, as often as asked.

    Args:
        teachers: by name.
        seed: of the run; with a batch's keys it keys what is drawn.
        restore: re-creates a batch's fields from a recipe (`inputs="recipe"`).
    """

    def __init__(self, teachers: Mapping[str, Teacher], seed: int, restore: Restore | None = None) -> None:
        self.teachers = dict(teachers)
        self._seed, self._restore = seed, restore

    def answer(self, fields: Mapping[str, Any], asks: Asks) -> codecs.Reply:
        """Encoded signals of one batch, given as pixels (`images`) or as a recipe (`sample_index`, `augmentation_seed`).

        Raises:
            SourceError: a signal does not fit the codec; names teacher and signal.
        """
        started = time.perf_counter()
        batch = self._batch(fields)
        reply = codecs.Reply({})
        logits: dict[str, Tensor] = {}
        for ask in asks.of:
            teacher = self.teachers[ask.teacher]
            wanted = ask.signals
            combined = any(ask.teacher in a.teachers for a in asks.aggregates)
            needed = dict.fromkeys((*wanted, Signal("logits")) if combined else wanted)
            views = any(signal.view is not None for signal in wanted)
            found = teacher.signals(batch["images"], tuple(needed), self._key(ask.teacher, batch) if views else None)
            if combined:
                logits[ask.teacher] = found["logits"].cpu()
            if wanted:
                kept = {signal.key: found[signal.key] for signal in wanted}
                reply.teachers[ask.teacher] = _encoded(ask.teacher, kept, ask.codec)
        codec = {ask.teacher: ask.codec for ask in asks.of}
        for aggregate in asks.aggregates:
            mixed = combine(aggregate, [logits[name] for name in aggregate.teachers], batch, self._seed)
            reply.teachers[aggregate.key] = _encoded(aggregate.key, {"logits": mixed}, codec[aggregate.teachers[0]])
        reply.seconds = time.perf_counter() - started
        return reply

    def _key(self, teacher: str, batch: Mapping[str, Tensor]) -> int:
        return batch_key(self._seed, teacher, batch["sample_index"].numpy(), batch["augmentation_seed"].numpy())

    def _batch(self, fields: Mapping[str, Any]) -> Mapping[str, Tensor]:
        batch = {n: v if isinstance(v, Tensor) else torch.from_numpy(v.copy()) for n, v in fields.items()}
        if "images" in batch:
            return batch
        if self._restore is None:
            raise SourceError("A recipe was sent to a teacher that has no data set. Set inputs='pixels'.")
        return {**batch, **self._restore(batch)}


def own_facts(spec: TeacherSpec, facts: Facts) -> Facts:
    """Facts as this teacher sees them: with a label map it knows as many classes as the map has entries."""
    if spec.label_map is None:
        return facts
    return Facts(facts.num_samples, len(spec.label_map), facts.shape, facts.normalise)


def _encoded(name: str, signals: Signals, codec: codecs.Codec) -> codecs.Encoded:
    try:
        return codecs.encode(signals, codec)
    except SourceError as error:
        raise SourceError(f"Teacher {name!r}: {error}") from None


def check_finite(name: str, signals: Signals) -> None:
    """Raises SourceError naming the teacher and the signal that is not finite."""
    for key, tensor in signals.items():
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise SourceError(
                f"Teacher {name!r}, signal {key}: expected finite values, got {bad} of {tensor.numel()} NaN or infinite. "
                "Check its weights, its normalisation and its dtype."
            )
