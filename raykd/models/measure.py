"""What a model is: its size, its work, and the identity of its weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Cost:
    """`parameters` counts elements, shared ones once; `macs` multiply-adds of one sample in convolutions and linear
    layers only (as the KD literature counts: no norms, activations, pooling or attention products)."""

    parameters: int
    macs: int


def cost(model: nn.Module, input_shape: Sequence[int]) -> Cost:
    """Cost of one sample of `input_shape` (without the batch axis), e.g. `cost(model, (3, 32, 32)).macs`.

    Runs on the meta device, so it allocates nothing; a model that cannot (it reads values) and is not there itself runs
    once on the CPU on zeros. The model is left as it was: mode, hooks, buffers.
    """
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        total += _macs(module, args[0], output)

    counted = [m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    handles = [module.register_forward_hook(count) for module in counted]
    try:
        try:
            trial_forward(model, input_shape, "meta")
        except Exception:
            if any(value.is_meta for _, value in _tensors(model)):
                raise
            total = 0
            trial_forward(model, input_shape, "cpu")
    finally:
        for handle in handles:
            handle.remove()
    return Cost(sum(p.numel() for p in model.parameters()), total)


def trial_forward(model: nn.Module, input_shape: Sequence[int], device: str) -> Any:
    """Output for one sample of zeros, in eval mode without gradients, on stand-ins for the model's tensors.

    The stand-ins are empty on `meta`, copies elsewhere: the model's own tensors and modes do not change.
    """
    state = {k: _stand_in(v, device) for k, v in _tensors(model)}
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.zeros(1, *input_shape, dtype=kind, device=device)
    with torch.no_grad(), evaluating(model):
        return functional_call(model, state, (x,), tie_weights=False)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _stand_in(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_like(tensor, device="meta") if device == "meta" else tensor.detach().to(device, copy=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(module, _ConvTransposeNd):
        return x.numel() * (module.out_channels // module.groups) * math.prod(module.kernel_size)
    if isinstance(module, _ConvNd):
        return y.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)
    assert isinstance(module, nn.Linear)
    return y.numel() * module.in_features


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over the state dict in name order: names, dtypes, shapes and bytes of every entry.

    Equal exactly when two models hold bit-equal weights and buffers under the same names, on any device.
    """
    digest = hashlib.sha256()
    feed: Callable[[Any], None] = digest.update
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            feed(f"{name}\0{value!r}\0".encode())
            continue
        feed(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        feed(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
