"""Batch norms of a model: where they are, and their statistics as a signal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raykd.errors import SignalError
from raykd.models.replay import trace


def norms(model: nn.Module, shape: Sequence[int]) -> list[str]:
    """Layer names of every firing of a batch norm with running statistics, in the order in which a forward reaches them.

    Args:
        model: left as it was; may be on the meta device.
        shape: (c, h, w) of its input.
    """
    own = {path for path, module in model.named_modules() if _counts(module)}
    if not own:
        return []
    fired = [path for path, side in trace(model, shape).events if side == "in" and path in own]
    seen: dict[str, int] = {}
    found = []
    for path in fired:
        seen[path] = seen.get(path, 0) + 1
        found.append(f"{path}#{seen[path]}" if fired.count(path) > 1 else path)
    return found


def norm_statistics(module: nn.Module, given: Tensor) -> Tensor:
    """Statistics at a batch norm, `[4 c]` in at least float32: mean and biased variance of its input over batch and places, and
    its own running mean and variance.

    The first two carry gradient to the input; biased, as in "Dreaming to Distill" (Yin et al. 2020) and its code, though the
    running variance that they are held against was averaged over unbiased ones.

    Args:
        module: the batch norm.
        given: its input, `[b c *p]`.

    Raises:
        SignalError: it is no batch norm, or one without running statistics.
    """
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        kind = type(module).__name__
        raise SignalError(f"norm: expected a batch norm with running statistics, got {kind}. Use a model that has them.")
    given = given.to(torch.promote_types(given.dtype, torch.float32))
    axes = [axis for axis in range(given.ndim) if axis != 1]
    variance, mean = torch.var_mean(given, axes, correction=0)
    kept = (statistic.detach().to(given.dtype) for statistic in (module.running_mean, module.running_var))
    return torch.stack([mean, variance, *kept])


def _counts(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None
