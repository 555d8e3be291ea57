"""Portable student networks: the student is a generator of features, and a teaching assistant tells them from the teacher's."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykd.parts.adapters import Shape
from raykd.parts.adversarial import passing, telling_apart
from raykd.parts.checks import check_axes
from raykd.parts.critics import MapCritic
from raykd.parts.numeric import full, per_sample, to_smaller

NAME = "Portable student networks"
PAPER = "Wang, Xu, Xu, Tao: Adversarial Learning of Portable Student Networks. AAAI 2018, doi:10.1609/aaai.v32i1.11667"
SECTION = "1.2"
SCHEME = "offline"
LAYERS = ("stage-1",)


def wang_portable_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    student_feature: Float[Tensor, "b d h w"],
    teacher_feature: Float[Tensor, "b d h w"],
    student_score: Float[Tensor, "b"],
    *,
    gan: Literal["saturating", "non_saturating", "least_squares"] = "saturating",
    adversarial_weight: float = 1.0,
    logits_weight: float = 0.1,
    feature_weight: float = 0.1,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises features that the teaching assistant can tell from the teacher's, and outputs and features unlike its.

    adversarial = adversarial_weight * log(1 - sigmoid(student_score)), or as `gan` says
    logits      = logits_weight * mean over classes of (student_logits - teacher_logits)^2
    feature     = feature_weight * mean over channels and places of (student_feature - teacher_feature)^2

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        student_feature: Activations of the layer, adapted.
        teacher_feature: The same of the teacher.
        student_score: What the assistant says of the student's feature: the higher, the more the teacher's.
        gan: Form of the game: saturating is the paper's equation; non_saturating, -log sigmoid(student_score), has the same
            assistant and a gradient that lasts while it wins; least_squares is (1 - student_score)^2.
        adversarial_weight: Factor of term adversarial.
        logits_weight: Factor of term logits; 0 leaves it out.
        feature_weight: Factor of term feature; 0 leaves it out.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Terms adversarial, in nats or without unit, logits, in squared class scores, and feature, in squared activations, per
        sample; the saturating form is below 0.

    Raises:
        SignalError: The shapes do not fit together.
        ConfigError: No such form.

    Example:
        >>> import torch
        >>> logits, feature, score = torch.zeros(1, 2), torch.ones(1, 1, 2, 2), torch.zeros(1)
        >>> wang_portable_loss(logits, logits + 2, 3 * feature, feature, score, gan="least_squares", feature_weight=1.0)
        {'adversarial': tensor([1.]), 'logits': tensor([0.4000]), 'feature': tensor([4.])}

    References:
        doi:10.1609/aaai.v32i1.11667

    Note:
        No code was published. The game is the paper's; which mimic term stands beside it, its form and all weights are not
        known to us, hence both usual ones, small and each with a weight that may be 0.
    """
    check_axes(
        "wang-portable",
        student_logits=(student_logits, "b c"),
        teacher_logits=(teacher_logits, "b c"),
        student_feature=(student_feature, "b d h w"),
        teacher_feature=(teacher_feature, "b d h w"),
        student_score=(student_score, "b"),
    )
    terms = {"adversarial": adversarial_weight * passing(student_score, gan)}
    if logits_weight:
        terms["logits"] = logits_weight * per_sample((full(student_logits) - full(teacher_logits)).square())
    if feature_weight:
        terms["feature"] = feature_weight * per_sample((full(student_feature) - full(teacher_feature)).square())
    return terms


class Module(nn.Module):
    """The teaching assistant, a 1x1 convolution to the teacher's channels where they differ, and the loss.

    In each step the assistant learns first, see `after_forward`; the convolution learns with the student.

    Args:
        student_feature: Shape [c h w].
        teacher_feature: The same of the teacher; of two sizes the larger map is average pooled.
        gan: As in the loss.
        critic_lr: Rate of the assistant's Adam.

    Note:
        The assistant's architecture, its rate and the 1x1 convolution are ours.
    """

    def __init__(
        self,
        student_feature: Shape,
        teacher_feature: Shape,
        *,
        gan: Literal["saturating", "non_saturating", "least_squares"],
        critic_lr: float = 1e-4,
    ) -> None:
        super().__init__()
        self.gan = gan
        channels = student_feature[0], teacher_feature[0]
        self.adapter = nn.Conv2d(*channels, 1) if channels[0] != channels[1] else nn.Identity()
        self.critic = MapCritic(teacher_feature[0], lr=critic_lr)

    def adapted(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both features, of one shape."""
        student, teacher = to_smaller(full(student), full(teacher))
        return self.adapter(student), teacher

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        teacher_logits: Float[Tensor, "b c"],
        student_feature: Float[Tensor, "b cs hs ws"],
        teacher_feature: Float[Tensor, "b ct ht wt"],
        *,
        adversarial_weight: float,
        logits_weight: float,
        feature_weight: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss under the assistant as it is."""
        student, teacher = self.adapted(student_feature, teacher_feature)
        return wang_portable_loss(
            student_logits,
            teacher_logits,
            student,
            teacher,
            self.critic(student),
            gan=self.gan,
            adversarial_weight=adversarial_weight,
            logits_weight=logits_weight,
            feature_weight=feature_weight,
        )


def after_forward(module: Module, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
    """Trains the assistant on this batch: the teacher's feature for real, the student's for fake."""
    found = next(own for own in learner.losses.values() if own.module is module).values(signals)
    with torch.no_grad():
        student, teacher = module.adapted(found["student_feature"], found["teacher_feature"])
    module.critic.update(telling_apart(module.critic(teacher), module.critic(student), module.gan))
