"""The view `stochastic`: a model with some of its residual blocks left out, an identity in their place.

One network becomes many: each mask of blocks is a sub-network of its own (Huang et al., arXiv:1603.09382). Which blocks can be
left out is found by what they do, not by what they are called: with everything trained in it silenced, a block that adds onto
its input hands the input on. So it works for the CIFAR families, torchvision, timm and models of a user's own.

The public function of the view's name is its declaration: its keyword-only parameters are options of every loss that takes a
signal of the view.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raykd.errors import ConfigError, ModelError
from raykd.models.measure import evaluating, trial_forward

RULES = ("uniform", "linear")


def stochastic(
    blocks: Sequence[str],
    generator: torch.Generator,
    *,
    drop_rate: float = 0.2,
    drop_rule: Literal["uniform", "linear"] = "uniform",
) -> list[str]:
    """The blocks that one forward leaves out.

    Args:
        blocks: module paths of the blocks that can be left out, first to last.
        generator: on the CPU; one number is drawn a block.
        drop_rate: probability that a block is left out, 0 to below 1; under `linear` that of the last block.
        drop_rule: `uniform` or `linear`: block k of n is left out with probability drop_rate * k / n (Huang et al.).

    Raises:
        ConfigError: an option is out of range.
    """
    check_options(drop_rate, drop_rule)
    drawn = torch.rand(len(blocks), generator=generator, dtype=torch.float64).tolist()
    depth = [(k + 1) / len(blocks) if drop_rule == "linear" else 1.0 for k in range(len(blocks))]
    return [block for block, number, share in zip(blocks, drawn, depth) if number < drop_rate * share]


def check_options(drop_rate: float, drop_rule: str) -> None:
    """Raises ConfigError where an option of the view is out of range."""
    if not 0 <= drop_rate < 1:
        raise ConfigError(f"drop_rate: expected a probability of at least 0 and below 1, got {drop_rate}.")
    if drop_rule not in RULES:
        raise ConfigError(f"drop_rule: expected {' or '.join(map(repr, RULES))}, got {drop_rule!r}.")


def skippable(model: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """Module paths of the blocks that can be left out, in the order in which they run; the model is left as it was.

    A block runs once a forward, keeps its input's shape, and hands its input on once everything trained in it is silent.

    Args:
        model: on any device; on `meta` too.
        input_shape: (c, h, w) of its input.

    Raises:
        ModelError: there is no such block.
    """
    firings: dict[str, list[Any]] = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            firings.setdefault(path, []).append((args, kwargs, output))

        return hook

    candidates = {path: m for path, m in model.named_modules() if path and _trained_children(m)}
    handles = [m.register_forward_hook(note(path), with_kwargs=True) for path, m in candidates.items()]
    try:
        _trial(model, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    found: list[str] = []
    for path in sorted(firings, key=lambda p: p.count(".")):  # a block inside a block goes with it
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and len(firings[path]) == 1 and _adds_to_its_input(candidates[path], *firings[path][0]):
            found.append(path)
    if not found:
        raise ModelError(
            f"stochastic view of {type(model).__name__}: expected residual blocks that keep their input's shape, found none. "
            "Choose a residual network (a ResNet, a WRN, a vision transformer)."
        )
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    return sorted(found, key=order.__getitem__)


@contextmanager
def without(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Inside, each of these blocks hands its input on and computes nothing; hooks on it still fire."""
    modules = [model.get_submodule(path) for path in blocks]
    for module in modules:
        module.forward = _hand_on  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _hand_on(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return x


def _trained_children(module: nn.Module) -> list[nn.Module]:
    """The nearest modules below that hold parameters and are called."""
    found = []
    for child in module.children():
        if any(True for _ in child.parameters()):
            called = type(child).forward is not nn.Module.forward
            found += [child] if called else _trained_children(child)
    return found


def _trial(model: nn.Module, input_shape: Sequence[int]) -> None:
    """One forward for its shapes: without memory where the model can, else on copies on the CPU."""
    try:
        trial_forward(model, input_shape, "meta")
    except Exception:
        if any(p.is_meta for p in model.parameters()):
            raise
        trial_forward(model, input_shape, "cpu")


def _adds_to_its_input(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Runs a copy of the block with everything trained in it silenced, on numbers of at least 0 (so that a ReLU is idle)."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.shape != output.shape or not x.is_floating_point():
        return False
    twin = _twin(block)
    probe = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    handles = [child.register_forward_hook(_silence) for child in _trained_children(twin)]
    try:
        with torch.no_grad(), evaluating(twin):
            return torch.equal(twin(probe.clone(), *_real(args[1:]), **_real(kwargs)), probe)
    except Exception:  # a block that needs more than its input
        return False
    finally:
        for handle in handles:
            handle.remove()


def _twin(block: nn.Module) -> nn.Module:
    """A copy on the CPU; its values, which do not matter, are ones."""
    twin = copy.deepcopy(block).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.fill_(1)
    return twin


def _silence(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_silence(_module, _args, entry) for entry in output)
    return torch.zeros_like(output) if isinstance(output, Tensor) else output


def _real(value: Any) -> Any:
    """Arguments beside the input, with zeros for tensors that have no values."""
    if isinstance(value, dict):
        return {name: _real(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_real(entry) for entry in value)
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
