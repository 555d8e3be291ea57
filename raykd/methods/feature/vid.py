"""VID: the teacher's features are likely under a Gaussian that the student predicts."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.parts.adapters import Shape, pointwise
from raykd.parts.checks import check_axes, same_length
from raykd.parts.numeric import full, per_sample, to_smaller

NAME = "VID"
PAPER = (
    "Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer. CVPR 2019, arXiv:1904.05835"
)
SECTION = "1.2"
SCHEME = "offline"
LAYERS = "stages"


def vid_loss(
    student_means: list[Float[Tensor, "b _c _h _w"]],
    teacher_features: list[Float[Tensor, "b _c _h _w"]],
    variances: list[Float[Tensor, "_c"]],
    *,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises teacher features that are unlikely given the student's, summed over layers.

    sum over layers of mean over channels and places of ((teacher_feature - student_mean)^2 / variance + log variance) / 2

    Args:
        student_means: What the student predicts, after its regressors.
        teacher_features: Activations of the teacher's layers.
        variances: Of each channel, above 0.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Per sample, in nats up to a constant: may be negative.

    Raises:
        SignalError: The lists differ in length, or the shapes of a layer.

    Example:
        >>> import torch
        >>> vid_loss([torch.zeros(1, 2, 1, 1)], [torch.full((1, 2, 1, 1), 3.0)], [torch.ones(2)])
        tensor([4.5000])

    References:
        arXiv:1904.05835

    Note:
        The bound sums over channels and places; the customary mean goes with weight 1.
    """
    same_length("vid", student_means=student_means, teacher_features=teacher_features, variances=variances)
    losses = []
    for i, (mean, feature, variance) in enumerate(zip(student_means, teacher_features, variances)):
        check_axes(
            "vid",
            **{
                f"student_means[{i}]": (mean, "b c h w"),
                f"teacher_features[{i}]": (feature, "b c h w"),
                f"variances[{i}]": (variance, "c"),
            },
        )
        spread = full(variance)[:, None, None]
        losses.append(per_sample((full(feature) - full(mean)).square() / spread + spread.log()) / 2)
    return torch.stack(losses).sum(0)


class Module(nn.Module):
    """Regressors of three 1x1 convolutions, a learned variance for every teacher channel, and the loss.

    Args:
        student_features: Shapes [c h w], one a layer.
        teacher_features: Shapes [c h w]; of two sizes the larger map is average pooled.
        initial_variance: Of every channel; 5 as in the CIFAR-100 literature.
        minimum_variance: Added to softplus(scale), which keeps the variance above it.
    """

    def __init__(
        self,
        student_features: list[Shape],
        teacher_features: list[Shape],
        *,
        initial_variance: float = 5.0,
        minimum_variance: float = 1e-5,
    ) -> None:
        super().__init__()
        same_length("vid", student_features=student_features, teacher_features=teacher_features)
        self.minimum_variance = minimum_variance
        widths = [(student[0], teacher[0]) for student, teacher in zip(student_features, teacher_features)]
        self.regressors = nn.ModuleList(pointwise(cs, ct, ct, ct) for cs, ct in widths)
        scale = math.log(math.expm1(initial_variance - minimum_variance))
        self.scales = nn.ParameterList(torch.full((ct,), scale) for _, ct in widths)

    def forward(
        self,
        student_features: list[Float[Tensor, "b _cs _hs _ws"]],
        teacher_features: list[Float[Tensor, "b _ct _ht _wt"]],
    ) -> Float[Tensor, "b"]:
        """The loss of the regressed student features under the learned variances."""
        pairs = [to_smaller(full(s), full(t)) for s, t in zip(student_features, teacher_features, strict=True)]
        means = [regress(student) for regress, (student, _) in zip(self.regressors, pairs, strict=True)]
        variances = [F.softplus(scale) + self.minimum_variance for scale in self.scales]
        return vid_loss(means, [teacher for _, teacher in pairs], variances)
