"""Fukuda et al.: soft labels of several teachers, weighed, switched from batch to batch, or drawn for each sample."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.aggregators import mean_probs
from raykd.parts.checks import check_axes, check_choice
from raykd.parts.numeric import full, per_sample
from raykd.parts.shares import shares

NAME = "MT-Fukuda"
PAPER = (
    "Fukuda, Suzuki, Kurata, Thomas, Cui, Ramabhadran: Efficient Knowledge Distillation from an Ensemble of Teachers. "
    "Interspeech 2017"
)
SECTION = "3.1"
SCHEME = "offline"
SPARSE = True


def mt_fukuda_loss(
    student_logits: Float[Tensor, "b *p c"],
    teachers_logits: list[Float[Tensor, "b *p c"]],
    generator: torch.Generator,
    *,
    mode: Literal["weighted", "switch", "augment"] = "weighted",
    teacher_weights: tuple[float, ...] = (),
    temperature: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the cross-entropy of the student's class distribution under the teachers'.

    With p = softmax(logits / temperature), H(p, q) = -sum over classes of p log q and w the teachers' weights:
    temperature^2 * sum over m of w_m * H(pT_m, pS), or temperature^2 * H(pT_m, pS) of one teacher m drawn with chances w

    Args:
        student_logits: Class scores, classes last; axes between batch and classes are positions.
        teachers_logits: The same of each teacher.
        generator: Draws the teachers of `switch` and `augment`.
        mode: `weighted` hears all teachers at once, `switch` one drawn for the batch, `augment` one drawn for each sample.
        teacher_weights: One a teacher, in the loss's order; empty: all alike. In `switch` and `augment` the chances.
        temperature: Softens the distributions, above 0; the paper's 1.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner; the paper learns from soft labels alone.

    Returns:
        Per sample, in nats times temperature^2; the mean over positions, if there are any. At least the entropy of the
        teachers' distribution, not 0.

    Raises:
        SignalError: The shapes differ.
        ConfigError: No such mode, or weights that do not fit the teachers.

    Example:
        >>> import torch
        >>> even = torch.zeros(1, 2)
        >>> mt_fukuda_loss(even, [even, torch.tensor([[9.0, 0.0]])], torch.Generator())
        tensor([0.6931])

    References:
        doi:10.21437/Interspeech.2017-614

    Note:
        The paper's own two techniques are `switch` and `augment`; `weighted` is the combination they are compared with, and
        what the survey names. Its augmentation passes over the data once for each teacher's labels; drawing a teacher for
        each sample and step is the same in expectation and leaves the length of an epoch alone. Temperature^2 is 1 in the
        paper.
    """
    check_choice("mt-fukuda", mode=mode, known=("weighted", "switch", "augment"))
    for i, logits in enumerate(teachers_logits):
        check_axes("mt-fukuda", student_logits=(student_logits, "b *p c"), **{f"teachers_logits[{i}]": (logits, "b *p c")})
    weights = shares("mt-fukuda", teacher_weights, len(teachers_logits))
    student = F.log_softmax(full(student_logits) / temperature, dim=-1)
    if mode == "weighted":
        mixed = mean_probs(teachers_logits, weights.to(student.device), temperature=temperature)
        teacher = (mixed / temperature).exp()
    else:
        teacher = F.softmax(_drawn(teachers_logits, weights, generator, mode) / temperature, dim=-1)
    return temperature**2 * per_sample(-(teacher * student).sum(-1))


def _drawn(logits: list[Tensor], weights: Tensor, generator: torch.Generator, mode: str) -> Tensor:
    """Logits of one teacher for all samples, or of one for each."""
    if mode == "switch":
        return full(logits[int(torch.multinomial(weights, 1, generator=generator))])
    samples = len(logits[0])
    chosen = torch.multinomial(weights, samples, replacement=True, generator=generator).to(logits[0].device)
    return torch.stack([full(z) for z in logits])[chosen, torch.arange(samples, device=chosen.device)]
