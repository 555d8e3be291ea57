"""KTAN: a Teacher-to-Student layer makes feature maps that both can share; the student's come near them and pass for them."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.adversarial import passing, telling_apart
from raykd.parts.checks import check_axes, check_choice
from raykd.parts.critics import MapCritic
from raykd.parts.numeric import full, per_sample, to_smaller

NAME = "KTAN"
PAPER = "Liu, Liu, Ma, Mei, Seok: KTAN: Knowledge Transfer Adversarial Network. IJCNN 2020, arXiv:1810.08126"
SECTION = "3.5"
SCHEME = "offline"
LAYERS = ("stage-1",)


def ktan_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    student_feature: Float[Tensor, "b d h w"],
    teacher_shared: Float[Tensor, "b d h w"],
    student_score: Float[Tensor, "b"],
    *,
    gan: Literal["saturating", "non_saturating", "least_squares"] = "saturating",
    temperature: float = 4.0,
    feature_weight: float = 1.0,
    adversarial_weight: float = 0.1,
    kd_weight: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises feature maps apart from the shared ones, or told from them by the critic, and class distributions unlike.

    feature     = feature_weight * mean over channels and places of (teacher_shared - student_feature)^2
    adversarial = adversarial_weight * log(1 - sigmoid(student_score)), or as `gan` says
    kd          = kd_weight * temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        student_feature: Activations of the layer.
        teacher_shared: The teacher's activations after the Teacher-to-Student layer.
        student_score: What the critic says of the student's feature: the higher, the more the shared one.
        gan: Form of the game: saturating is the usual equation; non_saturating, -log sigmoid(student_score), has the same
            critic and a gradient that lasts while the critic wins; least_squares is (1 - student_score)^2.
        temperature: Softens both distributions, above 0.
        feature_weight: Factor of term feature.
        adversarial_weight: Factor of term adversarial.
        kd_weight: Factor of term kd.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Terms feature, in squared activations, adversarial, in nats or without unit, and kd, in nats times temperature^2, per
        sample; the saturating form is below 0.

    Raises:
        SignalError: The shapes do not fit together.
        ConfigError: No such form.

    Example:
        >>> import torch
        >>> logits, feature, score = torch.zeros(1, 2), torch.ones(1, 1, 2, 2), torch.zeros(1)
        >>> ktan_loss(logits, logits, 3 * feature, feature, score, gan="least_squares", adversarial_weight=1.0)
        {'feature': tensor([4.]), 'adversarial': tensor([1.]), 'kd': tensor([0.])}

    References:
        arXiv:1810.08126

    Note:
        No code was published. The form of the game, all weights and the temperature are not known to us.
    """
    check_axes(
        "ktan",
        student_logits=(student_logits, "b c"),
        teacher_logits=(teacher_logits, "b c"),
        student_feature=(student_feature, "b d h w"),
        teacher_shared=(teacher_shared, "b d h w"),
        student_score=(student_score, "b"),
    )
    return {
        "feature": feature_weight * per_sample((full(teacher_shared) - full(student_feature)).square()),
        "adversarial": adversarial_weight * passing(student_score, gan),
        "kd": kd_weight * kd_loss(student_logits, teacher_logits, temperature=temperature),
    }


class Module(nn.Module):
    """The Teacher-to-Student layer, a 3x3 convolution and a ReLU, its own classifier, the critic, and the loss.

    In each step the critic learns first, see `after_forward`; the layer and its classifier learn with the student's
    optimizer.

    Args:
        student_feature: Shape [c h w].
        teacher_feature: The same of the teacher; of two sizes the larger map is average pooled.
        num_classes: Of the labels.
        gan: As in the loss.
        shared_by: What the layer learns from. labels: from the cross-entropy of a linear classifier on the mean over places,
            term shared; its maps are a target that the student does not move. student: from term feature, so that teacher's
            and student's maps come towards each other; there is no term shared.
        critic_lr: Rate of the critic's Adam.

    Raises:
        ConfigError: No such `shared_by`.

    Note:
        How the paper trains its layer is not known to us: `labels` is ours, and keeps the maps from going where they are easy
        to reach, but nothing bounds their size; a layer trained before the student is not offered. The architectures of
        layer and critic and the critic's rate are ours. Detection is left out.
    """

    def __init__(
        self,
        student_feature: Shape,
        teacher_feature: Shape,
        num_classes: int,
        *,
        gan: Literal["saturating", "non_saturating", "least_squares"],
        shared_by: Literal["labels", "student"] = "labels",
        critic_lr: float = 1e-4,
    ) -> None:
        super().__init__()
        check_choice("ktan", shared_by=shared_by, known=("labels", "student"))
        self.gan = gan
        self.layer = nn.Conv2d(teacher_feature[0], student_feature[0], 3, padding=1)
        self.classifier = nn.Linear(student_feature[0], num_classes) if shared_by == "labels" else None
        self.critic = MapCritic(student_feature[0], lr=critic_lr)

    def shared(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The student's map and the teacher's after the layer, of one shape."""
        student, teacher = to_smaller(full(student), full(teacher))
        return student, torch.relu(self.layer(teacher))

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        teacher_logits: Float[Tensor, "b c"],
        student_feature: Float[Tensor, "b cs hs ws"],
        teacher_feature: Float[Tensor, "b ct ht wt"],
        labels: Int[Tensor, "b"],
        *,
        temperature: float,
        feature_weight: float,
        adversarial_weight: float,
        kd_weight: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss under the critic as it is, and the cross-entropy of the layer's classifier as term shared."""
        student, shared = self.shared(student_feature, teacher_feature)
        terms = ktan_loss(
            student_logits,
            teacher_logits,
            student,
            shared if self.classifier is None else shared.detach(),
            self.critic(student),
            gan=self.gan,
            temperature=temperature,
            feature_weight=feature_weight,
            adversarial_weight=adversarial_weight,
            kd_weight=kd_weight,
        )
        if self.classifier is not None:
            terms["shared"] = F.cross_entropy(self.classifier(shared.mean((2, 3))), labels, reduction="none")
        return terms


def after_forward(module: Module, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
    """Trains the critic on this batch: the shared feature maps for real, the student's for fake."""
    found = next(own for own in learner.losses.values() if own.module is module).values(signals)
    with torch.no_grad():
        student, shared = module.shared(found["student_feature"], found["teacher_feature"])
    module.critic.update(telling_apart(module.critic(shared), module.critic(student), module.gan))
