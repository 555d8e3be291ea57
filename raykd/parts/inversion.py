"""Terms by which images are made of what a trained network remembers; shared by methods that invert networks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes
from raykd.parts.numeric import full


def statistics_gap(where: str, norms: Sequence[Float[Tensor, "4 _c"]]) -> Float[Tensor, ""]:
    """How far a batch's statistics are from those that batch norms keep: sum over the norms of
    ||mean - running mean|| + ||variance - running variance||.

    Args:
        where: Slug of the loss, for the message.
        norms: Mean, variance, running mean and running variance at each.

    Raises:
        SignalError: An entry is of another shape.

    Example:
        >>> statistics_gap("cmi", [torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [1.0, 3.0]])])
        tensor(7.)

    References:
        Yin et al.: Dreaming to Distill (DeepInversion). CVPR 2020, arXiv:1912.08795, equation 4; the norms are not squared,
        as in public code.
    """
    four = torch.empty(4, device="meta")
    check_axes(where, rows=(four, "four"), **{f"teacher_norms[{i}]": (norm, f"four c{i}") for i, norm in enumerate(norms)})
    gaps = [torch.linalg.vector_norm(full(norm)[:2] - full(norm)[2:], dim=1).sum() for norm in norms]
    return torch.stack(gaps).sum()


def where_they_agree(student_logits: Float[Tensor, "b c"], teacher_logits: Float[Tensor, "b c"]) -> Float[Tensor, "b"]:
    """KL(softmax(teacher_logits) || softmax(student_logits)) of images in which both see the same class, in nats; else 0.

    Example:
        >>> where_they_agree(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[9.0, 0.0], [9.0, 0.0]]))
        tensor([0.1259, 0.0000])

    References:
        Fang et al.: Contrastive Model Inversion (CMI). arXiv:2105.08584.
    """
    student, teacher = F.log_softmax(full(student_logits), dim=1), F.log_softmax(full(teacher_logits), dim=1)
    same = student.argmax(1) == teacher.argmax(1)
    return torch.where(same, (teacher.exp() * (teacher - student)).sum(1), 0.0)


def softened(where: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Float[Tensor, "b"]:
    """temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature)), per sample, in nats
    times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> softened("cmi", torch.zeros(1, 2), torch.zeros(1, 2), 20.0)
        tensor([0.])
    """
    check_axes(where, student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    student = F.log_softmax(full(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)
