"""Classifiers on the way and projections beside the classifier; see raykd/models/branching.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raykd.errors import ModelError
from raykd.models.addresses import resolve, stages
from raykd.models.blocks import conv3x3, he_init, pooled
from raykd.models.replay import Side, dry_run, run, trace, value_of
from raykd.models.structure import Branched, Make, Shape, layer_of, switch_off_inplace


class Exit(nn.Module):
    """A classifier on a hidden layer, `[b c h w]` to `[b outputs]`: 3x3 convolutions with BN and ReLU, each of stride 2 and
    twice the channels, down to the last stage's size (one of stride 1 where it has that), average pool, linear.

    `[b l d]` and `[b d]`: mean over l, linear.
    """

    def __init__(self, shape: Sequence[int], size: int, outputs: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        width = shape[-1]
        if len(shape) == 3:
            width, height = shape[0], shape[1]
            while height > size or not parts:
                stride = 2 if height > size else 1
                parts += [conv3x3(width, stride * width, stride), nn.BatchNorm2d(stride * width), nn.ReLU()]
                width, height = stride * width, -(-height // stride)
        self.blocks = nn.Sequential(*parts)
        self.linear = nn.Linear(width, outputs)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if x.dim() == 4:
            return self.linear(pooled(x))
        return self.linear(x.mean(1) if x.dim() == 3 else x)


class Exits(Branched):
    """Auxiliary classifiers after stages: branch k is that of the k-th layer of `at`.

    Args:
        make, num_classes, shape: see `branched`.
        at: "hidden": each stage but the last; "stages": each; or names of layers, in the order in which they run.
        classes: outputs a class, so an exit answers `[b classes * num_classes]`.
        views: "same" or "own".

    Note:
        What an exit looks like is ours (papers build it of the backbone's own blocks); see Exit.
    """

    kind = "exits"

    def __init__(
        self,
        make: Make,
        num_classes: int,
        shape: Shape,
        *,
        at: str | Sequence[str] = "hidden",
        classes: int = 1,
        views: str = "same",
    ) -> None:
        plain = make()
        every = stages(plain)
        names = {"hidden": every[:-1], "stages": every}.get(at) if isinstance(at, str) else list(at)
        if names is None:
            raise ModelError(f"branching 'exits': expected at to be 'hidden', 'stages' or names of layers, got {at!r}.")
        if not names:
            least = "two stages" if at == "hidden" else "a stage"
            raise ModelError(f"exits of {type(plain).__name__}: expected {least} or more, got {', '.join(every) or 'none'}.")
        super().__init__(plain, 1 + len(names), views)
        switch_off_inplace(plain)
        self.at = [layer_of(plain, name) for name in names]
        self._last = every[-1] if every else None
        self._trace = trace(plain, shape)
        ends = [self._trace.end(layer) for layer in self.at]
        if ends != sorted(ends):
            raise ModelError(f"exits of {type(plain).__name__}: expected layers in the order in which they run, got {names}.")
        self._sides: list[Side] = list(dict.fromkeys((layer.path, layer.side) for layer in self.at))
        shapes = self._shapes(shape)
        maps = [found[1] for found in shapes.values() if len(found) == 3]
        size = shapes[self._last][1] if self._last and len(shapes[self._last]) == 3 else min(maps, default=1)
        self.exits = nn.ModuleList(Exit(shapes[name], size, classes * num_classes) for name in names)
        self.exits.to(next(plain.parameters()))

    def _shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Layers of the exits, and the last stage -> shape without the batch axis."""
        wanted = {layer.name: layer for layer in self.at}
        if self._last is not None:
            wanted.setdefault(self._last, layer_of(self.plain, self._last))
        sides: list[Side] = [(layer.path, layer.side) for layer in wanted.values()]
        held = dry_run(self.plain, shape, lambda images: run(self.plain, images, sides)[1])
        found = {name: tuple(value_of(held, layer).shape[1:]) for name, layer in wanted.items()}
        for name, own in found.items():
            if len(own) not in (1, 2, 3) or (len(own) == 3 and shape[1] == shape[2] and own[1] != own[2]):
                raise ModelError(f"exits of {type(self.plain).__name__}: expected {name!r} to be [b c h w], got {['b', *own]}.")
        return found

    def _answers(self, views: list[Tensor]) -> list[Tensor]:
        logits, held = run(self.plain, views[0], self._sides)
        found = [logits]
        for place, (layer, leave) in enumerate(zip(self.at, self.exits), 1):
            if self.own:
                _, held = run(self.plain, views[place], self._sides, last=layer)
            found.append(leave(value_of(held, layer)))
        return found

    def path(self, i: int, layer: str) -> str:
        """As of Branched; of an exit, `embedding` (input of its linear layer), `logits`, its own last stage (`stage-1`, what
        its convolutions yield), and what is shared."""
        self._check(i)
        found = resolve(self.plain, layer)
        side: Side = (found.path, found.side)
        whole = self._trace.count(side)
        parts = [self._trace.count(side, at) if self.own else 0 for at in self.at]
        if i == 0:
            return self._plain(found, 0, whole, whole + sum(parts))
        own = {"embedding": "linear:in", "logits": "", "stage-1": "blocks", self._last: "blocks"}
        if layer in own:
            return f"exits.{i - 1}.{own[layer]}".rstrip(".")
        if side not in self._trace.events[: self._trace.end(self.at[i - 1])]:
            raise ModelError(
                f"branch {i}: expected a layer before its exit at {self.at[i - 1].name!r}, or its embedding, logits or "
                f"stage-1, got {layer!r}."
            )
        before = whole + sum(parts[: i - 1]) if self.own else 0
        return self._plain(found, before, parts[i - 1] if self.own else whole, whole + sum(parts))


class Heads(Branched):
    """A projection beside the classifier: branch 1 is linear (width d) - ReLU - linear on the embedding `[b d]`.

    Args:
        make, num_classes, shape: see `branched`.
        outputs: of the projection.
    """

    kind = "heads"

    def __init__(self, make: Make, num_classes: int, shape: Shape, *, outputs: int = 128) -> None:  # noqa: ARG002
        super().__init__(make(), 2, "same")
        self.at = layer_of(self.plain, "embedding")
        self._sides: list[Side] = [(self.at.path, self.at.side)]
        held = dry_run(self.plain, shape, lambda images: run(self.plain, images, self._sides)[1])
        width = value_of(held, self.at).flatten(1).shape[1]
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))])
        self.heads.to(next(self.plain.parameters()))

    def _answers(self, views: list[Tensor]) -> list[Tensor]:
        logits, held = run(self.plain, views[0], self._sides)
        return [logits, self.heads[0](value_of(held, self.at).flatten(1))]

    def path(self, i: int, layer: str) -> str:
        self._check(i)
        found = resolve(self.plain, layer)
        return "heads.0" if i and not found.path else self._plain(found, 0, 1, 1)
