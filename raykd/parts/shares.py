"""How much each of several teachers counts, as a loss's option says it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from raykd.errors import ConfigError


def shares(where: str, given: Sequence[float], teachers: int) -> Float[Tensor, "m"]:
    """Weights of the teachers, adding up to 1, as float64 on the CPU; equal ones where none are given.

    Args:
        where: Slug of the loss, for the message.
        given: One number a teacher in the loss's order, at least 0; empty: all alike.
        teachers: How many there are.

    Raises:
        ConfigError: There are more or fewer numbers than teachers, one is negative, or all are 0.

    Example:
        >>> shares("mt-fukuda", (3.0, 1.0), 2)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    if given and (len(given) != teachers or min(given) < 0 or sum(given) <= 0):
        raise ConfigError(
            f"teacher_weights: expected {teachers} numbers of at least 0, not all 0, got {tuple(given)} ({where}). "
            "Give one for each teacher the loss listens to, in its order."
        )
    weights = torch.tensor(given or (1.0,) * teachers, dtype=torch.float64)
    return weights / weights.sum()
