"""CL: heads over shared layers each learn from the labels and from the mean of the other heads."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raykd.methods.response.kd import kd_loss
from raykd.parts.branches import check_branches, cross_entropies, mean_logits, sigmoid_ramp
from raykd.parts.checks import check_choice
from raykd.parts.numeric import full

NAME = "CL"
PAPER = "Song, Chai: Collaborative Learning for Deep Neural Networks. NeurIPS 2018, arXiv:1805.11761"
SECTION = "2.2"
SCHEME = "online"
BRANCHING = {"kind": "split", "count": 3, "rescale": True}


def cl_loss(
    student_logits_branches: list[Float[Tensor, "b c"]],
    labels: Int[Tensor, "b"],
    epoch: int,
    *,
    beta: float = 0.5,
    temperature: float = 2.0,
    mode: Literal["paper", "okddip"] = "paper",
    detach: bool = True,
    ramp_epochs: float = 80.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises heads that miss the labels, or differ from the mean of the other heads.

    With z_h = student_logits_branches[h], p_h = softmax(z_h / temperature), q_h = softmax(mean of the z of all other heads /
    temperature), summed over heads h:
    ce = beta * CE(z_h, labels), soft = -(1 - beta) * sum over classes of q_h * log p_h

    Args:
        student_logits_branches: Class scores of each head.
        labels: Of the batch.
        epoch: From 0; read in mode `okddip` alone.
        beta: Share of the labels, between 0 and 1; the paper's 0.5. Mode `okddip` does not read it.
        temperature: Softens the distributions, above 0; the paper's 2.
        mode: `paper`: as above; `okddip`: as OKDDip compares with it, ce = CE(z_h, labels) and soft = ramp * temperature^2 *
            KL(q_h || p_h), with temperature 3.
        detach: Whether q_h is a target without gradient, as in the paper; OKDDip's code lets the gradient through.
        ramp_epochs: Mode `okddip`: soft rises as exp(-5 (1 - epoch / ramp_epochs)^2) until this epoch; 0: full at once.
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of one more cross-entropy of head 0, applied by the learner; 0, it is in the loss.

    Returns:
        Terms ce and soft per sample, in nats (soft of mode `okddip`: times temperature^2).

    Raises:
        SignalError: Fewer than two heads, or the shapes differ.
        ConfigError: No such mode.

    Example:
        >>> import torch
        >>> even = torch.zeros(1, 2)
        >>> terms = cl_loss([even, even], torch.tensor([0]), 0)
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'ce': 0.6931, 'soft': 0.6931}

    References:
        arXiv:1805.11761

    Note:
        Three heads that part after the second to last stage, as OKDDip, ONE and the survey compare them; the paper also
        grows a binary tree of heads, which is not built here. The gradient that the heads send into the shared layers is
        divided by their number (`rescale`), the paper's backpropagation rescaling at the one place where they part.
        Unsure: whether the paper multiplies soft by temperature^2; as written here it does not. Head 0 is deployed.
    """
    check_choice("cl", mode=mode, known=("paper", "okddip"))
    check_branches("cl", student_logits_branches, labels=(labels, "b"))
    heads, softs = student_logits_branches, []
    for h, head in enumerate(heads):
        target = mean_logits([other for i, other in enumerate(heads) if i != h])
        target = target.detach() if detach else target
        if mode == "okddip":
            softs.append(sigmoid_ramp(epoch, ramp_epochs) * kd_loss(head, target, temperature=temperature))
        else:
            own = F.log_softmax(full(head) / temperature, dim=1)
            softs.append((beta - 1) * (F.softmax(target / temperature, dim=1) * own).sum(1))
    return {"ce": cross_entropies(heads, labels) * (beta if mode == "paper" else 1.0), "soft": sum(softs[1:], softs[0])}
