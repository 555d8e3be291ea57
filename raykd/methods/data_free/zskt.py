"""ZSKT: a generator looks for images on which the student believes other things than the teacher; the student learns there."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full, to_smaller

NAME = "ZSKT"
PAPER = "Micaelli, Storkey: Zero-shot Knowledge Transfer via Adversarial Belief Matching. NeurIPS 2019, arXiv:1905.09768"
SECTION = "3.4"
SCHEME = "data_free"
LAYERS = "stages"
SYNTHESIS = {
    "generator": "dcgan",
    "options": {"last": "norm"},
    "latent": 100,
    "generator_steps": 1,
    "student_steps": 10,
    "noise": "round",
    "lr": 1e-3,
    "scheduler": "cosine",
    "student_mode": "train",
}


def zskt_loss(
    student_logits: Float[Tensor, "b c"],
    student_attentions: list[Float[Tensor, "b _hs _ws"]],
    teacher_logits: Float[Tensor, "b c"],
    teacher_attentions: list[Float[Tensor, "b _ht _wt"]],
    *,
    attention: float = 250.0,
    mode: str = "code",
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises beliefs, and attention maps of unit length, that differ from the teacher's on made images.

    With q = attention map / its norm, flattened, and c classes:
    code: kl: KL(p_T || p_S) / c; attention: attention * sum over layers of mean over places of (q_S - q_T)^2
    paper: kl: KL(p_T || p_S); attention: attention * sum over layers of ||q_S - q_T||

    Args:
        student_logits: Class scores.
        student_attentions: One map a sample and layer, not normalised; of two sizes the larger is average pooled.
        teacher_logits: The same of the teacher.
        teacher_attentions: The same of the teacher.
        attention: Factor of that term, the paper's beta, at least 0; 250 in paper and code.
        mode: `code` (as the authors' code) or `paper` (equation 2).
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes wanted, which this generator is not told; 0.

    Returns:
        Terms `kl`, in nats, and `attention`, per sample.

    Raises:
        SignalError: The shapes of logits, the lengths of lists or the batches differ.
        ConfigError: The mode is unknown.

    Example:
        >>> alike = [torch.tensor([[[3.0, 4.0]]])], torch.zeros(1, 2), [torch.tensor([[[6.0, 8.0]]])]
        >>> zskt_loss(torch.zeros(1, 2), *alike)
        {'kl': tensor([0.]), 'attention': tensor([0.])}

    References:
        arXiv:1905.09768, equations 1 and 2.

    Note:
        The authors' code averages the divergence over classes too, and squares the distance of the maps, so that its two
        terms weigh other shares than the paper's. They report about 2 points by the attention term. Gradients of student and
        generator are clipped to a norm of 5 in their code: set training.clip_norm for the student; the generator's are not
        clipped here. One draw of noise is a round's: the student's steps are all on the images that the generator makes of it
        after its own.
    """
    check_choice("zskt", mode=mode, known=("code", "paper"))
    check_axes("zskt", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    same_length("zskt", student_attentions=student_attentions, teacher_attentions=teacher_attentions)
    apart = []
    for i, (student, teacher) in enumerate(zip(student_attentions, teacher_attentions)):
        check_axes(
            "zskt",
            student_logits=(student_logits, "b c"),
            **{f"student_attentions[{i}]": (student, "b hs ws"), f"teacher_attentions[{i}]": (teacher, "b ht wt")},
        )
        student, teacher = to_smaller(full(student), full(teacher))
        gap = F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.flatten(1), dim=1)
        apart.append(gap.square().mean(1) if mode == "code" else torch.linalg.vector_norm(gap, dim=1))
    return {"kl": _divergence(student_logits, teacher_logits, mode), "attention": attention * torch.stack(apart).sum(0)}


def images_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    mode: str = "code",
) -> Float[Tensor, "b"]:
    """Penalises images on which the student believes what the teacher does.

    -KL(softmax(teacher_logits) || softmax(student_logits)); in the mode `code` / classes

    Args:
        student_logits: Class scores of the images.
        teacher_logits: The same of the teacher.
        mode: `code` (as the authors' code) or `paper` (equation 1); the same option as the student's loss has.

    Returns:
        Per sample, in nats.

    Raises:
        SignalError: The shapes differ.
        ConfigError: The mode is unknown.

    Example:
        >>> images_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]]), mode="paper")
        tensor([-0.6931])

    References:
        arXiv:1905.09768, equation 1 and algorithm 1.

    Note:
        The attention term is not the generator's.
    """
    check_choice("zskt", mode=mode, known=("code", "paper"))
    check_axes("zskt", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    return -_divergence(student_logits, teacher_logits, mode)


def _divergence(student_logits: Tensor, teacher_logits: Tensor, mode: str) -> Tensor:
    student, teacher = F.log_softmax(full(student_logits), dim=1), F.log_softmax(full(teacher_logits), dim=1)
    found = (teacher.exp() * (teacher - student)).sum(1)
    return found / student.shape[1] if mode == "code" else found
