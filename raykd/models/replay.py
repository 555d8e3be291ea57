"""A model cut in two without a word from it: what ran before the cut is kept, and played back inside another instance.

A tail is a whole model in which every module that ended before the cut answers with what the trunk's module of the same name
answered in this forward. So the tail's own `forward` runs, with all that it does between its modules, and any model that has
modules can be cut: no family has to know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from raykd.errors import ModelError
from raykd.models.addresses import Layer
from raykd.models.measure import evaluating
from raykd.models.taps import logits_of

Side = tuple[str, Literal["in", "out"]]
Held = dict[Side, list[Any]]


class _Reached(Exception):
    """A forward is where it should stop."""


@dataclass(frozen=True)
class Trace:
    """Which sides of which modules fired in one forward, in order."""

    events: tuple[Side, ...]

    def count(self, side: Side, until: Layer | None = None) -> int:
        """Firings of a side in a forward, or in one that stops at a layer."""
        return self.events[: self.end(until) if until else None].count(side)

    def end(self, layer: Layer) -> int:
        """Events up to the firing of a layer, itself included.

        Raises:
            ModelError: it does not fire.
        """
        places = [place for place, event in enumerate(self.events) if event == (layer.path, layer.side)]
        if len(places) < (layer.call or 1):
            raise ModelError(f"layer {layer.name!r}: expected it to fire in a forward, got {len(places)} firing(s).")
        return places[(layer.call or 1) - 1] + 1

    def finished(self, layer: Layer) -> list[str]:
        """The outermost modules that run and are done with when a layer has fired."""
        before, after = self.events[: self.end(layer)], {path for path, _ in self.events[self.end(layer) :]}
        done = dict.fromkeys(path for path, _ in before if path not in after)
        return [path for path in done if not any(inside(path, [other]) and path != other for other in done)]


def inside(path: str, outer: Collection[str]) -> bool:
    """Whether a module is one of these or in one of them."""
    return any(path == other or path.startswith(f"{other}.") for other in outer)


def trace(model: nn.Module, shape: Sequence[int]) -> Trace:
    """What fires in one forward of a batch of images of (c, h, w); the model is left as it was."""
    events: list[Side] = []

    def note(event: Side) -> Callable[..., None]:
        return lambda *_: events.append(event)

    def run(images: Tensor) -> None:
        events.clear()
        model(images)

    handles: list[RemovableHandle] = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(note((path, "in"))))
        handles.append(module.register_forward_hook(note((path, "out"))))
    try:
        dry_run(model, shape, run)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(tuple(events))


def run(
    model: nn.Module,
    images: Tensor,
    sides: Sequence[Side],
    *,
    last: Layer | None = None,
    change: Mapping[Side, Callable[[Tensor], Tensor]] | None = None,
    copy: bool = False,
) -> tuple[Any, Held]:
    """One forward that keeps what passes some sides, by firing.

    Args:
        model: left as it was, also while another thread runs it.
        images: its input.
        sides: those to keep.
        last: stop when this layer has fired.
        change: side "out" -> what the model goes on with, and what is kept, instead of its output.
        copy: keep copies, for models that go on to change in place what was kept.

    Returns:
        (logits, None where it stopped; side -> its values).
    """
    held: Held = {side: [] for side in sides}
    owner, changes = threading.get_ident(), change or {}

    def keep(side: Side, value: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        changed = side in changes
        value = changes[side](value) if changed else value
        held[side].append(value.clone() if copy and isinstance(value, Tensor) else value)
        if last is not None and side == (last.path, last.side) and len(held[side]) == (last.call or 1):
            raise _Reached
        return value if changed else None

    handles: list[RemovableHandle] = []
    try:
        for side in sides:
            module = model.get_submodule(side[0])
            if side[1] == "in":
                handles.append(module.register_forward_pre_hook(lambda _m, args, s=side: keep(s, args[0])))
            else:
                handles.append(module.register_forward_hook(lambda _m, _args, output, s=side: keep(s, output)))
        return logits_of(model(images)), held
    except _Reached:
        return None, held
    finally:
        for handle in handles:
            handle.remove()


class Tape:
    """What the tails of one model play back; empty but for the length of a tail's forward, and in copies."""

    def __init__(self) -> None:
        self._playing: dict[int, dict[str, Iterator[Any]]] = {}

    @contextmanager
    def playing(self, held: Held) -> Iterator[None]:
        """Inside, replays of this thread answer with these outputs."""
        self._playing[threading.get_ident()] = {path: iter(values) for (path, _), values in held.items()}
        try:
            yield
        finally:
            del self._playing[threading.get_ident()]

    def next(self, path: str) -> Any:
        """The output of a module at its next firing."""
        for value in self._playing.get(threading.get_ident(), {}).get(path, ()):
            return value
        raise ModelError(f"branch: expected {path} to fire as often as in the trunk, got another firing. Call the whole model.")

    def __getstate__(self) -> dict[str, Any]:
        return {"_playing": {}}


class Replay(nn.Module):
    """Stands in a tail for a module of the trunk."""

    def __init__(self, tape: Tape, path: str) -> None:
        super().__init__()
        self.tape, self.path = tape, path

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self.tape.next(self.path)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    outer, _, name = path.rpartition(".")
    setattr(model.get_submodule(outer), name, module)


class _Call(nn.Module):
    def __init__(self, model: nn.Module, run: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, images: Tensor) -> Any:
        return self.run(images)


def dry_run(model: nn.Module, shape: Sequence[int], run: Callable[[Tensor], Any], *, grad: bool = False) -> Any:
    """`run(images)` in eval mode on two images and on stand-ins for the model's tensors: no values change, none are drawn.

    Without memory; where the model cannot and is not there itself, on copies on the CPU. With `grad` the stand-ins of
    parameters require one.
    """
    try:
        return _dry_run(model, shape, run, "meta", grad)
    except Exception:
        if any(tensor.is_meta for tensor in model.parameters()):
            raise
        return _dry_run(model, shape, run, "cpu", grad)


def _dry_run(model: nn.Module, shape: Sequence[int], run: Callable[[Tensor], Any], device: str, grad: bool) -> Any:
    def stand_in(tensor: Tensor) -> Tensor:
        if device == "meta":
            return torch.empty_like(tensor, device="meta", requires_grad=False)
        return tensor.detach().to(device, copy=True)

    state = {f"model.{name}": stand_in(value) for name, value in model.named_buffers(remove_duplicate=False)}
    for name, value in model.named_parameters(remove_duplicate=False):
        state[f"model.{name}"] = stand_in(value).requires_grad_(grad)
    kind = next((p.dtype for p in model.parameters()), torch.float32)
    images = torch.zeros(2, *shape, dtype=kind, device=device)
    with torch.set_grad_enabled(grad), evaluating(model):
        return functional_call(_Call(model, run), state, (images,), tie_weights=False)


def value_of(held: Held, layer: Layer) -> Tensor:
    """What passed a layer."""
    return held[layer.path, layer.side][(layer.call or 1) - 1]
