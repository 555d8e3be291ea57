"""OKDDip: peers each learn from an own, attended mixture of the peers; a leader learns from their mean."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.branches import check_branches, cross_entropies, sigmoid_ramp
from raykd.parts.checks import check_choice
from raykd.parts.numeric import full

NAME = "OKDDip"
PAPER = "Chen, Mei, Wang, Feng, Chen: Online Knowledge Distillation with Diverse Peers. AAAI 2020, arXiv:1912.00350"
SECTION = "2.2"
SCHEME = "online"
BRANCHING = {"kind": "split", "count": 4}


def okddip_loss(
    student_logits_branches: list[Float[Tensor, "b c"]],
    attention: Float[Tensor, "b p p"],
    labels: Int[Tensor, "b"],
    epoch: int,
    *,
    temperature: float = 3.0,
    detach: Literal["none", "logits"] = "none",
    ramp_epochs: float = 80.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises branches that miss the labels, peers unlike their mixtures, and a leader unlike the mean of the peers.

    Branch 0 is the leader, z_1.. are the logits of the p peers; with t_i = sum over peers j of attention_ij * z_j and
    P(z) = softmax(z / temperature):
    ce = sum over all branches of CE(z, labels), peers = ramp * temperature^2 * sum over peers i of KL(P(t_i) || P(z_i)),
    leader = ramp * temperature^2 * KL(P(mean of the z_i) || P(z_0))

    Args:
        student_logits_branches: Class scores of each branch, the leader's first.
        attention: What peer i (second axis) takes of peer j (third axis); each row sums to 1.
        labels: Of the batch.
        epoch: From 0.
        temperature: Softens the distributions, above 0; the paper's 3.
        detach: `none`: gradients flow into the targets, as in the authors' code; `logits`: the logits within the targets are
            constants, and the attention alone is trained by them.
        ramp_epochs: peers and leader rise as exp(-5 (1 - epoch / ramp_epochs)^2) until this epoch; 0: full at once.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of one more cross-entropy of the leader, applied by the learner; 0, it is in the loss.

    Returns:
        Term ce per sample, in nats; peers and leader in nats times temperature^2.

    Raises:
        SignalError: Fewer than three branches, attention of another number of peers, or the shapes differ.
        ConfigError: No such way to detach.

    Example:
        >>> import torch
        >>> even = torch.zeros(1, 2)
        >>> terms = okddip_loss([even, even, even], torch.full((1, 2, 2), 0.5), torch.tensor([0]), 80)
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'ce': 2.0794, 'peers': 0.0, 'leader': 0.0}

    References:
        arXiv:1912.00350

    Note:
        The branch form, with three peers and a leader that part after the second to last stage; the authors' form of
        separate networks is not offered. There is no third way to detach: the attention learns from its targets alone. The
        leader is deployed.
    """
    check_choice("okddip", detach=detach, known=("none", "logits"))
    check_branches("okddip", student_logits_branches, 3, labels=(labels, "b"), attention=(attention, "b p p"))
    leader, *peers = student_logits_branches
    if attention.shape[1] != len(peers):
        raise SignalError(f"attention: expected {len(peers)} peers beside the leader, got {attention.shape[1]} (okddip).")
    heard = torch.stack([full(peer) for peer in peers], dim=1)
    heard = heard.detach() if detach == "logits" else heard
    targets = full(attention) @ heard
    taught = [kd_loss(peer, target, temperature=temperature) for peer, target in zip(peers, targets.unbind(1))]
    ramp = sigmoid_ramp(epoch, ramp_epochs)
    return {
        "ce": cross_entropies(student_logits_branches, labels),
        "peers": ramp * sum(taught[1:], taught[0]),
        "leader": ramp * kd_loss(leader, heard.mean(1), temperature=temperature),
    }


class Module(nn.Module):
    """Two linear layers that all peers share, and the loss: attention_ij = softmax over j of query(h_i) . key(h_j).

    Args:
        student_embedding_branches: Shapes [d], one a branch; those of the peers must be alike.
        reduction: Queries and keys have d / reduction axes, at least 1; 8 as in the authors' code.
    """

    def __init__(self, student_embedding_branches: list[Shape], *, reduction: int = 8) -> None:
        super().__init__()
        widths = {shape[0] for shape in student_embedding_branches[1:]}
        if len(widths) != 1:
            raise SignalError(f"student_embedding_branches: expected peers of one width, got {sorted(widths)} (okddip).")
        width = widths.pop()
        self.query = nn.Linear(width, max(width // reduction, 1), bias=False)
        self.key = nn.Linear(width, max(width // reduction, 1), bias=False)

    def forward(
        self,
        student_logits_branches: list[Float[Tensor, "b c"]],
        student_embedding_branches: list[Float[Tensor, "b _d"]],
        labels: Int[Tensor, "b"],
        epoch: int,
        *,
        temperature: float,
        detach: Literal["none", "logits"],
        ramp_epochs: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss with the attention of these embeddings; the leader's is not read."""
        peers = torch.stack([full(embedding) for embedding in student_embedding_branches[1:]], dim=1)
        attention = F.softmax(self.query(peers) @ self.key(peers).transpose(1, 2), dim=2)
        options = {"temperature": temperature, "ramp_epochs": ramp_epochs}
        return okddip_loss(student_logits_branches, attention, labels, epoch, detach=detach, **options)
