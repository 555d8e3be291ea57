"""KD-MSE: the student's raw logits follow the teacher's."""

from jaxtyping import Float
from torch import Tensor

from raykd.parts.checks import check_axes
from raykd.parts.numeric import full, per_sample

NAME = "KD-MSE"
PAPER = (
    "Kim, Oh, Kim, Cho, Yun: Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge "
    "Distillation. IJCAI 2021, arXiv:2105.08919"
)
SECTION = "1.1"
SCHEME = "offline"


def kd_mse_loss(
    student_logits: Float[Tensor, "b *p c"],
    teacher_logits: Float[Tensor, "b *p c"],
    *,
    weight: float = 0.9,
    ce_weight: float = 0.1,
) -> Float[Tensor, "b"]:
    """Penalises the squared difference of the logits; what KD tends to, up to a factor, as its temperature grows.

    mean over classes of (student_logits - teacher_logits)^2

    Args:
        student_logits: Class scores, classes last; axes between batch and classes are positions (words, pixels).
        teacher_logits: The same of the teacher.
        weight: Factor of the loss, applied by the learner; 0.9 as for KD.
        ce_weight: Factor of the cross-entropy, applied by the learner; 1 - weight.

    Returns:
        Per sample, in squared logits; the mean over positions, if there are any.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> kd_mse_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([5.])

    References:
        arXiv:2105.08919

    Note:
        The paper writes the squared norm, which is the number of classes times this mean.
    """
    check_axes("kd-mse", student_logits=(student_logits, "b *p c"), teacher_logits=(teacher_logits, "b *p c"))
    return per_sample((full(student_logits) - full(teacher_logits)).square().mean(-1))
