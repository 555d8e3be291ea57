"""PKT: the probability that one sample of the batch picks another as its neighbour."""

from jaxtyping import Float
from torch import Tensor

from raykd.parts.checks import check_axes
from raykd.parts.derived import similarity

NAME = "PKT"
PAPER = "Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer. ECCV 2018, arXiv:1803.10837"
SECTION = "1.2"
SCHEME = "offline"

EPSILON = 1e-7


def pkt_loss(
    student_embedding: Float[Tensor, "b ds"],
    teacher_embedding: Float[Tensor, "b dt"],
    *,
    weight: float = 30000.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Penalises neighbour probabilities within the batch that diverge from the teacher's.

    With c_ij = (cosine(v_i, v_j) + 1) / 2 and p_ij = c_ij / sum_k c_ik of each side's embeddings v:
    mean over all i, j of pT_ij * log(pT_ij / pS_ij)

    Args:
        student_embedding: Pooled features before the classifier.
        teacher_embedding: The same of the teacher; its width may differ.
        weight: Factor of the loss, applied by the learner; 30000 goes with the mean over pairs.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Per batch (it couples the batch): the mean over samples of KL(pT_i || pS_i), in nats, divided by the batch size.

    Raises:
        SignalError: The batches differ in size.

    Example:
        >>> import torch
        >>> pkt_loss(torch.eye(3), torch.eye(3) * 5)
        tensor(0.)

    References:
        arXiv:1803.10837

    Note:
        The paper sums over pairs; the mean is the authors' code and goes with the customary weight. Both probabilities
        carry 1e-7 inside the logarithm. Pairs (i, i) count, as in the code.
    """
    check_axes("pkt", student_embedding=(student_embedding, "b ds"), teacher_embedding=(teacher_embedding, "b dt"))
    student, teacher = _probabilities(student_embedding), _probabilities(teacher_embedding)
    return (teacher * ((teacher + EPSILON) / (student + EPSILON)).log()).mean()


def _probabilities(embedding: Tensor) -> Tensor:
    closeness = (similarity(embedding) + 1) / 2
    return closeness / closeness.sum(1, keepdim=True)
