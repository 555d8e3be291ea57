"""MT-Nguyen: one teacher becomes many, by leaving out some of its residual blocks, others at each iteration."""

from jaxtyping import Float
from torch import Tensor

from raykd.methods.response.kd import kd_loss
from raykd.parts.checks import check_axes

NAME = "MT-Nguyen"
PAPER = "Nguyen, Lee, Shim: Stochasticity and Skip Connection Improve Knowledge Transfer. EUSIPCO 2020 (printed 2021)"
SECTION = "3.1"
SCHEME = "offline"


def mt_nguyen_loss(
    student_logits: Float[Tensor, "b *p c"],
    teacher_logits_stochastic: Float[Tensor, "b *p c"],
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
    ce_weight: float = 0.1,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's softened class distribution from a sub-network's of the teacher.

    temperature^2 * KL(softmax(teacher_logits_stochastic / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores, classes last.
        teacher_logits_stochastic: The same of the teacher without the residual blocks that this batch leaves out; its
            options are drop_rate and drop_rule (raykd/models/stochastic.py).
        temperature: Softens both distributions, above 0; 4 as in kd.
        weight: Factor of the loss, applied by the learner; 0.9 as in kd.
        ce_weight: Factor of the cross-entropy, applied by the learner; 1 - weight.

    Returns:
        Per sample, in nats times temperature^2; the mean over positions, if there are any.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> mt_nguyen_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])

    References:
        https://openreview.net/forum?id=HklA93NYwS (the earlier version)

    Note:
        The blocks are drawn once a batch, by its keys: the same sub-network whoever answers, and at every retry. Unsure: the
        paper's probabilities; drop_rule="uniform" gives every block the same, "linear" less to early ones, as stochastic
        depth does (arXiv:1603.09382). The paper changes the teacher's structure and trains it with its stochastic blocks; a
        teacher of one's own trained so (timm: drop_path_rate) fits best, any residual network can be asked.
    """
    check_axes(
        "mt-nguyen",
        student_logits=(student_logits, "b *p c"),
        teacher_logits_stochastic=(teacher_logits_stochastic, "b *p c"),
    )
    return kd_loss(student_logits, teacher_logits_stochastic, temperature=temperature)
