"""What losses of several branches of one model share: checks, the ramp of a term, means of logits."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raykd.errors import ConfigError, SignalError
from raykd.parts.checks import check_axes
from raykd.parts.numeric import full


def check_branches(where: str, logits: Sequence[Tensor], least: int = 2, **signals: tuple[Tensor, str]) -> None:
    """Checks `student_logits_branches`, each `[b c]`, and further signals beside them.

    Args:
        where: Slug of the loss, for the message.
        logits: One tensor a branch.
        least: Branches that the loss needs.
        signals: `name=(tensor, axes)` as check_axes takes them.

    Raises:
        SignalError: Too few branches, or shapes that do not fit together.

    Example:
        >>> import torch
        >>> check_branches("one", [torch.zeros(2, 3)])
        Traceback (most recent call last):
        raykd.errors.SignalError: student_logits_branches: expected at least 2 branches, got 1 (one). Set ...
    """
    if len(logits) < least:
        raise SignalError(
            f"student_logits_branches: expected at least {least} branches, got {len(logits)} ({where}). "
            "Set student.branching, or leave it out for the method's own."
        )
    named = {f"student_logits_branches[{i}]": (branch, "b c") for i, branch in enumerate(logits)}
    check_axes(where, **named, **signals)


def cross_entropies(logits: Sequence[Float[Tensor, "b c"]], labels: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Sum over branches of each one's cross-entropy with the labels, in nats."""
    return torch.stack([F.cross_entropy(full(branch), labels, reduction="none") for branch in logits]).sum(0)


def mean_logits(logits: Sequence[Float[Tensor, "b c"]]) -> Float[Tensor, "b c"]:
    """Mean over branches."""
    return torch.stack([full(branch) for branch in logits]).mean(0)


def sigmoid_ramp(epoch: float, epochs: float) -> float:
    """exp(-5 * (1 - epoch / epochs)^2) up to epoch `epochs`, then 1; always 1 if `epochs` is 0 (arXiv:1610.02242).

    Raises:
        ConfigError: `epochs` is below 0.

    Example:
        >>> [round(sigmoid_ramp(epoch, 80), 4) for epoch in (0, 40, 80, 160)]
        [0.0067, 0.2865, 1.0, 1.0]
    """
    if epochs < 0:
        raise ConfigError(f"ramp_epochs: expected a number of epochs of at least 0, got {epochs}.")
    return math.exp(-5.0 * (1.0 - epoch / epochs) ** 2) if epoch < epochs else 1.0
