"""A shared trunk and several tails; see raykd/models/branching.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raykd.errors import ModelError, SignalError, told
from raykd.models.addresses import Layer, aliases, resolve, stages
from raykd.models.replay import Held, Replay, Side, Tape, dry_run, inside, replace, run, trace
from raykd.models.structure import Branched, Make, Shape, layer_of, switch_off_inplace
from raykd.models.taps import logits_of

K = TypeVar("K")


class Split(Branched):
    """Tails of one's own on a shared trunk.

    A tail is the rest of another instance of the backbone, with fresh weights. Each of its modules that is done with at the
    split plays back what the trunk's answered, so the trunk runs once (with `views="own"` once a branch).

    Args:
        make, num_classes, shape: see `branched`.
        count: branches; 2, or one more than `options`.
        at: the last layer that is shared, a stage or module path; the second to last stage.
        options: for each further branch what `make` is called with, for tails of other widths or depths; none: the same.
        rescale: divide the gradient that the branches together send into the trunk by their number (CL, Song & Chai,
            arXiv:1805.11761: backpropagation rescaling).
        views: "same", or "own": each branch sees its own inputs, and the trunk runs on each.

    Raises:
        ModelError: no such stage; a tail does not fit the trunk, or shares parameters with it.
    """

    kind = "split"

    def __init__(
        self,
        make: Make,
        num_classes: int,  # noqa: ARG002
        shape: Shape,
        *,
        count: int | None = None,
        at: str | None = None,
        options: Sequence[Mapping[str, Any]] = (),
        rescale: bool = False,
        views: str = "same",
    ) -> None:
        count = (1 + len(options) if options else 2) if count is None else count
        wanted = [dict(entry) for entry in options] or [{} for _ in range(count - 1)]
        if count != 1 + len(wanted):
            raise ModelError(f"branching 'split': expected options for {count - 1} further branches, got {len(options)}.")
        super().__init__(make(), count, views)
        switch_off_inplace(self.plain)
        self.at = self._split_at(at)
        self.rescale, self.clone = rescale, False
        self.tape = Tape()
        self._trace = trace(self.plain, shape)
        self._trunk = self._trace.finished(self.at)
        if not self.at.path or self.at.path not in self._trunk or self.at.side != "out":
            raise ModelError(f"{self._name}: expected a stage or module that runs once, got {self.at.name!r}. Split elsewhere.")
        self._sides: list[Side] = [(path, "out") for path in self._trunk]
        self._keys: list[list[str]] = []
        self.tails = nn.ModuleList(self._tail(i, make(**entry)) for i, entry in enumerate(wanted, 1))
        self._examine(shape)

    def _split_at(self, at: Any) -> Layer:
        every = stages(self.plain)
        if at is None and len(every) < 2:
            got = ", ".join(every) or "none"
            raise ModelError(f"{self._name}: expected two stages or more, got {got}. Say where, with `at`, a module path.")
        if at is not None and not isinstance(at, str):
            raise ModelError(f"{self._name}: expected `at` to be one layer, got {at!r}.")
        return layer_of(self.plain, every[-2] if at is None else at)

    def _tail(self, i: int, tail: nn.Module) -> nn.Module:
        """The backbone's instance with replays in the place of the trunk."""
        own, trunk = tail.state_dict(), self.plain.state_dict()
        for name in sorted({name for name in (*own, *trunk) if inside(name, self._trunk)}):
            shapes = [tuple(state[name].shape) if name in state else None for state in (trunk, own)]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"branch {i} of {self._name}: expected the trunk's {name} {shapes[0]}, got {shapes[1]}. "
                    f"Let its options change what comes after {self.at.name!r} only."
                )
        self._keys.append(list(own))
        switch_off_inplace(tail)
        known = {name: address for name, address in aliases(tail).items() if address}
        modules = dict(tail.named_modules())
        for path in self._trunk:
            if path not in modules:
                raise ModelError(f"branch {i} of {self._name}: expected the trunk's module {path}, got none by that name.")
            replace(tail, path, Replay(self.tape, path))
        if not callable(getattr(tail, "layer_aliases", None)):
            tail.layer_aliases = _Fixed(known)  # type: ignore[assignment]
        return tail

    def _examine(self, shape: Shape) -> None:
        """Runs each tail once; ties what only the trunk uses of its parameters; finds in-place operations on what is shared."""

        def probe(images: Tensor) -> list[tuple[set[str], set[str], set[Side]]]:
            _, held = run(self.plain, images, self._sides)
            trunk = _reached([v for values in held.values() for v in values], _floats(self.plain))
            found = []
            for i, tail in enumerate(self.tails, 1):
                leaves = {side: [_leaf(value) for value in values] for side, values in held.items()}
                own = _copies(leaves)
                versions = [value._version for value in _tensors(own)]
                try:
                    with self.tape.playing(own):
                        logits = logits_of(tail(images))
                except Exception as error:
                    raise ModelError(
                        f"branch {i} of {self._name}: expected a forward that goes on from {self.at.name!r}, got "
                        f"{told(error)}. Choose another split, or options that fit the trunk."
                    ) from error
                if versions != [value._version for value in _tensors(own)]:
                    self.clone = True
                used = {side for side in own if _reached([logits], dict(enumerate(_tensors({side: leaves[side]}))))}
                found.append((trunk, _reached([logits], _floats(tail)), used))
            return found

        for i, (trunk, own, used) in enumerate(dry_run(self, shape, probe, grad=True), 1):
            tail = self.tails[i - 1]
            shared = [name for name in _floats(tail) if name in trunk]
            if twice := [name for name in shared if name in own]:
                raise ModelError(
                    f"{self._name}: expected parameters on one side of {self.at.name!r}, got {twice[0]} on both. "
                    "Split elsewhere."
                )
            for name in shared:
                outer, _, last = name.rpartition(".")
                setattr(tail.get_submodule(outer), last, self.plain.get_parameter(name))
            others = sorted(path for path, _ in used if path != self.at.path)
            if self.rescale and others:
                raise ModelError(
                    f"{self._name}: expected {self.at.name!r} to be all that branches take from the trunk, where rescale is "
                    f"set, got {others[0]} too. Split elsewhere."
                )

    @property
    def _name(self) -> str:
        return f"split {type(self.plain).__name__}"

    def _answers(self, views: list[Tensor]) -> list[Tensor]:
        change: dict[Side, Callable[[Tensor], Tensor]] = {}
        if self.rescale:
            change[self.at.path, "out"] = self._rescaled
        logits, held = run(self.plain, views[0], self._sides, change=change, copy=self.clone)
        found = [logits]
        for tail, images in zip(self.tails, views[1:]):
            if self.own:
                _, held = run(self.plain, images, self._sides, last=self.at, change=change, copy=self.clone)
            with self.tape.playing(_copies(held) if self.clone else held):
                found.append(logits_of(tail(images)))
        return found

    def _rescaled(self, feature: Tensor) -> Tensor:
        return _Rescale.apply(feature, 1 / self.count)  # type: ignore[no-untyped-call]

    def path(self, i: int, layer: str) -> str:
        self._check(i)
        try:
            found = resolve(self.plain, layer)
        except SignalError:
            if i == 0:
                raise
            found = None
        if found is not None and (i == 0 or inside(found.path, self._trunk)):
            return self._shared(i, found)
        found = resolve(self.tails[i - 1], layer)
        address = f"tails.{i - 1}" + (f".{found.path}" if found.path else "") + (":in" if found.side == "in" else "")
        return address if found.call is None else f"{address}#{found.call}"

    def _shared(self, i: int, found: Layer) -> str:
        side: Side = (found.path, found.side)
        whole = self._trace.count(side)
        part = self._trace.count(side, self.at) if self.own else 0
        before = 0 if i == 0 or not self.own else whole + (i - 1) * part
        return self._plain(found, before, part if i and self.own else whole, whole + (self.count - 1) * part)

    def state_of(self, i: int) -> dict[str, Tensor]:
        if i == 0:
            return super().state_of(i)
        self._check(i)
        own, trunk = self.tails[i - 1].state_dict(), self.plain.state_dict()
        return {name: own[name] if name in own else trunk[name] for name in self._keys[i - 1]}


class _Rescale(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class _Fixed:
    """A model's aliases, remembered while it could still be asked."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known

    def __call__(self) -> dict[str, str]:
        return self.known


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.is_floating_point()}


def _reached(outputs: Iterable[Any], inputs: Mapping[K, Tensor]) -> set[K]:
    """Names of the inputs that outputs depend on."""
    reals = [value.sum() for value in outputs if isinstance(value, Tensor) and value.requires_grad]
    if not reals or not inputs:
        return set()
    found = torch.autograd.grad(torch.stack(reals).sum(), list(inputs.values()), retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(inputs, found) if gradient is not None}


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(held: Held) -> list[Tensor]:
    return [value for values in held.values() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _copies(held: Held) -> Held:
    return {side: [v.clone() if isinstance(v, Tensor) else v for v in values] for side, values in held.items()}
