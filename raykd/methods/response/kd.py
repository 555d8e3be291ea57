"""KD: the student's softened class probabilities follow the teacher's."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes
from raykd.parts.numeric import full, per_sample

NAME = "KD"
PAPER = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network. arXiv:1503.02531 (2015)"
SECTION = "1.1"
SCHEME = "offline"
SPARSE = True


def kd_loss(
    student_logits: Float[Tensor, "b *p c"],
    teacher_logits: Float[Tensor, "b *p c"],
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
    ce_weight: float = 0.1,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's softened class distribution from the teacher's.

    temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores, classes last; axes between batch and classes are positions (words, pixels).
        teacher_logits: The same of the teacher.
        temperature: Softens both distributions, above 0. 4 is customary for CIFAR-100, 1 for ImageNet.
        weight: Factor of the loss, applied by the learner; 0.9 as in the CIFAR-100 literature.
        ce_weight: Factor of the cross-entropy, applied by the learner; 1 - weight.

    Returns:
        Per sample, in nats times temperature^2; the mean over positions, if there are any.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> kd_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])

    References:
        arXiv:1503.02531

    Note:
        Temperature^2 is the paper's, to keep the gradient's size. The mean over the batch gives the usual "batchmean";
        averaging over classes too, as some public code does, divides the loss by their number.
    """
    check_axes("kd", student_logits=(student_logits, "b *p c"), teacher_logits=(teacher_logits, "b *p c"))
    student = F.log_softmax(full(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(full(teacher_logits) / temperature, dim=-1)
    return temperature**2 * per_sample((teacher.exp() * (teacher - student)).sum(-1))
