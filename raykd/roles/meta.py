"""A generator that learns how to begin: for each batch a copy of it adapts, then it moves by what the copy did."""

from __future__ import annotations

import torch
from torch import nn


class Route:
    """The way of a generator during one batch, in place of a copy.

        start ── update, update, ... ──▶ adapted: makes the batch ── back ──▶ start, with the gradient of its own optimizer

    `fomaml` (first-order MAML): the sum of the gradients met on the way. `reptile`: start - adapted.

    Args:
        generator: where it begins now.
        how: fomaml | reptile.

    References:
        FastDFKD: Fang et al. AAAI 2022, arXiv:2112.06444. Reptile: Nichol et al., arXiv:1803.02999.
    """

    def __init__(self, generator: nn.Module, how: str) -> None:
        self.generator, self.how = generator, how
        self._start = {name: value.detach().clone() for name, value in generator.state_dict().items()}
        self._sums = [torch.zeros_like(p) for p in generator.parameters()]

    def note(self) -> None:
        """Takes down the gradient of an update."""
        for total, parameter in zip(self._sums, self.generator.parameters()):
            if parameter.grad is not None:
                total += parameter.grad

    @torch.no_grad()
    def back(self) -> None:
        """To the start, weights and statistics; each parameter's `grad` is what the generator that goes on moves by."""
        adapted = [p.detach().clone() for p in self.generator.parameters()]
        self.generator.load_state_dict(self._start)
        for parameter, end, total in zip(self.generator.parameters(), adapted, self._sums):
            parameter.grad = total if self.how == "fomaml" else parameter - end
