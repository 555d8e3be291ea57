"""DIST: class probabilities correlate with the teacher's, along each sample and along each class."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes
from raykd.parts.numeric import full, pearson

NAME = "DIST"
PAPER = "Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher. NeurIPS 2022, arXiv:2205.10536"
SECTION = "1.1"
SCHEME = "offline"


def dist_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 4.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "..."]]:
    """Penalises class probabilities that do not correlate with the teacher's; their scale and offset are free.

    With p = softmax(logits / temperature) [b c] and rho the Pearson correlation:
    inter = beta * temperature^2 * (1 - rho(pS[i, :], pT[i, :])) for each sample i,
    intra = gamma * temperature^2 * mean over classes j of (1 - rho(pS[:, j], pT[:, j]))

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        temperature: Softens both distributions, above 0. 4 for CIFAR-100, 1 for ImageNet.
        beta: Factor of inter; 1 as in the authors' code.
        gamma: Factor of intra; 1 as in the authors' code.
        weight: Factor of both terms, applied by the learner; some public recipes use 2.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Term inter per sample; term intra per batch: it couples the batch, so that its size and sharding matter. Each lies
        between 0 and 2 times its factors.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
        >>> {term: value.mean().abs().lt(1e-5).item() for term, value in dist_loss(logits, logits).items()}
        {'inter': True, 'intra': True}

    References:
        arXiv:2205.10536

    Note:
        Where a row or column is constant its correlation counts as 0.
    """
    check_axes("dist", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    student = F.softmax(full(student_logits) / temperature, dim=1)
    teacher = F.softmax(full(teacher_logits) / temperature, dim=1)
    return {
        "inter": beta * temperature**2 * (1 - pearson(student, teacher, axis=1)),
        "intra": gamma * temperature**2 * (1 - pearson(student, teacher, axis=0)).mean(),
    }
