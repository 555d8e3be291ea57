"""Two teachers: one tells the student its outputs, the other its features."""

from jaxtyping import Float
from torch import Tensor, nn

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape, hint_regressor
from raykd.parts.checks import check_axes, same_length
from raykd.parts.numeric import full, per_sample

NAME = "Two-Teacher"
PAPER = "Chen, Su, Zhang: A Two-Teacher Framework for Knowledge Distillation. ISNN 2019"
SECTION = "3.1"
SCHEME = "offline"
LAYERS = ("stage-1",)
SPARSE = True


def two_teacher_loss(
    student_logits: Float[Tensor, "b c"],
    teachers_logits: list[Float[Tensor, "b _c"]],
    student_feature: Float[Tensor, "b _c _h _w"],
    teachers_feature: list[Float[Tensor, "b _c _h _w"]],
    *,
    temperature: float = 4.0,
    feature_weight: float = 100.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises outputs unlike the first teacher's and features unlike the second's.

    response = temperature^2 * KL(softmax(first teacher's logits / temperature) || softmax(student_logits / temperature))
    feature = feature_weight * mean over channels and places of (student_feature - second teacher's feature)^2

    Args:
        student_logits: Class scores.
        teachers_logits: The same of the two teachers; the second's are not read.
        student_feature: Activations of the student's layer, after the regressor.
        teachers_feature: Activations of the two teachers' layers; the first's are not read.
        temperature: Softens both distributions, above 0.
        feature_weight: Factor of feature; 100 as is customary for fitnet, whose loss it is.
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Terms response, in nats times temperature^2, and feature, in squared activations, per sample.

    Raises:
        SignalError: There are not two teachers, or shapes differ.

    Example:
        >>> import torch
        >>> even, one = torch.zeros(1, 2), torch.ones(1, 2, 1, 1)
        >>> two_teacher_loss(even, [even, even], 3 * one, [one, one], feature_weight=1.0)
        {'response': tensor([0.]), 'feature': tensor([4.])}

    References:
        doi:10.1007/978-3-030-22796-8_7

    Note:
        The order of the loss's teachers says who is who: Loss("two-teacher", teachers=("loose", "strict")). The abstract has
        a strictly trained teacher for the features and a loosely trained one for the decision; the form of the feature loss
        (the paper may use a discriminator), layer, temperature and factors are not known to us and are the customary ones.
    """
    same_length("two-teacher", teachers_logits=teachers_logits, teachers_feature=teachers_feature)
    if len(teachers_logits) != 2:
        raise SignalError(
            f"teachers: expected 2, the one of the logits first, got {len(teachers_logits)} (two-teacher). "
            "Name both: teachers=('first', 'second')."
        )
    check_axes(
        "two-teacher",
        student_logits=(student_logits, "b c"),
        student_feature=(student_feature, "b d h w"),
        first_teacher_logits=(teachers_logits[0], "b c"),
        second_teacher_feature=(teachers_feature[1], "b d h w"),
        second_teacher_logits=(teachers_logits[1], "b e"),
        first_teacher_feature=(teachers_feature[0], "b *f"),
    )
    apart = per_sample((full(student_feature) - full(teachers_feature[1])).square())
    return {
        "response": kd_loss(student_logits, teachers_logits[0], temperature=temperature),
        "feature": feature_weight * apart,
    }


class Module(nn.Module):
    """The regressor to the second teacher's feature, and the loss.

    Args:
        student_feature: Shape [c h w].
        teachers_feature: Shapes [c h w] of the two teachers.
        regressor: `conv_bn_relu` or `conv`, as in fitnet.
    """

    def __init__(self, student_feature: Shape, teachers_feature: list[Shape], *, regressor: str = "conv_bn_relu") -> None:
        super().__init__()
        self.regressor = hint_regressor(student_feature, teachers_feature[-1], regressor)

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        teachers_logits: list[Float[Tensor, "b _c"]],
        student_feature: Float[Tensor, "b cs hs ws"],
        teachers_feature: list[Float[Tensor, "b _ct _ht _wt"]],
        *,
        temperature: float,
        feature_weight: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss of the student's logits and its regressed feature."""
        feature = self.regressor(full(student_feature))
        options = {"temperature": temperature, "feature_weight": feature_weight}
        return two_teacher_loss(student_logits, teachers_logits, feature, teachers_feature, **options)
