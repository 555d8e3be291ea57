"""MCL: peers contrast the classes in their own embeddings and in each other's, and share what they find."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.checks import check_axes, check_choice
from raykd.parts.numeric import full

NAME = "MCL"
PAPER = "Yang, An, Cai, Xu: Mutual Contrastive Learning for Visual Representation Learning. AAAI 2022, arXiv:2104.12565"
SECTION = "2.2"
SCHEME = "online"
BRANCHING = {"kind": "heads", "outputs": 128}


def mcl_loss(
    student_logits_branches: list[Float[Tensor, "b _o"]],
    peer_logits_branches: list[Float[Tensor, "b _o"]],
    labels: Int[Tensor, "b"],
    *,
    alpha: float = 0.1,
    gamma: float = 1.0,
    beta: float = 0.1,
    lam: float = 1.0,
    tau: float = 0.1,
    temperature: float = 3.0,
    counterpart: Literal["excluded", "included"] = "excluded",
    logit_distill: bool = False,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "..."]]:
    """Penalises classes that lie close together within and across two networks, and contrasts unlike the peer's.

    With a and p the student's and the peer's embeddings of unit length, S_xy[i, j] = x_i . y_j / tau, T = temperature,
    con(S) = mean over anchors i of the mean over positives j (j != i of i's class) of
    -log(exp(S[i, j]) / sum over k != i of exp(S[i, k])),
    and kl(S || R) = T^2 * mean over i of KL(softmax(S[i] / T) || softmax(R[i] / T)), the first of them fixed:
    vcl      = alpha * con(S_aa)
    soft_vcl = gamma * kl(S_pp || S_aa)
    icl      = beta * (con(S_ap) + con(S_pa))
    soft_icl = lam * (kl(S_pa || S_ap) + kl(S_ap || S_pa))
    kd       = T^2 * KL(softmax((z_a + z_p) / 2T) || softmax(z_a / T)), z the logits; only with logit_distill

    Args:
        student_logits_branches: The class scores, then the embeddings before they are brought to unit length.
        peer_logits_branches: The same of the peer, fixed.
        labels: True classes.
        alpha: Factor of vcl; 0.1, as gamma, beta and lam in the authors' scripts.
        gamma: Factor of soft_vcl.
        beta: Factor of icl.
        lam: Factor of soft_icl, the paper's lambda.
        tau: Temperature of the similarities, above 0; the paper's 0.1.
        temperature: Softens the distributions of soft_vcl, soft_icl and kd, above 0; the paper's 3.
        counterpart: Whether the anchor's own image in the other network's embeddings is one of icl's positives and candidates.
        logit_distill: Whether there is kd.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of the cross-entropy of the class scores, applied by the learner.

    Returns:
        Terms vcl and icl, in nats, and soft_vcl and soft_icl, in nats times temperature^2: each couples the batch. Term kd per
        sample, in nats times temperature^2.

    Raises:
        SignalError: There is no second entry, or the shapes do not fit together.
        ConfigError: No such counterpart.

    Example:
        >>> import torch
        >>> network = [torch.zeros(3, 2), torch.eye(3)[[0, 0, 1]]]
        >>> found = mcl_loss(network, network, torch.tensor([0, 0, 1]), tau=1.0)
        >>> {term: round(float(value), 4) for term, value in found.items()}
        {'vcl': 0.0313, 'soft_vcl': 0.0, 'icl': 0.0627, 'soft_icl': 0.0}

    References:
        arXiv:2104.12565; authors' code: github.com/winycg/MCL

    Note:
        Both directions of icl and soft_icl are there because both carry gradient to the student in the paper's joint loss; what
        they send to the peer is the peer's own loss. Several peers share the weight: the paper sums over them, so its weight is
        their number. `excluded` is the authors' code, `included` (the other network's view of the same image is a positive)
        how a figure of the paper may be read. The rows of soft_vcl and soft_icl hold every sample, the anchor's own too, as in
        the code, whose default tau is 0.07. An anchor whose class it alone has in the batch is left out of con; the authors
        draw two images of a class into every batch. kd is the code's for two networks; with more, the code teaches the last one
        alone, from the mean of all. All peers must hear the same samples: `exchange.shards = "same"`.
    """
    check_choice("mcl", counterpart=counterpart, known=("excluded", "included"))
    for name, branches in (("student", student_logits_branches), ("peer", peer_logits_branches)):
        if len(branches) != 2:
            raise SignalError(
                f"{name}_logits_branches: expected class scores and embeddings, got {len(branches)} (mcl). "
                "Set branching of kind heads, or leave it out for the method's own."
            )
        for i, (branch, axes) in enumerate(zip(branches, ("b c", "b d"))):
            given = {f"student_logits_branches[{i}]": (student_logits_branches[i], axes)}
            check_axes("mcl", labels=(labels, "b"), **given | {f"{name}_logits_branches[{i}]": (branch, axes)})
    own = F.normalize(full(student_logits_branches[1]), dim=1)
    theirs = F.normalize(full(peer_logits_branches[1].detach()), dim=1)
    aa, ap, pa, pp = (x @ y.T / tau for x, y in ((own, own), (own, theirs), (theirs, own), (theirs, theirs)))
    whole = counterpart == "included"
    found = {
        "vcl": alpha * _contrast(aa, labels),
        "soft_vcl": gamma * kd_loss(aa, pp, temperature=temperature).mean(),
        "icl": beta * (_contrast(ap, labels, whole) + _contrast(pa, labels, whole)),
        "soft_icl": lam
        * (kd_loss(ap, pa.detach(), temperature=temperature) + kd_loss(pa, ap.detach(), temperature=temperature)).mean(),
    }
    if logit_distill:
        mean = (full(student_logits_branches[0]).detach() + full(peer_logits_branches[0].detach())) / 2
        found["kd"] = kd_loss(student_logits_branches[0], mean, temperature=temperature)
    return found


def _contrast(scores: Float[Tensor, "b b"], labels: Int[Tensor, "b"], counterpart: bool = False) -> Float[Tensor, ""]:
    """Mean over anchors that have positives of -log of the positives' softmax, its mean over positives; 0 without any."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = labels[:, None] == labels
    if not counterpart:
        positive = positive & ~itself
        scores = scores.masked_fill(itself, torch.finfo(scores.dtype).min)
    count = positive.sum(1)
    gaps = scores.logsumexp(1, keepdim=True) - scores
    values = torch.where(positive, gaps, 0.0).sum(1) / count.clamp_min(1)
    return values.sum() / (count > 0).sum().clamp_min(1)
