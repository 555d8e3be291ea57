"""RKD: distances and angles between the samples of a batch."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raykd.parts.checks import check_axes
from raykd.parts.numeric import full

NAME = "RKD"
PAPER = "Park, Kim, Lu, Cho: Relational Knowledge Distillation. CVPR 2019, arXiv:1904.05068"
SECTION = "1.3"
SCHEME = "offline"

CHUNK = 16


def rkd_loss(
    student_embedding: Float[Tensor, "b ds"],
    teacher_embedding: Float[Tensor, "b dt"],
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, ""]]:
    """Penalises distances between pairs and angles between triplets of samples that differ from the teacher's.

    With huber the smooth L1 function, d_ij = ||v_i - v_j|| / mean of the distances above 0, and
    a_ijk = cosine(v_i - v_j, v_k - v_j) of each side's embeddings v:
    distance = distance_weight * mean over i, j of huber(dS_ij - dT_ij),
    angle = angle_weight * mean over i, j, k of huber(aS_ijk - aT_ijk)

    Args:
        student_embedding: Pooled features before the classifier.
        teacher_embedding: The same of the teacher; its width may differ.
        distance_weight: Factor of distance; 25 for classification (the paper's metric learning: 1).
        angle_weight: Factor of angle; 50 for classification (the paper's metric learning: 2).
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Terms distance and angle per batch (they couple the batch), without unit.

    Raises:
        SignalError: The batches differ in size.

    Example:
        >>> import torch
        >>> corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> {term: round(value.item(), 5) for term, value in rkd_loss(corner, 2 * corner).items()}
        {'distance': 0.0, 'angle': 0.0}

    References:
        arXiv:1904.05068

    Note:
        Means run over all b^2 pairs and b^3 triplets, those with equal members too (they are 0 on both sides), as in the
        authors' code. Angles are worked off a few vertices at a time and again in the backward pass, so that memory
        grows with b times (b + width), not with b^3.
    """
    check_axes("rkd", student_embedding=(student_embedding, "b ds"), teacher_embedding=(teacher_embedding, "b dt"))
    student, teacher = full(student_embedding), full(teacher_embedding)
    return {
        "distance": distance_weight * F.smooth_l1_loss(_distances(student), _distances(teacher)),
        "angle": angle_weight * _angle(student, teacher),
    }


def _distances(v: Tensor) -> Tensor:
    """Distances of all pairs over the mean of those above 0."""
    apart = torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist")
    mean = apart.sum() / (apart > 0).sum().clamp_min(1)
    return apart / mean.clamp_min(torch.finfo(v.dtype).tiny)


def _angle(student: Tensor, teacher: Tensor) -> Tensor:
    total = student.new_zeros(())
    for start in range(0, len(student), CHUNK):
        vertices = slice(start, start + CHUNK)
        total = total + checkpoint(_vertex_angles, student, teacher, vertices, use_reentrant=False, preserve_rng_state=False)
    return total / len(student) ** 3


def _vertex_angles(student: Tensor, teacher: Tensor, vertices: slice) -> Tensor:
    """Sum of huber over all angles at some vertices."""
    return F.smooth_l1_loss(_cosines(student, vertices), _cosines(teacher, vertices), reduction="sum")


def _cosines(v: Tensor, vertices: slice) -> Tensor:
    sides = F.normalize(v[None] - v[vertices, None], dim=2)
    return sides @ sides.transpose(1, 2)
