"""SP: samples alike for the teacher are alike for the student."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes
from raykd.parts.numeric import full

NAME = "SP"
PAPER = "Tung, Mori: Similarity-Preserving Knowledge Distillation. ICCV 2019, arXiv:1907.09682"
SECTION = "1.3"
SCHEME = "offline"
LAYERS = ("stage-1",)


def sp_loss(
    student_gram: Float[Tensor, "b b"],
    teacher_gram: Float[Tensor, "b b"],
    *,
    weight: float = 3000.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Penalises similarities within the batch that differ from the teacher's.

    With g the gram whose rows have unit length: sum over all pairs of (gS - gT)^2 / b^2

    Args:
        student_gram: Inner products of the flattened activations of every two samples.
        teacher_gram: The same of the teacher.
        weight: Factor of the loss, the paper's gamma, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Per batch (it couples the batch), without unit.

    Raises:
        SignalError: The grams are not square or differ in size.

    Example:
        >>> import torch
        >>> sp_loss(torch.eye(2), torch.tensor([[3.0, 4.0], [4.0, 3.0]]))
        tensor(0.4000)

    References:
        arXiv:1907.09682

    Note:
        Rows have unit Euclidean length, as in the paper; one public reimplementation divides by the sum of magnitudes.
    """
    check_axes("sp", student_gram=(student_gram, "b b"), teacher_gram=(teacher_gram, "b b"))
    return (F.normalize(full(student_gram), dim=1) - F.normalize(full(teacher_gram), dim=1)).square().mean()
