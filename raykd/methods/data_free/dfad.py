"""DFAD: a generator looks for images on which teacher and student differ; the student makes up for them."""

import torch
from jaxtyping import Float
from torch import Tensor

from raykd.parts.checks import check_axes, check_choice
from raykd.parts.numeric import full

NAME = "DFAD"
PAPER = "Fang et al.: Data-Free Adversarial Distillation. arXiv:1912.11006 (2019)"
SECTION = "3.5"
SCHEME = "data_free"
SYNTHESIS = {
    "generator": "dcgan",
    "options": {"last": "tanh_norm"},
    "latent": 256,
    "generator_steps": 1,
    "student_steps": 5,
    "lr": 1e-3,
    "scheduler": "multistep",
    "milestones": (100, 200),
    "student_mode": "train",
}


def dfad_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the discrepancy between student and teacher on made images.

    mean over classes of |teacher_logits - student_logits|

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes wanted, which this generator is not told; 0.

    Returns:
        Per sample, in units of logits.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> dfad_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -3.0]]))
        tensor([2.])

    References:
        arXiv:1912.11006, equations 3 and 4.

    Note:
        Logits are compared as they are: those of a student whose last layer has no bias cannot follow every teacher.
    """
    check_axes("dfad", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    return (full(teacher_logits) - full(student_logits)).abs().mean(1)


def images_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    form: str = "l1",
) -> Float[Tensor, "b"] | Float[Tensor, ""]:
    """Penalises images on which student and teacher agree.

    With d = mean over classes of |teacher_logits - student_logits|:
    l1: -d; log: -log(1 + mean of d over the batch)

    Args:
        student_logits: Class scores of the images.
        teacher_logits: The same of the teacher.
        form: `l1`, or `log`, whose gradient shrinks where they differ much (the paper's choice for segmentation).

    Returns:
        Per sample, in units of logits; `log` couples the batch.

    Raises:
        SignalError: The shapes differ.
        ConfigError: The form is unknown.

    Example:
        >>> images_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -3.0]]))
        tensor([-2.])
        >>> images_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -3.0]]), form="log")
        tensor(-1.0986)

    References:
        arXiv:1912.11006, equations 5 and 6.

    Note:
        We are not sure for which data sets the authors took `log`; their code for classification has -d. With several
        workers `log` is of each one's share of the batch.
    """
    check_choice("dfad", form=form, known=("l1", "log"))
    check_axes("dfad", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    apart = (full(teacher_logits) - full(student_logits)).abs().mean(1)
    return -apart if form == "l1" else -torch.log1p(apart.mean())
