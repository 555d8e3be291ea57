"""LFME: experts of parts of the classes teach one student, each until the student has caught up."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.checks import check_axes, same_length
from raykd.parts.numeric import full
from raykd.parts.parallel import gather

NAME = "LFME"
PAPER = (
    "Xiang, Ding, Han: Learning From Multiple Experts: Self-paced Knowledge Distillation for Long-tailed Classification. "
    "ECCV 2020, arXiv:2001.01536"
)
SECTION = "3.1"
SCHEME = "offline"


def lfme_loss(
    student_logits: Float[Tensor, "b c"],
    teachers_logits: list[Float[Tensor, "b _e"]],
    teachers_classes: list[Int[Tensor, "_e"]],
    labels: Int[Tensor, "b"],
    expert_weights: Float[Tensor, "m"],
    epoch: int,
    *,
    temperature: float = 2.0,
    curriculum_epochs: int = 45,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises wrong classes, the easy samples first, and distributions over each expert's classes unlike the expert's.

    With z the student's logits, classes_l those that expert l knows, and e = min(epoch / curriculum_epochs, 1):
    ce = v * cross-entropy(z, label) with v = v0 + (1 - v0) * e, v0 the probability the label's expert gives to it,
    kd = sum over l of w_l * temperature^2 * KL(softmax(logits_l / temperature) || softmax(z[classes_l] / temperature))

    Args:
        student_logits: Scores of all classes.
        teachers_logits: Of each expert, scores of its classes.
        teachers_classes: The student's class of each class of each expert.
        labels: True classes.
        expert_weights: w, from the accuracies of the epoch before.
        epoch: From 0.
        temperature: Softens the distributions of kd, above 0; the authors' 2.
        curriculum_epochs: Epochs until every sample counts in full; 0: at once. The authors' is half of their 90.
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of a plain cross-entropy beside, applied by the learner; 0, since term ce is the cross-entropy.

    Returns:
        Terms ce, in nats, and kd, in nats times temperature^2, per sample.

    Raises:
        SignalError: The shapes do not fit together.

    Example:
        >>> import torch
        >>> one, none = torch.ones(1), torch.zeros(1, 2)
        >>> lfme_loss(none, [none], [torch.arange(2)], torch.tensor([0]), one, 0)
        {'ce': tensor([0.3466]), 'kd': tensor([0.])}

    References:
        arXiv:2001.01536

    Note:
        Where several experts know a label, v0 is their mean; where none does, it is 1. The authors' code averages the KL over
        classes too and multiplies by their number, and leaves temperature^2 out; it multiplies the logits by v instead of the
        loss. v grows linearly, the first of the paper's ways. Experts are teachers with a `label_map`; the class-balanced
        sampling of the paper's data is left to the data set.
    """
    same_length("lfme", teachers_logits=teachers_logits, teachers_classes=teachers_classes, expert_weights=expert_weights)
    confidences, experts, apart = [], [], []
    for i, (logits, classes) in enumerate(zip(teachers_logits, teachers_classes)):
        check_axes(
            "lfme",
            student_logits=(student_logits, "b c"),
            labels=(labels, "b"),
            expert_weights=(expert_weights, "m"),
            **{f"teachers_logits[{i}]": (logits, "b e"), f"teachers_classes[{i}]": (classes, "e")},
        )
        own = labels[:, None] == classes
        confidences.append((F.softmax(full(logits), dim=1) * own).sum(1))
        experts.append(own.sum(1))
        divergence = kd_loss(full(student_logits).index_select(1, classes), logits, temperature=temperature)
        apart.append(full(expert_weights[i]) * divergence)
    count = torch.stack(experts).sum(0)
    known = torch.where(count > 0, torch.stack(confidences).sum(0) / count.clamp_min(1), 1.0)
    grown = min(epoch / curriculum_epochs, 1.0) if curriculum_epochs else 1.0
    v = known + (1 - known) * grown
    cross_entropy = F.cross_entropy(full(student_logits), labels, reduction="none")
    return {"ce": v * cross_entropy, "kd": torch.stack(apart).sum(0)}


class Module(nn.Module):
    """How often student and experts are right on each expert's classes, the weights that follow, and the loss.

    Buffers, alike on all workers after each epoch: `expert_weights` [m]; and what is counted within an epoch, on this worker:
    `right` [2 m] of the student and of each expert, `seen` [m].

    Args:
        teachers_logits: Shapes [e], one an expert.
        threshold: a: an expert counts in full until the student reaches this share of its accuracy; the authors' 0.3.
    """

    expert_weights: Tensor
    right: Tensor
    seen: Tensor

    def __init__(self, teachers_logits: list[Shape], *, threshold: float = 0.3) -> None:
        super().__init__()
        self.threshold = threshold
        experts = len(teachers_logits)
        self.register_buffer("expert_weights", torch.ones(experts))
        self.register_buffer("right", torch.zeros(2, experts, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(experts, dtype=torch.int64))

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        teachers_logits: list[Float[Tensor, "b _e"]],
        teachers_classes: list[Int[Tensor, "_e"]],
        labels: Int[Tensor, "b"],
        epoch: int,
        *,
        temperature: float,
        curriculum_epochs: int,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss under the weights as they are; in training the batch is counted.

        The paper measures accuracies on validation images; here they are those of the epoch's training batches, augmented
        as they are: the student's among all classes, an expert's among its own.
        """
        given = student_logits, teachers_logits, teachers_classes, labels, self.expert_weights, epoch
        loss = lfme_loss(*given, temperature=temperature, curriculum_epochs=curriculum_epochs)
        if self.training:
            self._count(student_logits, teachers_logits, teachers_classes, labels)
        return loss

    @torch.no_grad()
    def _count(self, student: Tensor, teachers: list[Tensor], teachers_classes: list[Tensor], labels: Tensor) -> None:
        for i, (logits, classes) in enumerate(zip(teachers, teachers_classes)):
            own = (labels[:, None] == classes).any(1)
            self.seen[i] += own.sum()
            self.right[0, i] += (own & (student.argmax(1) == labels)).sum()
            self.right[1, i] += (own & (classes[logits.argmax(1)] == labels)).sum()


def on_epoch(module: Module, epoch: int) -> None:
    """Turns what was counted, on all workers together, into the experts' weights; an unseen expert keeps its own.

    w = 1 where the student's accuracy S is below threshold * E, E the expert's, else max((E - S) / (E * (1 - threshold)), 0).
    """
    right, seen = gather(module.right[None]).sum(0), gather(module.seen[None]).sum(0)
    student, expert = right.to(module.expert_weights.dtype) / seen.clamp_min(1)
    behind = (expert - student) / (expert * (1 - module.threshold)).clamp_min(torch.finfo(expert.dtype).tiny)
    weights = torch.where(student < module.threshold * expert, 1.0, behind.clamp(0, 1))
    module.expert_weights.copy_(torch.where(seen > 0, weights, module.expert_weights))
    module.right.zero_()
    module.seen.zero_()
