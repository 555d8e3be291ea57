"""Kimura: few images and pseudo examples; these move to where student and reference differ, and the student imitates there."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes
from raykd.parts.numeric import full

NAME = "Pseudo example optimisation"
PAPER = "Kimura et al.: Few-shot learning of NNs from scratch by pseudo example optimization. BMVC 2018, arXiv:1802.03039"
SECTION = "3.4"
SCHEME = "data_free"
SYNTHESIS = {
    "generator": "pixels",
    "latent": 1,
    "real": 0.5,
    "generator_steps": 1,
    "student_steps": 10,
    "lr": 0.01,
    "clip": True,
}


def kimura_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's class distribution from the teacher's, on images read and pseudo examples.

    temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher, the paper's reference model.
        temperature: Softens both distributions, above 0.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels of the images read; pseudo examples have none.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> kimura_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])

    References:
        arXiv:1802.03039

    Note:
        Written from the abstract and accounts of others: we are not sure of the divergence, of any constant here or in
        SYNTHESIS, or of whether the student hears the labels too. The paper's reference model is a Gaussian process; here it
        is the job's teacher, trained on whatever the user chose. The pseudo examples, one for each place in a batch, begin as
        copies of training images, which is ours. The few images: `data.per_class`.
    """
    check_axes("kimura", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    return _divergence(student_logits, teacher_logits, temperature)


def images_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises pseudo examples on which the student is as the teacher: minus the divergence that the student minimises.

    Args:
        student_logits: Class scores of the pseudo examples.
        teacher_logits: The same of the teacher.
        temperature: Softens both distributions, above 0.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> images_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([-0.])

    References:
        arXiv:1802.03039

    Note:
        We are not sure of it: of the paper we know that pseudo examples move by the discrepancy of student and reference.
    """
    check_axes("kimura", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    return -_divergence(student_logits, teacher_logits, temperature)


def _divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    student = F.log_softmax(full(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)
