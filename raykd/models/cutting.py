"""A model in pieces: its blocks between layers, and what comes after a layer, as models of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raykd.errors import ModelError, told
from raykd.models.addresses import Layer, classifier_path, resolve_all
from raykd.models.measure import evaluating
from raykd.models.replay import Trace, dry_run, inside, replace, trace
from raykd.models.structure import Shape, switch_off_inplace
from raykd.models.taps import logits_of
from raykd.parts.grafts import Block, fold

CLOSE = 1e-3  # between two ways to the same logits, of their largest


def blocks(model: nn.Module, names: Sequence[str], shape: Shape) -> list[Block]:
    """The blocks that layers part a model into, one more than there are layers.

    Args:
        model: left as it was.
        names: of the layers, in the order in which they run.
        shape: (c, h, w) of its input.

    Raises:
        ModelError: a layer that is no output of a module that runs once, or layers in another order.
    """
    layers, traced = _cuts(model, names, shape)
    done = [traced.finished(layer) for layer in layers]
    parts: list[list[nn.Module]] = [[] for _ in range(len(layers) + 1)]
    for path, module in model.named_modules():
        parts[next((i for i, own in enumerate(done) if inside(path, own)), len(layers))].append(module)
    readers = [(), *(_readers(model, layer, shape) for layer in layers)]
    return [Block(tuple(own), reading) for own, reading in zip(parts, readers)]


def tails(model: nn.Module, names: Sequence[str], shape: Shape) -> list[nn.Module]:
    """For each layer what comes after it: a frozen model in eval mode from the layer's output to logits.

    They share the model's tensors.

    Raises:
        ModelError: as `blocks`; or the model takes more from before a layer than the layer's output.
    """
    layers, traced = _cuts(model, names, shape)
    return [_tail(model, layer, traced, shape) for layer in layers]


class Tail(nn.Module):
    """The rest of a model after a layer: run on black images, past modules that hand them on, to where the output is given."""

    def __init__(self, model: nn.Module, layer: Layer, done: Sequence[str], shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
        shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        self.model = copy.deepcopy(model, shared)
        self.given = _Given()
        for path in done:
            replace(self.model, path, self.given if path == layer.path else _Passed())
        switch_off_inplace(self.model)
        self.eval()

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `[b c]` of the layer's output."""
        self.given.value = feature
        try:
            return logits_of(self.model(feature.new_zeros(len(feature), *self.shape)))
        finally:
            self.given.value = None


class _Given(nn.Module):
    value: Tensor | None = None

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        assert self.value is not None
        return self.value


class _Passed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()), None)


def _cuts(model: nn.Module, names: Sequence[str], shape: Shape) -> tuple[list[Layer], Trace]:
    layers, traced = resolve_all(model, list(names)), trace(model, shape)
    for layer in layers:
        if not layer.path or layer.side != "out" or layer.flat or traced.count((layer.path, "out")) != 1:
            raise ModelError(
                f"{_kind(model)}: expected the output of a module that runs once, got {layer.name!r}. Name another layer."
            )
    ends = [traced.end(layer) for layer in layers]
    if ends != sorted(set(ends)):
        raise ModelError(f"{_kind(model)}: expected layers in the order in which they run, got {', '.join(names)}.")
    return layers, traced


def _tail(model: nn.Module, layer: Layer, traced: Trace, shape: Shape) -> nn.Module:
    done = traced.finished(layer)
    before = [name for name, _ in model.named_parameters() if inside(name, done)]

    def beside(images: Tensor) -> list[str]:
        """Parameters from before the layer that reach the logits past it."""
        logits = _cut(model, layer, images)
        own = {name: p for name, p in model.named_parameters() if name in before and p.requires_grad}
        if not own:
            return []
        found = torch.autograd.grad(logits.sum(), list(own.values()), allow_unused=True)
        return [name for name, gradient in zip(own, found) if gradient is not None]

    if past := dry_run(model, shape, beside, grad=True):
        raise ModelError(
            f"{_kind(model)}: expected all that comes after {layer.name!r} to read its output alone, got {past[0]} past it. "
            "Name another layer."
        )
    tail = Tail(model, layer, done, shape)
    _agree(model, layer, tail, shape)
    return tail


def _agree(model: nn.Module, layer: Layer, tail: nn.Module, shape: Shape) -> None:
    """Raises ModelError unless the tail does what the model does after the layer."""
    kept: list[Tensor] = []
    parameter = next(model.parameters(), torch.empty(0))
    images = _images(shape, parameter)
    handle = model.get_submodule(layer.path).register_forward_hook(lambda _m, _a, output: kept.append(output))
    try:
        with torch.no_grad(), evaluating(model):
            wanted = logits_of(model(images))
            found = tail(kept[0])
    except NotImplementedError:  # it reads values, and there are none
        return
    except Exception as error:
        raise ModelError(
            f"{_kind(model)}: expected a forward that goes on from {layer.name!r}, got {told(error)}. Name another layer."
        ) from error
    finally:
        handle.remove()
    if wanted.shape != found.shape or not (wanted.is_meta or _close(wanted, found)):
        raise ModelError(
            f"{_kind(model)}: expected what comes after {layer.name!r} to depend on its output alone, got other logits. "
            "Name another layer."
        )


def _readers(model: nn.Module, layer: Layer, shape: Shape) -> tuple[nn.Module, ...]:
    """The convolutions and linear layers that alone read a layer's channels, so that a map of these goes into their weights."""
    last = classifier_path(model)

    def probe(images: Tensor) -> tuple[nn.Module, ...]:
        found: list[nn.Module] = []

        def reads(path: str, module: nn.Module, value: Any) -> bool:
            leaf, passed = leaves
            if isinstance(module, nn.Conv2d):
                return value is passed and module.groups == 1
            return path == last and isinstance(module, nn.Linear) and module.in_features == leaf.shape[1] and _from(leaf, value)

        def note(path: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                if not leaves or not args or not reads(path, module, args[0]):
                    return None
                found.append(module)
                return output.detach()

            return hook

        leaves: list[Tensor] = []
        handles = [module.register_forward_hook(note(path)) for path, module in model.named_modules() if path]
        try:
            logits = _cut(model, layer, images, leaves)
        finally:
            for handle in handles:
                handle.remove()
        return () if _from(leaves[0], logits) else tuple(found)

    readers: tuple[nn.Module, ...] = dry_run(model, shape, probe, grad=True)
    return readers if readers and _folds(model, layer, readers, shape) else ()


def _folds(model: nn.Module, layer: Layer, readers: Sequence[nn.Module], shape: Shape) -> bool:
    """Whether a map in the readers' weights is that map of the layer's channels; of a model without values, it seems so."""
    weights: list[Tensor] = [reader.weight for reader in readers]  # type: ignore[misc]
    if weights[0].is_meta or len({id(w) for w in weights}) < len(weights):
        return weights[0].is_meta
    matrix = torch.randn(weights[0].shape[1], weights[0].shape[1], generator=torch.Generator().manual_seed(0)).to(weights[0])
    images, kept = _images(shape, weights[0]), [weight.detach().clone() for weight in weights]

    def mapped(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.einsum("ij,bj...->bi...", matrix, output)

    with torch.no_grad(), evaluating(model):
        handle = model.get_submodule(layer.path).register_forward_hook(mapped)
        try:
            wanted = logits_of(model(images))
        finally:
            handle.remove()
        fold(readers, matrix)
        try:
            return _close(wanted, logits_of(model(images)))
        finally:
            for weight, value in zip(weights, kept):
                weight.copy_(value)


def _cut(model: nn.Module, layer: Layer, images: Tensor, leaves: list[Tensor] | None = None) -> Tensor:
    """Logits of a forward that goes on after a layer with a copy of its output that knows nothing of what came before.

    Args:
        model: in eval mode.
        layer: where.
        images: its input.
        leaves: gets, as soon as the layer has fired, a leaf of the graph and what the model goes on with, which is equal.
    """

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        passed = leaf.clone()
        if leaves is not None:
            leaves.extend((leaf, passed))
        return passed

    handle: RemovableHandle = model.get_submodule(layer.path).register_forward_hook(hook)
    try:
        return logits_of(model(images))
    finally:
        handle.remove()


def _from(leaf: Tensor, value: Any) -> bool:
    """Whether a tensor depends on a leaf."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return False
    (found,) = torch.autograd.grad(value.sum(), [leaf], allow_unused=True, retain_graph=True)
    return found is not None


def _images(shape: Shape, like: Tensor) -> Tensor:
    """Two images of noise, always the same."""
    if like.is_meta:
        return torch.empty(2, *shape, dtype=like.dtype, device="meta")
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(like)


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= CLOSE * one.abs().max())


def _kind(model: nn.Module) -> str:
    return type(model).__name__
