"""DKD: KD's target-class part and non-target part, weighted apart."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes
from raykd.parts.numeric import full

NAME = "DKD"
PAPER = "Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation. CVPR 2022, arXiv:2203.08679"
SECTION = "1.1"
SCHEME = "offline"


def dkd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
    schedule: str = "linear(20)",
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises how sure of the target the student is, and how it shares out the rest, apart from each other.

    With p = softmax(logits / temperature), y = labels, and q = p without class y, renormalised:
    tckd = alpha * temperature^2 * KL((pT_y, 1 - pT_y) || (pS_y, 1 - pS_y)), nckd = beta * temperature^2 * KL(qT || qS)

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        labels: Target classes.
        temperature: Softens both distributions, above 0. 4 for CIFAR-100, 1 for ImageNet.
        alpha: Factor of tckd; the paper's 1.
        beta: Factor of nckd; the paper's 8 (ResNet-32x4), 6 (VGG-13, WRN-40-2) or 2 (ResNet-56, ResNet-110) for
            CIFAR-100, 0.5 (ResNet-18) or 2 (MobileNet) for ImageNet.
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner.
        schedule: Growth of the weight; the paper's 20 epochs of linear warm-up, 1 for ImageNet.

    Returns:
        Terms tckd and nckd per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> terms = dkd_loss(torch.tensor([[5.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.0, 1.0]]), torch.tensor([0]))
        >>> terms["tckd"].item() > 0, terms["nckd"].item()
        (True, 0.0)

    References:
        arXiv:2203.08679

    Note:
        KD = tckd / alpha + (1 - pT_y) * nckd / beta for each sample. The target class is left out exactly; the authors'
        code lowers its logit by 1000, which fails for logits of that size.
    """
    check_axes("dkd", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"), labels=(labels, "b"))
    student_pair, student_rest = _split(full(student_logits) / temperature, labels)
    teacher_pair, teacher_rest = _split(full(teacher_logits) / temperature, labels)
    return {
        "tckd": alpha * temperature**2 * _divergence(teacher_pair, student_pair),
        "nckd": beta * temperature**2 * _divergence(teacher_rest, student_rest),
    }


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, any other) [b 2] and of the other classes among themselves [b c-1]."""
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = others + (others >= labels[:, None])
    target, rest = logits.gather(1, labels[:, None]), logits.gather(1, others)
    pair = torch.cat([target, rest.logsumexp(1, keepdim=True)], dim=1)
    return F.log_softmax(pair, dim=1), F.log_softmax(rest, dim=1)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(1)
