"""Gradients through teachers, wherever they live: their signals on images that somebody made lead back to these images.

    forward     images                ──────▶  teacher: forward                        ──────▶  signals
    backward    images, dL/dsignals   ──────▶  teacher: forward again, backward        ──────▶  dL/dimages, of an actor's sum

A teacher elsewhere keeps nothing between the two, so any replica can answer either, as often as it is asked; one in this
process keeps its graph instead of a second forward. All sources work at the same time and their gradients are added up in the
same order, so that on a CPU, in one thread, the gradient is the same to the bit whatever the placement.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raykd.errors import ConfigError, SignalError, SourceError
from raykd.exchange.asking import GRAD, SUM, Ask, Asks
from raykd.exchange.sources import Answers, InlineSource, Live, LocalSource, Pending, Source
from raykd.signals import VIEWS, Signal, Signals


def through(sources: Mapping[str, Source], images: Tensor, wanted: Mapping[str, tuple[Signal, ...]]) -> dict[str, Signals]:
    """Signals of teachers on float images, with gradient back to the images. First derivatives only.

    Args:
        sources: of the job; those of whose teachers nothing is wanted are left alone.
        images: `[b c h w]`, 0 black, 1 white; on any device.
        wanted: teacher -> what is asked of it.

    Returns:
        Teacher -> its signals, on the images' device; in the order of `wanted`.

    Raises:
        ConfigError: a teacher's codec is lossy, it answers from a store, or a view draws.
        SignalError: the images are not floats, or a second derivative is asked for.
        LostError: no replica is left, here or in the backward; also of a source that the training could go on without.
        SourceError: none answered in time, here or in the backward.
    """
    if not images.is_floating_point():
        raise SignalError(f"images: expected floats in 0..1, to which gradients flow, got {images.dtype}.")
    images = images if images.dtype == torch.float64 else images.float()
    calls = [_Call(source, asks) for source, asks in _asked(sources, wanted)]
    array = _array(images)
    for call in calls:
        call.send(array)
    values = iter(_Through.apply(images, calls) if calls else ())  # type: ignore[no-untyped-call]
    found = {ask.teacher: {s.key: next(values) for s in ask.signals} for call in calls for ask in call.asks.of}
    return {teacher: found.get(teacher, {}) for teacher in wanted}


@dataclass(eq=False)
class _Call:
    """One source, what is asked of it, its answer on the way; of one in this process, the graph until it was used."""

    source: Live
    asks: Asks
    pending: Pending | None = None
    graph: tuple[Tensor, Answers] | None = None

    def send(self, images: Any) -> None:
        """Asks whom another process answers for."""
        if not _here(self.source):
            self.pending = self.source.ask(images, self.asks)

    def answer(self, images: Tensor, learns: bool) -> None:
        """Has the teachers of this process answer, while the others do."""
        if isinstance(self.source, InlineSource) and self.pending is None:
            given = images.detach().requires_grad_(learns)
            self.graph = (given, self.source.live(given, self.asks))

    def signals(self) -> Answers:
        """Waits for the answer."""
        pending, self.pending = self.pending, None
        if self.graph is not None:
            return {teacher: {k: v.detach() for k, v in own.items()} for teacher, own in self.graph[1].items()}
        assert pending is not None
        return pending.result()

    def back(self, images: Tensor, cotangents: Mapping[str, Signals]) -> Pending:
        """Asks for the gradient at the images."""
        graph, self.graph = self.graph, None
        if graph is not None:
            return _Later(self.source, *graph, cotangents)
        given = {teacher: {k: _array(v) for k, v in own.items()} for teacher, own in cotangents.items()}
        return self.source.ask(_array(images), self.asks, given)


@dataclass(frozen=True)
class _Later:
    """A gradient by the graph of this process, computed when the others have been asked."""

    source: Live
    images: Tensor
    answers: Answers
    cotangents: Mapping[str, Signals]

    def result(self) -> Answers:
        """The gradient."""
        started = time.perf_counter()
        pairs = [(self.answers[t][k], c) for t, own in self.cotangents.items() for k, c in own.items()]
        learning = [(value, cotangent) for value, cotangent in pairs if value.requires_grad]
        grad = torch.zeros_like(self.images)
        if learning:
            outputs, weights = zip(*learning)
            (grad,) = torch.autograd.grad(outputs, self.images, weights)
        self.source.backward.requests += 1
        self.source.backward.teacher_s += time.perf_counter() - started
        return {SUM: {GRAD: grad}}


class _Through(torch.autograd.Function):
    """Signals of all teachers as one node of the graph, so that they work at the same time."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, calls: Sequence[_Call]) -> tuple[Tensor, ...]:
        """Waits for the signals."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(images)
        ctx.calls = calls
        for call in calls:
            call.answer(images, ctx.needs_input_grad[0])
        found = [call.signals() for call in calls]
        return tuple(own[teacher][key].to(images.device) for own, call in zip(found, calls) for teacher, key in _places(call))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, None]:
        """Asks for the gradients, and adds them up in the order of the sources."""
        (images,) = ctx.saved_tensors
        given, pending = iter(cotangents), []
        for call in ctx.calls:
            own: dict[str, Signals] = {}
            for teacher, key in _places(call):
                if (cotangent := next(given)) is not None:
                    own.setdefault(teacher, {})[key] = cotangent.detach()
            if own:
                pending.append(call.back(images.detach(), own))
        grads = [request.result()[SUM][GRAD].to(images.device) for request in pending]
        if not grads:
            return None, None
        grad = grads[0]
        for other in grads[1:]:
            grad = grad + other
        if torch.is_grad_enabled():
            grad = _Once.apply(grad, images, *(c for c in cotangents if c is not None))  # type: ignore[no-untyped-call]
        return grad, None


class _Once(torch.autograd.Function):
    """A gradient that nobody here can differentiate once more."""

    @staticmethod
    def forward(_ctx: Any, grad: Tensor, *_of: Tensor) -> Tensor:
        """The gradient."""
        return grad.clone()

    @staticmethod
    def backward(_ctx: Any, *_cotangents: Tensor) -> Any:
        """Raises SignalError."""
        raise SignalError("images: expected first derivatives through a teacher, got a second one. Teachers offer none.")


def _asked(sources: Mapping[str, Source], wanted: Mapping[str, tuple[Signal, ...]]) -> Iterator[tuple[Live, Asks]]:
    """Each source that is asked, and for what; faults first."""
    homes = {ask.teacher: (s, ask.codec) for s in sources.values() if isinstance(s, Live) for ask in s.asks.of}
    for teacher, signals in wanted.items():
        where = f"teachers.{teacher}"
        if teacher not in homes:
            if teacher in sources:
                raise ConfigError(f"{where}.placement: expected inline or pool, got a store, which knows no new images.")
            raise SourceError(f"Teacher {teacher!r}: nobody answers for it.")
        codec = homes[teacher][1]
        if not codec.exact:
            raise ConfigError(f"{where}.codec: expected dense where gradients go through the teacher, got {codec.kind}.")
        if drawn := [s.key for s in signals if set(s.views) & set(VIEWS)]:
            raise ConfigError(f"{where}: expected signals that draw nothing where gradients go through them, got {drawn[0]}.")
    for source in sources.values():
        if isinstance(source, Live):
            names = {a.teacher: tuple(dict.fromkeys(wanted.get(a.teacher, ()))) for a in source.asks.of}
            if asks := tuple(Ask(a.teacher, names[a.teacher], a.codec) for a in source.asks.of if names[a.teacher]):
                yield source, Asks(asks)


def _here(source: Live) -> bool:
    return isinstance(source, InlineSource) and not isinstance(source, LocalSource)


def _places(call: _Call) -> list[tuple[str, str]]:
    return [(ask.teacher, signal.key) for ask in call.asks.of for signal in ask.signals]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()
