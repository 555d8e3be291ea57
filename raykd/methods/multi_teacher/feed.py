"""FEED: a translator for each teacher brings the student's last feature to that teacher's."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.parts.adapters import Shape
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full, to_smaller

NAME = "FEED"
PAPER = "Park, Kwak: FEED: Feature-level Ensemble for Knowledge Distillation. arXiv:1909.10754 (2019)"
SECTION = "3.1"
SCHEME = "offline"
LAYERS = ("stage-1",)


def feed_loss(
    student_features: list[Float[Tensor, "b _c _h _w"]],
    teachers_feature: list[Float[Tensor, "b _c _h _w"]],
    *,
    reduction: Literal["mean", "sum"] = "mean",
    weight: float = 200.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises translated student features that point elsewhere than the teachers' features, summed over teachers.

    With each feature flattened and brought to unit length:
    sum over teachers m of the mean over channels and places of |student_features_m - teachers_feature_m|

    Args:
        student_features: What the translators make of the student's feature, one for each teacher.
        teachers_feature: Activations of each teacher's last layer.
        reduction: `mean` or `sum` over channels and places; `sum` is the paper's L1 norm.
        weight: Factor of the loss, the paper's beta, applied by the learner; 200 is customary for ft with this mean.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Per sample, without unit: at most 2 / sqrt(n) a teacher for n activations (2 sqrt(n) with `sum`).

    Raises:
        SignalError: The lists differ in length, or the shapes of a pair.
        ConfigError: No such reduction.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([5.0, 0.0]).reshape(1, 2, 1, 1)
        >>> feed_loss([student], [teacher])
        tensor([0.6000])

    References:
        arXiv:1909.10754

    Note:
        This is parallel FEED. The paper writes the L1 norm; Factor Transfer (arXiv:1802.04977), which FEED grew out of, takes
        the mean in its authors' code, and the customary weight goes with it. FEED's own beta is not known to us.
        Sequential FEED, where each student is the next one's teacher, is this loss in a chain of stages with one teacher.
    """
    check_choice("feed", reduction=reduction, known=("mean", "sum"))
    same_length("feed", student_features=student_features, teachers_feature=teachers_feature)
    losses = []
    for i, (student, teacher) in enumerate(zip(student_features, teachers_feature)):
        first = {"student_features[0]": (student_features[0], "b *first")}
        pair = {f"student_features[{i}]": (student, "b c h w"), f"teachers_feature[{i}]": (teacher, "b c h w")}
        check_axes("feed", **first | pair)
        apart = (_unit(student) - _unit(teacher)).abs()
        losses.append(apart.mean(1) if reduction == "mean" else apart.sum(1))
    return torch.stack(losses).sum(0)


def _unit(feature: Tensor) -> Tensor:
    return F.normalize(full(feature).flatten(1), dim=1)


def _translator(inputs: int, outputs: int) -> nn.Sequential:
    """Three 3x3 convolutions, each with batch normalisation and a leaky ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class Module(nn.Module):
    """A translator for each teacher, and the loss.

    Three convolutions as the paper has them; batch normalisation and the slope 0.1 are those of Factor Transfer's translator.

    Args:
        student_feature: Shape [c h w].
        teachers_feature: Shapes [c h w], one a teacher; of two sizes the larger map is average pooled.
    """

    def __init__(self, student_feature: Shape, teachers_feature: list[Shape]) -> None:
        super().__init__()
        self.translators = nn.ModuleList(_translator(student_feature[0], teacher[0]) for teacher in teachers_feature)

    def forward(
        self,
        student_feature: Float[Tensor, "b cs hs ws"],
        teachers_feature: list[Float[Tensor, "b _ct _ht _wt"]],
        *,
        reduction: Literal["mean", "sum"],
    ) -> Float[Tensor, "b"]:
        """The loss of the translated student feature."""
        same_length("feed", translators=self.translators, teachers_feature=teachers_feature)
        pairs = [to_smaller(full(student_feature), full(teacher)) for teacher in teachers_feature]
        students = [translate(student) for translate, (student, _) in zip(self.translators, pairs)]
        return feed_loss(students, [teacher for _, teacher in pairs], reduction=reduction)
