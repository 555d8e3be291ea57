"""DCML: every classifier of a network, hidden ones too, follows every classifier of its peer."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full

NAME = "DCML"
PAPER = "Yao, Sun: Knowledge Transfer via Dense Cross-Layer Mutual-Distillation. ECCV 2020, arXiv:2008.07816"
SECTION = "2.2"
SCHEME = "online"
BRANCHING = {"kind": "exits", "at": "hidden"}


def dcml_loss(
    student_logits_branches: list[Float[Tensor, "b c"]],
    peer_logits_branches: list[Float[Tensor, "b c"]],
    labels: Int[Tensor, "b"],
    *,
    pairs: Literal["all", "same_stage", "cross_stage"] = "all",
    temperature: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises wrong classes of the hidden classifiers, and classifiers unlike those of the peer.

    With z_j the student's and p_i the peer's logits, 0 the last classifier and 1, 2, ... the hidden ones in order of depth:
    ce    = sum over j >= 1 of cross-entropy(z_j, label)
    same  = sum over i = j of temperature^2 * KL(softmax(p_i / temperature) || softmax(z_j / temperature))
    cross = the same sum over i != j

    Args:
        student_logits_branches: Scores of the student's classifiers, the last layer's first.
        peer_logits_branches: The same of the peer, fixed.
        labels: True classes.
        pairs: Which pairs of classifiers teach: all, those of one stage, or those of different stages.
        temperature: Softens both distributions, above 0; the paper's 1.
        weight: Factor of all terms, applied by the learner; the paper weighs them alike.
        ce_weight: Factor of the cross-entropy of the last classifier, applied by the learner.

    Returns:
        Terms ce, in nats, and same and cross, in nats times temperature^2, per sample; of the last two those that `pairs` asks
        for.

    Raises:
        SignalError: There is no hidden classifier, the shapes differ, or, for pairs of one stage, the numbers of classifiers.
        ConfigError: No such pairs.

    Example:
        >>> import torch
        >>> zero, sure = torch.zeros(1, 2), torch.tensor([[50.0, 0.0]])
        >>> dcml_loss([sure, zero], [sure, sure], torch.tensor([0]))
        {'ce': tensor([0.6931]), 'same': tensor([0.6931]), 'cross': tensor([0.6931])}

    References:
        arXiv:2008.07816

    Note:
        The authors' code is this loss for every pair, over classifiers of two networks with as many each; networks with other
        numbers of stages have more pairs one way than the other. All learn at once from targets of the same step. The
        heads' architectures are the model's (`branching`), not the authors'.
    """
    check_choice("dcml", pairs=pairs, known=("all", "same_stage", "cross_stage"))
    if pairs == "same_stage":
        same_length("dcml", student_logits_branches=student_logits_branches, peer_logits_branches=peer_logits_branches)
    for name, heads in (("student", student_logits_branches), ("peer", peer_logits_branches)):
        if len(heads) < 2:
            raise SignalError(
                f"{name}_logits_branches: expected the last and at least one hidden classifier, got {len(heads)} (dcml). "
                "Give the model exits."
            )
        for i, head in enumerate(heads):
            given = {"student_logits_branches[0]": (student_logits_branches[0], "b c")}
            check_axes("dcml", **given | {f"{name}_logits_branches[{i}]": (head, "b c")}, labels=(labels, "b"))
    ce = [F.cross_entropy(full(logits), labels, reduction="none") for logits in student_logits_branches[1:]]
    found: dict[str, list[Tensor]] = {"ce": ce, "same": [], "cross": []}
    for j, student in enumerate(student_logits_branches):
        for i, peer in enumerate(peer_logits_branches):
            term = "same" if i == j else "cross"
            if pairs == "all" or pairs.startswith(term):
                found[term].append(kd_loss(student, peer, temperature=temperature))
    return {term: torch.stack(values).sum(0) for term, values in found.items() if values}
