"""AT: the student looks where the teacher looks."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full, to_smaller

NAME = "AT"
PAPER = (
    "Zagoruyko, Komodakis: Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks "
    "via Attention Transfer. ICLR 2017, arXiv:1612.03928"
)
SECTION = "1.2"
SCHEME = "offline"
LAYERS = "stages"


def at_loss(
    student_attentions: list[Float[Tensor, "b _hs _ws"]],
    teacher_attentions: list[Float[Tensor, "b _ht _wt"]],
    *,
    mode: str = "code",
    weight: float = 1000.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises attention maps of unit length that differ from the teacher's, summed over layers.

    With q = attention / ||attention|| of the flattened map:
    code: sum over layers of mean over places of (qS - qT)^2; paper: sum over layers of ||qS - qT|| / 2

    Args:
        student_attentions: One map a sample and layer, not normalised; of two sizes the larger is average pooled.
        teacher_attentions: The same of the teacher.
        mode: `code` (as the authors' code and the CIFAR-100 literature) or `paper` (equation 2).
        weight: Factor of the loss, the paper's beta, applied by the learner; 1000 in both modes.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Per sample, without unit.

    Raises:
        SignalError: The lists differ in length, or a batch in size.
        ConfigError: The mode is unknown.

    Example:
        >>> import torch
        >>> at_loss([torch.tensor([[[1.0, 0.0]]])], [torch.tensor([[[0.0, 7.0]]])])
        tensor([1.])

    References:
        arXiv:1612.03928

    Note:
        The mean over places makes `code` depend on the size of the maps: a weight tuned on one size does not carry over.
        Where sizes differ the authors' code pools the features, we pool the maps, which are what travels.
    """
    check_choice("at", mode=mode, known=("code", "paper"))
    same_length("at", student_attentions=student_attentions, teacher_attentions=teacher_attentions)
    losses = []
    for i, (student, teacher) in enumerate(zip(student_attentions, teacher_attentions)):
        check_axes("at", **{f"student_attentions[{i}]": (student, "b hs ws"), f"teacher_attentions[{i}]": (teacher, "b ht wt")})
        student, teacher = to_smaller(full(student), full(teacher))
        apart = F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.flatten(1), dim=1)
        losses.append(apart.square().mean(1) if mode == "code" else torch.linalg.vector_norm(apart, dim=1) / 2)
    return torch.stack(losses).sum(0)
