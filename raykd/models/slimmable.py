"""One model at many widths: each layer uses its first channels (Yu et al., arXiv:1812.08928).

The model itself is not rebuilt: inside `slimmed` its convolutions, batch norms and linear layers compute with the first part of
their parameters; outside it is the plain model. How many input channels a layer uses follows from what arrives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from raykd.errors import ModelError
from raykd.models.addresses import classifier_path
from raykd.models.replay import dry_run

GRID = 20  # random widths are multiples of 1/20
KINDS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def grid(least: float) -> list[float]:
    """The widths that are drawn from: multiples of 0.05 from `least` to 1."""
    return [k / GRID for k in range(math.ceil(round(least * GRID, 6)), GRID + 1)]


def channels(full: int, width: float) -> int:
    """Outputs of a layer that has `full` of them: the nearest number, at least 1."""
    return max(1, math.floor(full * width + 0.5))


def check_slimmable(model: nn.Module) -> None:
    """Raises ModelError where a model holds a layer that has no sub-width."""
    for path, module in model.named_modules():
        own = next((name for name, _ in module.named_parameters(recurse=False)), None)
        odd = type(module) is nn.Conv2d and module.padding_mode != "zeros"
        if own is not None and (type(module) not in KINDS or odd):
            raise ModelError(
                f"widths of {type(model).__name__}: expected Conv2d (padded with zeros), BatchNorm2d and Linear layers only, "
                f"got {type(module).__name__} ({path or own}). Choose a plain convolutional network."
            )
    if classifier_path(model) is None:
        raise ModelError(f"widths of {type(model).__name__}: expected a linear classifier, got none. Choose another model.")


def fits_by_rounding(model: nn.Module) -> bool:
    """Whether a model that runs at one width runs at all: it has no groups of several channels."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return all(conv.groups in (1, conv.in_channels) for conv in convolutions)


@contextmanager
def slimmed(model: nn.Module, width: float, norms: Mapping[str, nn.BatchNorm2d] | None = None) -> Iterator[None]:
    """Inside, the model runs at a width in (0, 1].

    Args:
        model: checked by `check_slimmable`.
        width: share of the channels.
        norms: batch norms by module path that stand for the model's own at this width; None: statistics of the batch, and the
            first part of the model's own affine parameters.
    """
    head = classifier_path(model)
    changed = []
    for path, module in model.named_modules():
        narrow: Callable[[Tensor], Tensor]
        if isinstance(module, nn.Conv2d):
            narrow = partial(_conv, module, width, path)
        elif isinstance(module, nn.Linear):
            narrow = partial(_linear, module, 1.0 if path == head else width)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            narrow = partial(_norm, module, None if norms is None else norms[path])
        else:
            continue
        module.forward = narrow  # type: ignore[method-assign]
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _conv(conv: nn.Conv2d, width: float, path: str, x: Tensor) -> Tensor:
    seen, groups = x.shape[1], conv.groups
    if groups == 1:
        out, weight = channels(conv.out_channels, width), conv.weight[:, :seen]
    else:  # as many channels a group as ever, and fewer groups
        each = conv.in_channels // groups
        if seen % each:
            raise ModelError(f"{path}: expected whole groups of {each} channels, got {seen} channels at width {width:g}.")
        groups, weight = seen // each, conv.weight
        out = conv.out_channels // conv.groups * groups
    bias = None if conv.bias is None else conv.bias[:out]
    padding: Any = conv.padding
    return F.conv2d(x, weight[:out], bias, conv.stride, padding, conv.dilation, groups)


def _linear(linear: nn.Linear, width: float, x: Tensor) -> Tensor:
    out = channels(linear.out_features, width)
    return F.linear(x, linear.weight[:out, : x.shape[-1]], None if linear.bias is None else linear.bias[:out])


def _norm(full: nn.modules.batchnorm._BatchNorm, own: nn.BatchNorm2d | None, x: Tensor) -> Tensor:
    if own is not None:
        return own(x)
    weight, bias = (None if p is None else p[: x.shape[1]] for p in (full.weight, full.bias))
    return torch.batch_norm(x, weight, bias, None, None, True, 0.0, full.eps, torch.backends.cudnn.enabled)


def norms_at(model: nn.Module, width: float, shape: Sequence[int]) -> dict[str, nn.BatchNorm2d]:
    """A fresh batch norm for each of the model's, as wide as it is at a width; its affine parameters start like the model's."""
    seen: dict[str, int] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda _module, args: seen.update({path: args[0].shape[1]})

    norms = {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    handles = [module.register_forward_pre_hook(note(path)) for path, module in norms.items()]
    try:
        try_width(model, width, shape)
    finally:
        for handle in handles:
            handle.remove()
    found, some = {}, next(model.parameters())
    for path, full in norms.items():
        count = seen.get(path, channels(full.num_features, width))
        momentum: Any = full.momentum
        found[path] = nn.BatchNorm2d(count, full.eps, momentum, full.affine, full.track_running_stats).to(some)
        if found[path].affine:
            with torch.no_grad():
                found[path].weight.copy_(full.weight[:count])
                found[path].bias.copy_(full.bias[:count])
    return found


def try_width(model: nn.Module, width: float, shape: Sequence[int]) -> None:
    """Raises ModelError where a model does not run at a width, on images of (c, h, w)."""

    def run(images: Tensor) -> None:
        with slimmed(model, width), _NoMixing():
            model(images)

    try:
        dry_run(model, shape, run)
    except Exception as error:
        told = str(error).partition("\n")[0].rstrip(".")
        raise ModelError(
            f"widths of {type(model).__name__}: expected a model that runs at width {width:g} on images of "
            f"{' x '.join(map(str, shape))}, got {type(error).__name__}: {told}. Choose a network whose shortcuts are "
            "convolutions (crd_resnet, wrn, vgg, a torchvision ResNet), or other widths or resolutions."
        ) from error


class _NoMixing(TorchFunctionMode):
    """Refuses to put channels of several layers side by side: at another width they would meet other weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.cat, torch.concat, torch.concatenate):
            raise ModelError("its forward concatenates layers, and their places would change with the width")
        return func(*args, **(kwargs or {}))
