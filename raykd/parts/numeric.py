"""Small reductions that many losses share."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def full(signal: Tensor) -> Tensor:
    """At least float32: half-precision signals are widened, float32 and float64 stay."""
    return signal.float() if signal.dtype.is_floating_point and signal.element_size() < 4 else signal


def per_sample(values: Float[Tensor, "b *p"]) -> Float[Tensor, "b"]:
    """Mean over every axis but the first: one value a sample."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def to_smaller(
    student: Float[Tensor, "*s hs ws"], teacher: Float[Tensor, "*t ht wt"]
) -> tuple[Float[Tensor, "*s h w"], Float[Tensor, "*t h w"]]:
    """Average pools the larger of two maps to the size of the smaller, axis by axis."""
    size = (min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1]))
    return _pooled(student, size), _pooled(teacher, size)


def pearson(a: Tensor, b: Tensor, axis: int, eps: float = 1e-8) -> Tensor:
    """Pearson correlation along an axis; 0 where one side is constant."""
    a = F.normalize(a - a.mean(axis, keepdim=True), dim=axis, eps=eps)
    b = F.normalize(b - b.mean(axis, keepdim=True), dim=axis, eps=eps)
    return (a * b).sum(axis)


def _pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if tuple(maps.shape[-2:]) == size else F.adaptive_avg_pool2d(maps, size)
