"""Blocks of a network between layers, and a linear map of channels that goes into the layers that read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """A part of a network between two layers.

    Attributes:
        modules: those that run in it, each with all that is in it; in no other block.
        readers: the convolutions and linear layers that alone read what enters; none where something else reads it too, and of
            the first block.
    """

    modules: tuple[nn.Module, ...]
    readers: tuple[nn.Module, ...] = ()


@torch.no_grad()
def fold(readers: Iterable[nn.Module], matrix: Float[Tensor, "i j"]) -> None:
    """From now on these layers answer to channels x as they did to matrix @ x."""
    for reader in readers:
        weight: Tensor = reader.weight  # type: ignore[assignment]
        weight.copy_(torch.einsum("oi...,ij->oj...", weight, matrix.to(weight)))
