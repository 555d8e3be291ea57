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
from raykd.exchange.asking import GRAD, SUM, Asks
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
        """The wanted signals of images `[b c h w]`; batch axis first, contiguous.

        Args:
            images: uint8, or floats in 0..1; on any device.
            wanted: which; what was never asked for before is tapped from now on.
            key: of the batch, for views that draw.
        """
        return self._found(images, wanted, key)

    @torch.enable_grad()
    def live(self, images: Tensor, wanted: tuple[Signal, ...]) -> Signals:
        """The wanted signals of float images, with a graph that leads back to these; the model stays as it is."""
        return self._found(images, wanted)

    def input_grad(self, images: Tensor, cotangents: Mapping[str, Tensor], wanted: tuple[Signal, ...]) -> Tensor:
        """dL/dimages: what a loss L on this teacher's signals gives float images; made anew from its arguments alone.

        Args:
            images: float, `[b c h w]`.
            cotangents: key -> dL/dsignal, of the signal's shape; what is left out is zero.
            wanted: the signals that those are of.

        Returns:
            Of the images' shape, dtype and device.
        """
        given = images.detach().requires_grad_(True)
        found = self.live(given, tuple(s for s in wanted if s.key in cotangents))
        pairs = [(found[k], c.to(found[k])) for k, c in cotangents.items() if found[k].requires_grad]
        if not pairs:
            return torch.zeros_like(images)
        outputs, weights = zip(*pairs)
        (grad,) = torch.autograd.grad(outputs, given, weights, allow_unused=True)
        return torch.zeros_like(images) if grad is None else grad

    def _found(self, images: Tensor, wanted: tuple[Signal, ...], key: int | None = None) -> Signals:
        if not set(wanted) <= set(self.tapped.signals):
            before, every = self.tapped, (*self.tapped.signals, *wanted)
            self.tapped = Tapped(self.spec, self.model, every, self.facts, self.device)
            before.close()
        found = self.tapped(images, key, wanted)
        return {signal.key: found[signal.key].contiguous() for signal in wanted}

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits `[b c]` of images `[b c h w]`."""
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

    def live(self, images: Tensor, asks: Asks) -> dict[str, Signals]:
        """Teacher -> the signals asked for, in float32 or float64, with a graph that leads back to float images."""
        found = {ask.teacher: self.teachers[ask.teacher].live(images, ask.signals) for ask in asks.of}
        return {name: {key: _wide(value) for key, value in own.items()} for name, own in found.items()}

    def input_grad(self, images: Any, asks: Asks, cotangents: Mapping[str, Mapping[str, Any]]) -> codecs.Reply:
        """The gradient at float images of a loss on these teachers' signals: the sum over the teachers.

        Args:
            images: `[b c h w]`, an array.
            asks: the signals that were asked of each.
            cotangents: teacher -> key -> the loss's gradient at that signal, an array.
        """
        started = time.perf_counter()
        given = torch.from_numpy(images.copy())
        total = torch.zeros_like(given)
        for ask in asks.of:
            if own := {key: torch.from_numpy(array.copy()) for key, array in cotangents.get(ask.teacher, {}).items()}:
                total += self.teachers[ask.teacher].input_grad(given, own, ask.signals)
        reply = codecs.Reply({SUM: codecs.encode({GRAD: total}, codecs.Codec("dense"))})
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


@torch.enable_grad()
def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


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
