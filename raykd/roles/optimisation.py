"""Optimizers by name, learning rates as pure functions of time, gradients that are equal on every worker."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raykd.config import Training
from raykd.errors import ConfigError, near

TORCH = {
    "sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad", "adadelta": "Adadelta",
    "nadam": "NAdam", "radam": "RAdam", "adamax": "Adamax", "asgd": "ASGD",
}  # fmt: skip


def optimizer(training: Training, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """An optimizer of torch by lower-case name, else of timm (`lamb`, `lion`, ...), over all trainable parameters.

    Norm scales and biases (one axis or none) get no weight decay where `decay_norms` is False.

    Raises:
        ConfigError: no such optimizer, or it refuses an option.
    """
    parameters = list(dict.fromkeys(p for m in modules for p in trained(m) if p.requires_grad))
    decayed = [p for p in parameters if training.decay_norms or p.ndim > 1]
    plain = [p for p in parameters if not (training.decay_norms or p.ndim > 1)]
    groups = [{"params": decayed, "weight_decay": training.weight_decay}] if decayed else []
    groups += [{"params": plain, "weight_decay": 0.0}] if plain else []
    name = str(training.optimizer).lower()
    make = getattr(torch.optim, TORCH[name]) if name in TORCH else _timm_optimizer(name)
    options = {"lr": training.lr, "momentum": training.momentum, "nesterov": training.nesterov}
    accepted = inspect.signature(make).parameters
    options = {k: v for k, v in options.items() if k in accepted}
    if options.get("nesterov") and not options.get("momentum"):
        raise ConfigError("training.nesterov: Nesterov's method needs a momentum above 0. Set training.momentum.")
    unknown = [o for o in training.optimizer_options if o not in accepted]
    if unknown:
        raise ConfigError(f"training.optimizer_options: {name} has no {unknown[0]!r}. {near(unknown[0], accepted)}")
    return make(groups, **options | dict(training.optimizer_options))


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module but for those of parts that update themselves (`own_update`)."""
    apart = {p for m in module.modules() if getattr(m, "own_update", False) for p in m.parameters()}
    return [p for p in module.parameters() if p not in apart]


def _timm_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    from timm.optim import get_optimizer_class, list_optimizers  # type: ignore[attr-defined]

    known = [str(n) for n in list_optimizers()]
    if name not in known:
        raise ConfigError(f"training.optimizer: no optimizer {name!r}. {near(name, [*TORCH, *known])}")
    return get_optimizer_class(name, bind_defaults=False)


def rate(training: Training) -> Callable[[float], float]:
    """Factor on the learning rate as a function of time in epochs, a float: `multistep cosine linear constant`.

    A linear warm-up over `warmup_epochs` comes first; its first step is not zero.

    Raises:
        ConfigError: no such scheduler.
    """
    epochs, warmup = float(training.epochs or 1), float(training.warmup_epochs or 0.0)
    milestones, gamma = tuple(training.milestones or ()), float(training.gamma or 0.1)
    kinds: dict[str, Callable[[float], float]] = {
        "constant": lambda _: 1.0,
        "multistep": lambda e: gamma ** sum(e + 1e-9 >= m for m in milestones),
        "cosine": lambda e: 0.5 * (1.0 + math.cos(math.pi * min(max(e - warmup, 0.0) / max(epochs - warmup, 1e-9), 1.0))),
        "linear": lambda e: max(1.0 - max(e - warmup, 0.0) / max(epochs - warmup, 1e-9), 0.0),
    }
    name = str(training.scheduler)
    if name.startswith("timm:"):
        return _timm_rate(training, name[5:])
    if name not in kinds:
        raise ConfigError(f"training.scheduler: no scheduler {name!r}. {near(name, [*kinds, 'timm:<name>'])}")
    base = kinds[name]
    return lambda e: base(e) * (min((e + 1e-3) / warmup, 1.0) if warmup > 0 else 1.0)


def _timm_rate(training: Training, name: str) -> Callable[[float], float]:
    from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]

    if name in ("none", "plateau"):
        raise ConfigError(f"training.scheduler: 'timm:{name}' is no function of time. Use constant, cosine or multistep.")
    holder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        timm_scheduler, _ = create_scheduler_v2(
            holder,
            sched=name,
            num_epochs=int(training.epochs or 1),
            decay_milestones=[int(m) for m in training.milestones or (1,)],
            decay_rate=float(training.gamma or 0.1),
            warmup_epochs=int(training.warmup_epochs or 0),
            warmup_lr=1e-3,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"training.scheduler: timm has no scheduler {name!r} ({error}).") from None

    def factor(epoch: float) -> float:
        timm_scheduler.step(int(epoch))
        return float(holder.param_groups[0]["lr"])

    return factor


def world_size() -> int:
    """Number of data-parallel workers."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(values: Tensor) -> Tensor:
    """Sum over all workers, in place, in one fixed order; the tensor itself where there is one worker."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def sync_gradients(parameters: list[nn.Parameter], flags: Tensor) -> Tensor:
    """Adds up gradients and flags over the workers in one message.

    Losses are sums over a worker's samples divided by the global count, so a sum of gradients is that of the whole batch.

    Args:
        parameters: in the same order on every worker.
        flags: `[f]` float, one entry a condition that must be seen by all workers at the same step.

    Returns:
        The summed flags.
    """
    if world_size() == 1:
        return flags
    with_grad = [p for p in parameters if p.grad is not None]
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in with_grad:
        by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)  # type: ignore[arg-type]
    for grads in by_dtype.values():
        flat = torch.cat([g.reshape(-1) for g in grads])
        all_sum(flat)
        for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(part.view_as(grad))
    return all_sum(flags)


def average_buffers(model: nn.Module) -> None:
    """Averages floating-point buffers (batch-norm statistics) over the workers, so that all evaluate and export one model."""
    count = world_size()
    if count == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(all_sum(buffer.double()).div_(count))  # in float64: equal statistics stay as they are
