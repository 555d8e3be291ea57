"""HSSAKD, online: peers share what each of their stages says of class and rotation together."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.checks import check_axes, same_length
from raykd.parts.numeric import full

NAME = "HSSAKD"
PAPER = (
    "Yang, An, Cai, Xu: Knowledge Distillation Using Hierarchical Self-Supervision Augmented Distribution. TNNLS 2022, "
    "arXiv:2109.03075"
)
SECTION = "2.2"
SCHEME = "online"
BRANCHING = {"kind": "exits", "at": "stages", "classes": 4}


def hssakd_loss(
    student_logits_branches_rotations: list[Float[Tensor, "b 4 _k"]],
    peer_logits_branches_rotations: list[Float[Tensor, "b 4 _k"]],
    labels: Int[Tensor, "b"],
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises wrong classes, wrong pairs of class and rotation, and distributions over either unlike the peer's.

    With x_j the image turned by j quarters, z the classifier, g_l the joint classifier after stage l, q those of the peer, and
    T = temperature:
    ce       = cross-entropy(z(x_0), label)
    joint_ce = sum over l of the mean over j of cross-entropy(g_l(x_j), 4 * label + j)
    kl       = mean over j of T^2 * KL(softmax(z_q(x_j) / T) || softmax(z(x_j) / T))
    joint_kl = sum over l of the mean over j of T^2 * KL(softmax(q_l(x_j) / T) || softmax(g_l(x_j) / T))

    Args:
        student_logits_branches_rotations: Of each image turned by 0, 90, 180 and 270 degrees: first the class scores [b 4 c],
            then those of each joint classifier [b 4 4c], class * 4 + rotation.
        peer_logits_branches_rotations: The same of the peer, fixed.
        labels: True classes.
        temperature: Softens the distributions of kl and joint_kl, above 0; the authors' 3.
        weight: Factor of all terms, applied by the learner; the authors weigh them alike.
        ce_weight: Factor of one more cross-entropy, applied by the learner; 0, since term ce is the cross-entropy.

    Returns:
        Terms ce and joint_ce, in nats, and kl and joint_kl, in nats times temperature^2, per sample.

    Raises:
        SignalError: The lists differ in length, there is no joint classifier, or the shapes do not fit together.

    Example:
        >>> import torch
        >>> one, joint = torch.zeros(1, 4, 2), torch.zeros(1, 4, 8)
        >>> hssakd_loss([one, joint], [one, joint], torch.tensor([1]))
        {'ce': tensor([0.6931]), 'joint_ce': tensor([2.0794]), 'kl': tensor([0.]), 'joint_kl': tensor([0.])}

    References:
        arXiv:2109.03075; offline: arXiv:2107.13715

    Note:
        The authors' code is this loss. The classifier learns labels of upright images only, and of turned ones what the peer
        says. Statistics of batch norm are those of all rotations. A batch is four times as many images; the authors take 64.
    """
    own, theirs = student_logits_branches_rotations, peer_logits_branches_rotations
    same_length("hssakd", student_logits_branches_rotations=own, peer_logits_branches_rotations=theirs)
    _check(own, theirs, labels)
    joint_labels = 4 * labels[:, None] + torch.arange(4, device=labels.device)
    joint_ce = [F.cross_entropy(full(g).transpose(1, 2), joint_labels, reduction="none").mean(1) for g in own[1:]]
    apart = [kd_loss(g, q, temperature=temperature) for g, q in zip(own, theirs)]
    return {
        "ce": F.cross_entropy(full(own[0][:, 0]), labels, reduction="none"),
        "joint_ce": torch.stack(joint_ce).sum(0),
        "kl": apart[0],
        "joint_kl": torch.stack(apart[1:]).sum(0),
    }


def _check(own: list[Tensor], theirs: list[Tensor], labels: Tensor) -> None:
    if len(own) < 2:
        raise SignalError(
            "student_logits_branches_rotations: expected the classifier and at least one joint classifier, got one entry "
            "(hssakd). Give the model exits with 4 outputs a class."
        )
    for i, (g, q) in enumerate(zip(own, theirs)):
        named = {f"student_logits_branches_rotations[{i}]": (g, "b r k"), f"peer_logits_branches_rotations[{i}]": (q, "b r k")}
        check_axes("hssakd", **named, labels=(labels, "b"))
        wanted = (4, (4 if i else 1) * own[0].shape[2])
        if tuple(g.shape[1:]) != wanted:
            raise SignalError(
                f"student_logits_branches_rotations[{i}]: expected 4 rotations and {wanted[1]} outputs, got "
                f"{list(g.shape[1:])} (hssakd). Give the model exits with 4 outputs a class."
            )
