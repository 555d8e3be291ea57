"""FFL: a fusion of the sub-networks' feature maps teaches them, and their mean teaches the fusion."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.branches import check_branches, cross_entropies, mean_logits, sigmoid_ramp
from raykd.parts.numeric import full

NAME = "FFL"
PAPER = "Kim, Hyun, Chung, Kwak: Feature Fusion for Online Mutual Knowledge Distillation. ICPR 2020, arXiv:1904.09058"
SECTION = "2.2"
SCHEME = "online"
LAYERS = ("stage-1",)
BRANCHING = {"kind": "split", "count": 2}


def ffl_loss(
    student_logits_branches: list[Float[Tensor, "b c"]],
    fused_logits: Float[Tensor, "b c"],
    labels: Int[Tensor, "b"],
    epoch: int,
    *,
    temperature: float = 3.0,
    detach: bool = True,
    ramp_epochs: float = 80.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises sub-networks and a fused classifier that miss the labels, or differ from each other.

    With z_i = student_logits_branches[i] and P(z) = softmax(z / temperature):
    ce = sum over i of CE(z_i, labels) + CE(fused_logits, labels),
    kd = ramp * temperature^2 * sum over i of KL(P(fused_logits) || P(z_i)),
    fusion = ramp * temperature^2 * KL(P(mean of the z_i) || P(fused_logits))

    Args:
        student_logits_branches: Class scores of each sub-network.
        fused_logits: The same of the fused classifier.
        labels: Of the batch.
        epoch: From 0.
        temperature: Softens the distributions, above 0; the paper's 3.
        detach: Whether targets are without gradient, as in the authors' code.
        ramp_epochs: kd and fusion rise as exp(-5 (1 - epoch / ramp_epochs)^2) until this epoch; 0: full at once.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of one more cross-entropy of sub-network 0, applied by the learner; 0, it is in the loss.

    Returns:
        Term ce per sample, in nats; kd and fusion in nats times temperature^2.

    Raises:
        SignalError: Fewer than two sub-networks, or the shapes differ.

    Example:
        >>> import torch
        >>> even = torch.zeros(1, 2)
        >>> terms = ffl_loss([even, even], even, torch.tensor([0]), 80)
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'ce': 2.0794, 'kd': 0.0, 'fusion': 0.0}

    References:
        arXiv:1904.09058

    Note:
        Two sub-networks over shared stages, as the authors' code builds them; it adds 1e-7 to the targets, here they are
        exact, and decays the weights of the fusion module by 1e-5, here by what the job sets. Sub-network 0 is deployed,
        which the paper calls FFL-S; its FFL is the fused classifier, which stays in the checkpoint.
    """
    check_branches("ffl", student_logits_branches, labels=(labels, "b"), fused_logits=(fused_logits, "b c"))
    mean, fused = mean_logits(student_logits_branches), full(fused_logits)
    from_fused, from_mean = (fused.detach(), mean.detach()) if detach else (fused, mean)
    taught = [kd_loss(branch, from_fused, temperature=temperature) for branch in student_logits_branches]
    ramp = sigmoid_ramp(epoch, ramp_epochs)
    return {
        "ce": cross_entropies([*student_logits_branches, fused], labels),
        "kd": ramp * sum(taught[1:], taught[0]),
        "fusion": ramp * kd_loss(fused, from_mean, temperature=temperature),
    }


class Module(nn.Module):
    """The fusion module, and the loss.

    The maps of all sub-networks, one behind the other, go through a depthwise 3x3 convolution and a pointwise one down to the
    channels of the first map, each with batch normalisation and ReLU; then average pooling and a linear classifier.

    Args:
        student_logits_branches: Shapes [c], one a sub-network.
        student_feature_branches: Shapes [c h w] of their last maps; h and w must be alike.
    """

    def __init__(self, student_logits_branches: list[Shape], student_feature_branches: list[Shape]) -> None:
        super().__init__()
        if any(len(shape) != 3 for shape in student_feature_branches) or len({s[1:] for s in student_feature_branches}) != 1:
            got = [list(shape) for shape in student_feature_branches]
            raise SignalError(f"student_feature_branches: expected maps [c h w] of one size, got {got} (ffl).")
        width, total = student_feature_branches[0][0], sum(shape[0] for shape in student_feature_branches)
        self.depthwise = nn.Conv2d(total, total, 3, padding=1, groups=total, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(total)
        self.pointwise = nn.Conv2d(total, width, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, student_logits_branches[0][0])

    def forward(
        self,
        student_logits_branches: list[Float[Tensor, "b c"]],
        student_feature_branches: list[Float[Tensor, "b _k h w"]],
        labels: Int[Tensor, "b"],
        epoch: int,
        *,
        temperature: float,
        detach: bool,
        ramp_epochs: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss of sub-networks and fused classifier."""
        fused = torch.cat([full(feature) for feature in student_feature_branches], dim=1)
        fused = self.depthwise_norm(self.depthwise(fused)).relu()
        fused = self.pointwise_norm(self.pointwise(fused)).relu()
        logits = self.classifier(fused.mean((2, 3)))
        options = {"temperature": temperature, "ramp_epochs": ramp_epochs}
        return ffl_loss(student_logits_branches, logits, labels, epoch, detach=detach, **options)
