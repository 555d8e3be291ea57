"""Online ensemble compression: students of several widths learn from their ensemble and from the widest one's features."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape, pointwise
from raykd.parts.branches import check_branches, cross_entropies, mean_logits
from raykd.parts.checks import check_axes, same_length
from raykd.parts.numeric import full, per_sample

NAME = "Online ensemble compression"
PAPER = (
    "Walawalkar, Shen, Savvides: Online Ensemble Model Compression using Knowledge Distillation. "
    "ECCV 2020, doi:10.1007/978-3-030-58529-7_2"
)
SECTION = "2.2"
SCHEME = "online"
LAYERS = ("stage-2", "stage-1")
BRANCHING = {"kind": "split", "count": 4, "at": "stage1"}


def walawalkar_loss(
    student_logits_branches: list[Float[Tensor, "b c"]],
    student_features_branches: list[list[Float[Tensor, "b _c _h _w"]]],
    labels: Int[Tensor, "b"],
    *,
    ce_share: float = 0.7,
    feature_share: float = 0.15,
    kd_share: float = 0.15,
    temperature: float = 2.0,
    detach: bool = True,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises students that miss the labels, features unlike the pseudo-teacher's, and outputs unlike the ensemble's.

    Branch 0 is the pseudo-teacher, the student that is not compressed. With z_s = student_logits_branches[s], F_s,l =
    student_features_branches[s][l] and P(z) = softmax(z / temperature):
    ce = ce_share * sum over s of CE(z_s, labels),
    feature = feature_share * sum over s >= 1 and layers l of the mean over channels and places of (F_s,l - F_0,l)^2,
    kd = kd_share * temperature^2 * sum over s of KL(P(mean of all z) || P(z_s))

    Args:
        student_logits_branches: Class scores of each student, the pseudo-teacher's first.
        student_features_branches: For each student its feature at each layer, all in the pseudo-teacher's channels.
        labels: Of the batch.
        ce_share: Factor of ce, the paper's 0.7.
        feature_share: Factor of feature, the paper's 0.15.
        kd_share: Factor of kd, the paper's 0.15.
        temperature: Softens the distributions, above 0; the paper's 2.
        detach: Whether ensemble and pseudo-teacher are targets without gradient.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of one more cross-entropy of branch 0, applied by the learner; 0, it is in the loss.

    Returns:
        Term ce per sample, in nats; feature without unit; kd in nats times temperature^2.

    Raises:
        SignalError: Fewer than two students, lists of other lengths, or the shapes differ.

    Example:
        >>> import torch
        >>> even, one = torch.zeros(1, 2), torch.ones(1, 1, 2, 2)
        >>> terms = walawalkar_loss([even, even], [[one], [3 * one]], torch.tensor([0]))
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'ce': 0.9704, 'feature': 0.6, 'kd': 0.0}

    References:
        doi:10.1007/978-3-030-58529-7_2

    Note:
        The four tails of this file's branching are alike. The paper's are narrower one after the other; the job says how:
        `branching=Branching(kind="split", count=3, at="stage1", options=({"widths": (16, 16, 24, 48)}, {"widths": (16, 16,
        16, 32)}))` of a crd_resnet20 makes tails of 3/4 and 1/2 of the channels. They share the stages up to `at`; the paper
        compares three blocks after them: name as many `layers` where the model has four stages. Unsure: whether the paper's
        ensemble is the mean of the logits or weighs them, whether it detaches the targets (an early version of the authors'
        code detaches the ensemble alone, and compares channel means without 1x1 convolutions). The pseudo-teacher is what is
        exported as the plain model; the others are in the checkpoint.
    """
    check_branches("walawalkar", student_logits_branches, labels=(labels, "b"))
    same_length(
        "walawalkar", student_logits_branches=student_logits_branches, student_features_branches=student_features_branches
    )
    first, *others = student_features_branches
    apart = []
    for s, features in enumerate(others, 1):
        same_length("walawalkar", **{"student_features_branches[0]": first, f"student_features_branches[{s}]": features})
        for i, (target, feature) in enumerate(zip(first, features)):
            pair = {f"[0][{i}]": target, f"[{s}][{i}]": feature}
            named = {f"student_features_branches{at}": (tensor, "b k h w") for at, tensor in pair.items()}
            check_axes("walawalkar", labels=(labels, "b"), **named)
            target = full(target).detach() if detach else full(target)
            apart.append(per_sample((full(feature) - target).square()))
    ensemble = mean_logits(student_logits_branches)
    ensemble = ensemble.detach() if detach else ensemble
    taught = [kd_loss(branch, ensemble, temperature=temperature) for branch in student_logits_branches]
    return {
        "ce": ce_share * cross_entropies(student_logits_branches, labels),
        "feature": feature_share * torch.stack(apart).sum(0),
        "kd": kd_share * torch.stack(taught).sum(0),
    }


class Module(nn.Module):
    """A 1x1 convolution for each compressed student and layer, into the pseudo-teacher's channels, and the loss.

    Args:
        student_features_branches: Shapes [c h w], for each student one a layer; h and w as the pseudo-teacher's.
    """

    def __init__(self, student_features_branches: list[list[Shape]]) -> None:
        super().__init__()
        first, *others = student_features_branches
        for features in others:
            if [shape[1:] for shape in features] != [shape[1:] for shape in first] or any(len(s) != 3 for s in first):
                raise SignalError(
                    f"student_features_branches: expected maps [c h w] of the sizes of {[list(s) for s in first]}, got "
                    f"{[list(s) for s in features]} (walawalkar). Name convolutional layers."
                )
        self.adapters = nn.ModuleList(
            nn.ModuleList(pointwise(own[0], target[0]) for own, target in zip(features, first)) for features in others
        )

    def forward(
        self,
        student_logits_branches: list[Float[Tensor, "b c"]],
        student_features_branches: list[list[Float[Tensor, "b _c _h _w"]]],
        labels: Int[Tensor, "b"],
        *,
        ce_share: float,
        feature_share: float,
        kd_share: float,
        temperature: float,
        detach: bool,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss of the adapted features."""
        first, *others = student_features_branches
        adapted = [
            [adapt(full(feature)) for adapt, feature in zip(adapters, features)]  # type: ignore[call-overload]
            for adapters, features in zip(self.adapters, others)
        ]
        return walawalkar_loss(
            student_logits_branches,
            [first, *adapted],
            labels,
            ce_share=ce_share,
            feature_share=feature_share,
            kd_share=kd_share,
            temperature=temperature,
            detach=detach,
        )
