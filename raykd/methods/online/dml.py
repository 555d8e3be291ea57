"""DML: peers that learn together follow each other's class probabilities."""

from jaxtyping import Float
from torch import Tensor

from raykd.methods.response.kd import kd_loss
from raykd.parts.checks import check_axes

NAME = "DML"
PAPER = "Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning. CVPR 2018, arXiv:1706.00384"
SECTION = "2.2"
SCHEME = "online"
SPARSE = True


def dml_loss(
    student_logits: Float[Tensor, "b *p c"],
    peer_logits: Float[Tensor, "b *p c"],
    *,
    temperature: float = 1.0,
    symmetric: bool = False,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's class distribution from a peer's.

    With p = softmax(logits / temperature):
    temperature^2 * KL(p_peer || p_student); symmetric: temperature^2 * (KL(p_peer || p_student) + KL(p_student || p_peer)) / 2

    Args:
        student_logits: Class scores, classes last; axes between batch and classes are positions.
        peer_logits: The same of the peer, fixed.
        temperature: Softens both distributions, above 0; the paper's 1.
        symmetric: Whether the mean of both directions counts.
        weight: Factor of the loss, applied by the learner; several peers share it, as the paper's 1 / (K - 1).
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Per sample, in nats times temperature^2; the mean over positions, if there are any.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> dml_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]]))
        tensor([0.6931])

    References:
        arXiv:1706.00384

    Note:
        The paper updates its networks in turn, each against the others' newest outputs; here all learn at once from outputs of
        the same step, as most public code does. OKDDip's code takes temperature 3 and does not detach the targets, so that a
        network is also pulled by how it teaches; that is not offered, since no gradient crosses between peers. PaddleClas
        has the symmetric form.
    """
    check_axes("dml", student_logits=(student_logits, "b *p c"), peer_logits=(peer_logits, "b *p c"))
    found = kd_loss(student_logits, peer_logits, temperature=temperature)
    if symmetric:
        found = (found + kd_loss(peer_logits, student_logits, temperature=temperature)) / 2
    return found
