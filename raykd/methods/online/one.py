"""ONE: branches over shared layers are gated into an ensemble that teaches each of them."""

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.branches import check_branches, cross_entropies, sigmoid_ramp
from raykd.parts.numeric import full

NAME = "ONE"
PAPER = "Lan, Zhu, Gong: Knowledge Distillation by On-the-Fly Native Ensemble. NeurIPS 2018, arXiv:1806.04606"
SECTION = "2.2"
SCHEME = "online"
LAYERS = ("stage-2",)
BRANCHING = {"kind": "split", "count": 3}


def one_loss(
    student_logits_branches: list[Float[Tensor, "b c"]],
    gates: Float[Tensor, "b m"],
    labels: Int[Tensor, "b"],
    epoch: int,
    *,
    temperature: float = 3.0,
    detach: bool = True,
    ramp_epochs: float = 80.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises branches, and their gated ensemble, that miss the labels, and branches unlike the ensemble.

    With z_i = student_logits_branches[i], z_e = sum over branches i of gates_i * z_i, p = softmax(z / temperature):
    ce = sum over i of CE(z_i, labels), ensemble = CE(z_e, labels),
    kd = ramp * temperature^2 * sum over i of KL(p_e || p_i)

    Args:
        student_logits_branches: Class scores of each branch.
        gates: Share of each branch, as the Module's gate gives it.
        labels: Of the batch.
        epoch: From 0.
        temperature: Softens the distributions, above 0; the paper's 3.
        detach: Whether p_e is a target without gradient, as in the authors' code; OKDDip's code lets the gradient through.
        ramp_epochs: kd rises as exp(-5 (1 - epoch / ramp_epochs)^2) until this epoch; 0: full at once.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of one more cross-entropy of branch 0, applied by the learner; 0, it is in the loss.

    Returns:
        Terms ce and ensemble per sample, in nats; kd in nats times temperature^2.

    Raises:
        SignalError: Fewer than two branches, another number of gates, or the shapes differ.

    Example:
        >>> import torch
        >>> even = torch.zeros(1, 2)
        >>> terms = one_loss([even, even], torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 80)
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'ce': 1.3863, 'ensemble': 0.6931, 'kd': 0.0}

    References:
        arXiv:1806.04606

    Note:
        The ramp is the authors' code's; the paper's equation has none. The code adds 1e-7 to p_e; here it is exact. Branch 0
        is deployed; the ensemble (ONE-E) stays in the checkpoint. The gate reads the layer where the branches part: set
        `layers` of this loss along with another `at` of the branching.
    """
    check_branches("one", student_logits_branches, labels=(labels, "b"), gates=(gates, "b m"))
    if gates.shape[1] != len(student_logits_branches):
        raise SignalError(
            f"gates: expected one for each of {len(student_logits_branches)} branches, got {gates.shape[1]} (one)."
        )
    gated = [full(gate)[:, None] * full(branch) for gate, branch in zip(gates.unbind(1), student_logits_branches)]
    ensemble = sum(gated[1:], gated[0])
    target = ensemble.detach() if detach else ensemble
    taught = [kd_loss(branch, target, temperature=temperature) for branch in student_logits_branches]
    return {
        "ce": cross_entropies(student_logits_branches, labels),
        "ensemble": cross_entropies([ensemble], labels),
        "kd": sigmoid_ramp(epoch, ramp_epochs) * sum(taught[1:], taught[0]),
    }


class Module(nn.Module):
    """The gate, and the loss: softmax over branches of the ReLU of a batch-normalised linear layer on the pooled feature.

    Args:
        student_logits_branches: Shapes [c], one a branch.
        student_feature: Shape [c h w] of the layer where the branches part.
    """

    def __init__(self, student_logits_branches: list[Shape], student_feature: Shape) -> None:
        super().__init__()
        self.linear = nn.Linear(student_feature[0], len(student_logits_branches))
        self.norm = nn.BatchNorm1d(len(student_logits_branches))

    def forward(
        self,
        student_logits_branches: list[Float[Tensor, "b c"]],
        student_feature: Float[Tensor, "b k h w"],
        labels: Int[Tensor, "b"],
        epoch: int,
        *,
        temperature: float,
        detach: bool,
        ramp_epochs: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss of the gated ensemble."""
        scores = F.relu(self.norm(self.linear(full(student_feature).mean((2, 3)))))
        options = {"temperature": temperature, "ramp_epochs": ramp_epochs}
        return one_loss(student_logits_branches, F.softmax(scores, dim=1), labels, epoch, detach=detach, **options)
