"""Derived signals: knowledge reduced where it is born, so that only the reduced tensor travels.

A public function here is a signal of its own name; its first parameter names the signal it is computed from. Keyword-only
parameters are options of every loss that takes the signal. All leave in at least float32. A signal marked `@per_batch`
depends on the batch as a whole: it may travel only if the request is the worker's whole batch, and a store keeps its parent.
"""

import inspect
import sys
from collections.abc import Callable
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.numeric import full

PARENTS = ("feature", "embedding", "logits", "input_grad")

_Signal = TypeVar("_Signal", bound=Callable[..., Tensor])


def per_batch(fn: _Signal) -> _Signal:
    """Marks a derived signal that couples the batch."""
    fn.per_batch = True  # type: ignore[attr-defined]
    return fn


def attention(feature: Float[Tensor, "b c h w"], *, power: float = 2.0) -> Float[Tensor, "b h w"]:
    """Activation-based attention map: mean over channels of |feature|^power, not normalised.

    Args:
        feature: Activations of a layer.
        power: Exponent; 2 as in Zagoruyko and Komodakis. Larger ones weigh the strongest places more.

    Returns:
        One map a sample, C times smaller than its feature.

    Example:
        >>> import torch
        >>> attention(torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]]))
        tensor([[[5., 2.]]])
    """
    return full(feature).abs().pow(power).mean(1)


@per_batch
def gram(feature: Float[Tensor, "b *p"]) -> Float[Tensor, "b b"]:
    """Inner products between the flattened activations of every two samples of the batch.

    Example:
        >>> import torch
        >>> gram(torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]]))
        tensor([[5., 6.],
                [6., 9.]])
    """
    rows = full(feature).flatten(1)
    return rows @ rows.T


@per_batch
def similarity(embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """Cosine between the embeddings of every two samples of the batch.

    Example:
        >>> import torch
        >>> similarity(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    rows = F.normalize(full(embedding), dim=1)
    return rows @ rows.T


def derived_signals() -> dict[str, Callable[..., Tensor]]:
    """Every derived signal by name: the public functions of this file whose first parameter names a signal."""
    functions = inspect.getmembers(sys.modules[__name__], inspect.isfunction)
    own = {name: fn for name, fn in functions if fn.__module__ == __name__ and not name.startswith("_")}
    return {name: fn for name, fn in own.items() if next(iter(inspect.signature(fn).parameters), "") in PARENTS}
