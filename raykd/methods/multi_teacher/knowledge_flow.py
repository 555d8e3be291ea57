"""Knowledge Flow: transformed teacher features flow into the student's layers, and their share is driven to nothing."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ConfigError, SignalError
from raykd.parts.adapters import Shape
from raykd.parts.checks import check_axes, same_length
from raykd.parts.numeric import full

NAME = "Knowledge Flow"
PAPER = "Liu, Peng, Schwing: Knowledge Flow: Improve Upon Your Teachers. ICLR 2019, arXiv:1904.05878"
SECTION = "3.1"
SCHEME = "offline"
LAYERS = "stages"


def knowledge_flow_loss(
    student_logits: Float[Tensor, "b c"],
    teachers_logits: list[Float[Tensor, "b _k"]],
    teachers_classes: list[Int[Tensor, "_k"]],
    own_log_shares: Float[Tensor, "l"],
    *,
    matching: float = 1.0,
    dependence: float = 0.1,
    temperature: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises outputs unlike the teachers' and layers that still depend on the teachers.

    With p = softmax(logits / temperature), the student's logits at the teacher's classes, and w_l the weight that layer l
    gives its own output among the teachers':
    matching = matching * temperature^2 * mean over teachers m of KL(pT_m || pS at teachers_classes_m),
    dependence = -dependence * sum over layers l of log w_l

    Args:
        student_logits: Class scores.
        teachers_logits: The same of each teacher, of its own classes.
        teachers_classes: The student's class of each class of each teacher.
        own_log_shares: Log of the weight of the student's own output, for each layer; at most 0.
        matching: Factor of matching; the Module lets it decay over the epochs.
        dependence: Factor of dependence; the Module may let it rise over the epochs.
        temperature: Softens the distributions, above 0.
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Term matching per sample, in nats times temperature^2; term dependence, in nats, the same for every sample.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> even, shares = torch.zeros(1, 2), torch.tensor([0.5, 1.0]).log()
        >>> terms = knowledge_flow_loss(even, [even], [torch.arange(2)], shares, dependence=1.0)
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'matching': 0.0, 'dependence': 0.6931}

    References:
        arXiv:1904.05878

    Note:
        A teacher's layers are paired with the student's by the job; the paper weighs several candidate layers of a teacher.
        Unsure: the paper's factors and schedules, and its regulariser, which by its description keeps the output steady while
        the teachers' influence shrinks; here the student matches the teachers' outputs, ever less. Teachers of other tasks
        share no classes with the student: set matching to 0. Where a run must end independent of the teachers, not only be
        pushed there, set independent_after.
    """
    same_length("knowledge-flow", teachers_logits=teachers_logits, teachers_classes=teachers_classes)
    check_axes("knowledge-flow", own_log_shares=(own_log_shares, "l"))
    divergences = []
    for i, (logits, classes) in enumerate(zip(teachers_logits, teachers_classes)):
        check_axes(
            "knowledge-flow",
            student_logits=(student_logits, "b c"),
            **{f"teachers_logits[{i}]": (logits, "b k"), f"teachers_classes[{i}]": (classes, "k")},
        )
        student = F.log_softmax(full(student_logits)[:, classes] / temperature, dim=1)
        teacher = F.log_softmax(full(logits) / temperature, dim=1)
        divergences.append((teacher.exp() * (teacher - student)).sum(1))
    matched = temperature**2 * torch.stack(divergences).mean(0)
    return {"matching": matching * matched, "dependence": (-dependence * full(own_log_shares).sum()).expand(len(matched))}


class Module(nn.Module):
    """A 1x1 convolution Q for each teacher and layer, the weights of what flows together at each layer, and the loss.

    In training, a layer of the student yields w_0 * its own output + sum over teachers m of w_m * Q_m(feature of teacher m),
    with w = softmax(scores), all alike at first. Anywhere else, and once exported, the student is the plain model.

    Args:
        student_features: Shapes [c h w], one a layer.
        teachers_features: Shapes [c h w], for each teacher one a layer; maps are pooled to the student's size.
        matching_epochs: The factor of matching falls linearly to 0 at this epoch; 0: it stays.
        dependence_epochs: The factor of dependence rises linearly from 0 to full at this epoch; 0: full at once.
        independent_after: At this epoch nothing of the teachers flows any more: their weights fall linearly to 0, on top of
            what is learned; 0: they are only driven there, as in the paper.
    """

    epoch: Tensor

    def __init__(
        self,
        student_features: list[Shape],
        teachers_features: list[list[Shape]],
        *,
        matching_epochs: float = 20.0,
        dependence_epochs: float = 0.0,
        independent_after: float = 0.0,
    ) -> None:
        super().__init__()
        lengths = {
            "matching_epochs": matching_epochs,
            "dependence_epochs": dependence_epochs,
            "independent_after": independent_after,
        }
        for name, value in lengths.items():
            if value < 0:
                raise ConfigError(f"{name}: expected a number of epochs of at least 0, got {value} (knowledge-flow).")
        self.matching_epochs, self.dependence_epochs, self.independent_after = lengths.values()
        for features in teachers_features:
            same_length("knowledge-flow", student_features=student_features, teachers_features=features)
        self.transforms = nn.ModuleList(
            nn.ModuleList(_transform(theirs, own) for own, theirs in zip(student_features, features))
            for features in teachers_features
        )
        self.scores = nn.Parameter(torch.zeros(len(student_features), 1 + len(teachers_features)))
        self.register_buffer("epoch", torch.zeros(()))

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        student_features: list[Float[Tensor, "b _cs _hs _ws"]],
        teachers_logits: list[Float[Tensor, "b _k"]],
        teachers_features: list[list[Float[Tensor, "b _ct _ht _wt"]]],
        teachers_classes: list[Int[Tensor, "_k"]],
        *,
        matching: float,
        dependence: float,
        temperature: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss of what the modified student answers; features are named for their shapes, they went in before."""
        own = F.log_softmax(full(self.scores), dim=1)[:, 0]
        options = {"matching": matching, "dependence": dependence, "temperature": temperature}
        found = knowledge_flow_loss(student_logits, teachers_logits, teachers_classes, own, **options)
        risen = 1 - self._left(self.dependence_epochs) if self.dependence_epochs else 1.0
        return {"matching": found["matching"] * self._left(self.matching_epochs), "dependence": found["dependence"] * risen}

    def _left(self, epochs: float) -> Tensor | float:
        """What is left of 1 that falls linearly to 0 at an epoch; all of it where there is no such epoch."""
        return (1 - self.epoch / epochs).clamp_min(0) if epochs else 1.0

    def mixed(self, place: int, own: Float[Tensor, "b c h w"], theirs: list[Tensor]) -> Float[Tensor, "b c h w"]:
        """What the student's layer yields."""
        shares = F.softmax(full(self.scores[place]), dim=0)[1:] * self._left(self.independent_after)
        total = (1 - shares.sum()) * full(own)
        for share, transforms, feature in zip(shares, self.transforms, theirs, strict=True):
            pooled = F.adaptive_avg_pool2d(full(feature), (own.shape[-2], own.shape[-1]))
            total = total + share * transforms[place](pooled)  # type: ignore[index]
        return total.to(own.dtype)


def _transform(teacher: Shape, student: Shape) -> nn.Conv2d:
    if len(teacher) != 3 or len(student) != 3:
        raise SignalError(
            f"features: expected maps [c h w] of both, got {list(student)} of the student and {list(teacher)} of a teacher "
            "(knowledge-flow). Name convolutional layers."
        )
    return nn.Conv2d(teacher[0], student[0], 1, bias=False)


def on_epoch(module: Module, epoch: int) -> None:
    """Tells the module the time."""
    module.epoch.fill_(epoch)


def before_forward(
    module: Module,
    modify: Callable[[int, Callable[[Tensor], Tensor]], None],
    teachers_logits: list[Tensor],
    teachers_features: list[list[Tensor]],
) -> None:
    """Lets the teachers' features flow into the student's layers, in this forward."""
    for place in range(len(module.scores)):
        theirs = [features[place] for features in teachers_features]
        modify(place, lambda own, place=place, theirs=theirs: module.mixed(place, own, theirs))
