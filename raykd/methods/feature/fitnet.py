"""FitNet: a student layer, through a regressor, predicts a hint layer of the teacher."""

from jaxtyping import Float
from torch import Tensor, nn

from raykd.parts.adapters import Shape, hint_regressor
from raykd.parts.checks import check_axes
from raykd.parts.numeric import full, per_sample

NAME = "FitNet"
PAPER = "Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets. ICLR 2015, arXiv:1412.6550"
SECTION = "1.2"
SCHEME = "offline"
LAYERS = ("stage2",)


def fitnet_loss(
    student_feature: Float[Tensor, "b c h w"],
    teacher_feature: Float[Tensor, "b c h w"],
    *,
    weight: float = 100.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises the squared difference between the regressed student feature and the teacher's.

    mean over channels and places of (student_feature - teacher_feature)^2

    Args:
        student_feature: Activations of the guided layer, after the regressor.
        teacher_feature: Activations of the hint layer.
        weight: Factor of the loss, applied by the learner; 100 as in the CIFAR-100 literature.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Per sample, in squared activations.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> fitnet_loss(torch.full((1, 2, 2, 2), 3.0), torch.ones(1, 2, 2, 2))
        tensor([4.])

    References:
        arXiv:1412.6550

    Note:
        The paper takes half the sum of squares and trains in two stages, hint first and KD after; the customary form here
        is one stage, beside the cross-entropy.
    """
    check_axes("fitnet", student_feature=(student_feature, "b c h w"), teacher_feature=(teacher_feature, "b c h w"))
    return per_sample((full(student_feature) - full(teacher_feature)).square())


class Module(nn.Module):
    """The regressor and the loss.

    Args:
        student_feature: Shape [c h w].
        teacher_feature: Shape [c h w]; a map larger than the student's must be of twice its size.
        regressor: `conv_bn_relu` (the customary one; cannot reach negative activations) or `conv` (the paper's: a
            convolution alone).
    """

    def __init__(self, student_feature: Shape, teacher_feature: Shape, *, regressor: str = "conv_bn_relu") -> None:
        super().__init__()
        self.regressor = hint_regressor(student_feature, teacher_feature, regressor)

    def forward(
        self, student_feature: Float[Tensor, "b cs hs ws"], teacher_feature: Float[Tensor, "b ct ht wt"]
    ) -> Float[Tensor, "b"]:
        """The loss of the regressed student feature."""
        return fitnet_loss(self.regressor(full(student_feature)), teacher_feature)
