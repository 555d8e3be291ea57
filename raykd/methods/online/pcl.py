"""PCL: branches that see their own augmentations learn from their ensemble and from each other's averaged copies."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.branches import check_branches, cross_entropies, sigmoid_ramp
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full

NAME = "PCL"
PAPER = "Wu, Gong: Peer Collaborative Learning for Online Knowledge Distillation. AAAI 2021, arXiv:2006.04147"
SECTION = "2.2"
SCHEME = "online"
BRANCHING = {"kind": "split", "count": 3, "views": "own"}


def pcl_loss(
    student_logits_branches: list[Float[Tensor, "b c"]],
    ema_logits_branches: list[Float[Tensor, "b c"]],
    ensemble_logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    epoch: int,
    *,
    temperature: float = 3.0,
    mean_teachers: Literal["others", "own"] = "others",
    detach: bool = True,
    ramp_epochs: float = 80.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises peers that miss the labels, differ from the ensemble of all, or from the other peers' averaged copies.

    With z_i = student_logits_branches[i] of m peers and P(z) = softmax(z / temperature):
    ce = sum over i of CE(z_i, labels) + CE(ensemble_logits, labels),
    ensemble = ramp * temperature^2 * sum over i of KL(P(ensemble_logits) || P(z_i)),
    ema = ramp * temperature^2 / (m - 1) * sum over i and j != i of KL(P(ema_logits_branches[j]) || P(z_i))

    Args:
        student_logits_branches: Class scores of each peer.
        ema_logits_branches: The same of the peers' averaged copies.
        ensemble_logits: Of the classifier over all peers' embeddings.
        labels: Of the batch.
        epoch: From 0.
        temperature: Softens the distributions, above 0; the paper's 3.
        mean_teachers: `others`: each peer learns from the averaged copies of the others, their mean; `own`: from its own.
        detach: Whether the ensemble is a target without gradient, as in the paper.
        ramp_epochs: ensemble and ema rise as exp(-5 (1 - epoch / ramp_epochs)^2) until this epoch; 0: full at once.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of one more cross-entropy of peer 0, applied by the learner; 0, it is in the loss.

    Returns:
        Term ce per sample, in nats; ensemble and ema in nats times temperature^2.

    Raises:
        SignalError: Fewer than two peers, another number of copies, or the shapes differ.
        ConfigError: No such mean teachers.

    Example:
        >>> import torch
        >>> even = torch.zeros(1, 2)
        >>> terms = pcl_loss([even, even], [even, even], even, torch.tensor([0]), 80)
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'ce': 2.0794, 'ensemble': 0.0, 'ema': 0.0}

    References:
        arXiv:2006.04147

    Note:
        Unsure: that each peer learns from the others' copies; the paper's 1 / (m - 1) says so. The copies follow
        `training.ema`, 0.999 in the paper; its slower start, at most 1 - 1 / (steps + 1), is `training.ema_warmup`. The paper
        tests an averaged peer: `training.evaluate` as `ema`. The ramp of a public reimplementation is full after one epoch and
        all but 0 from then until epoch 80; it is not followed.
    """
    check_choice("pcl", mean_teachers=mean_teachers, known=("others", "own"))
    check_branches("pcl", student_logits_branches, labels=(labels, "b"), ensemble_logits=(ensemble_logits, "b c"))
    same_length("pcl", student_logits_branches=student_logits_branches, ema_logits_branches=ema_logits_branches)
    for i, copy in enumerate(ema_logits_branches):
        pair = {"ensemble_logits": (ensemble_logits, "b c"), f"ema_logits_branches[{i}]": (copy, "b c")}
        check_axes("pcl", **pair)
    target = full(ensemble_logits).detach() if detach else full(ensemble_logits)
    ensemble, ema = [], []
    for i, branch in enumerate(student_logits_branches):
        ensemble.append(kd_loss(branch, target, temperature=temperature))
        heard = [copy for j, copy in enumerate(ema_logits_branches) if (j == i) == (mean_teachers == "own")]
        ema.append(torch.stack([kd_loss(branch, copy.detach(), temperature=temperature) for copy in heard]).mean(0))
    ramp = sigmoid_ramp(epoch, ramp_epochs)
    return {
        "ce": cross_entropies([*student_logits_branches, ensemble_logits], labels),
        "ensemble": ramp * torch.stack(ensemble).sum(0),
        "ema": ramp * torch.stack(ema).sum(0),
    }


class Module(nn.Module):
    """A linear classifier over the embeddings of all peers, one behind the other, and the loss.

    Args:
        student_logits_branches: Shapes [c], one a peer.
        student_embedding_branches: Shapes [d], one a peer.
    """

    def __init__(self, student_logits_branches: list[Shape], student_embedding_branches: list[Shape]) -> None:
        super().__init__()
        self.ensemble = nn.Linear(sum(shape[0] for shape in student_embedding_branches), student_logits_branches[0][0])

    def forward(
        self,
        student_logits_branches: list[Float[Tensor, "b c"]],
        student_embedding_branches: list[Float[Tensor, "b _d"]],
        ema_logits_branches: list[Float[Tensor, "b c"]],
        labels: Int[Tensor, "b"],
        epoch: int,
        *,
        temperature: float,
        mean_teachers: Literal["others", "own"],
        detach: bool,
        ramp_epochs: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss of peers and ensemble."""
        logits = self.ensemble(torch.cat([full(embedding) for embedding in student_embedding_branches], dim=1))
        return pcl_loss(
            student_logits_branches,
            ema_logits_branches,
            logits,
            labels,
            epoch,
            temperature=temperature,
            mean_teachers=mean_teachers,
            detach=detach,
            ramp_epochs=ramp_epochs,
        )
