"""DeepInversion: free pixels become images with the statistics that the teacher's batch norms kept of its training images."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full

NAME = "DeepInversion"
PAPER = "Yin et al.: Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion. CVPR 2020, arXiv:1912.08795"
SECTION = "3.4"
SCHEME = "data_free"
SYNTHESIS = {
    "generator": "pixels",
    "latent": 1,
    "mode": "bank",
    "steps": 2000,
    "lr": 0.1,
    "jitter": 2,
    "flip": False,
    "clip": True,
    "keep": "best",
    "capacity": 64,
    "start": 64,
    "grow": "once",
}


def deepinversion_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's class distribution from the teacher's on made images.

    temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        temperature: Softens both distributions, above 0; 3, see the note.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes wanted of the images; 0.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> deepinversion_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])

    References:
        arXiv:1912.08795, equation 1.

    Note:
        We are not sure of the paper's temperature; its public code has no training of the student.
    """
    check_axes("deepinversion", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    student = F.log_softmax(full(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)


def images_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    teacher_norms: list[Float[Tensor, "4 _n"]],
    normalised_images: Float[Tensor, "b _ch _h _w"],
    labels: Int[Tensor, "b"],
    *,
    norms: float = 10.0,
    first_norm: float = 10.0,
    tv_l1: float = 0.0,
    tv_l2: float = 2.5e-5,
    l2: float = 3e-8,
    adi: float = 0.0,
    adi_temperature: float = 3.0,
    mode: str = "code",
) -> dict[str, Float[Tensor, "b"] | Float[Tensor, ""]]:
    """Penalises images that the teacher does not take for the classes wanted, whose statistics at its batch norms are not those
    of its training, and that are rough or large; with `adi` above 0 also those on which the student agrees with the teacher.

    cross_entropy: -log softmax(teacher_logits)[labels]
    norms: norms * sum over batch norms of factor * (||mean - running mean|| + ||variance - running variance||)
    tv_l1: tv_l1 * 255 * sum over four directions of the mean of |x - neighbour| / 255
    tv_l2: tv_l2 * sum over four directions of ||x - neighbour||, over all images together
    l2: l2 * ||x||
    adaptive: adi * (1 - JS(softmax(teacher_logits / T), softmax(student_logits / T))), T = adi_temperature

    Args:
        student_logits: Class scores of the images.
        teacher_logits: The same of the teacher.
        teacher_norms: Of each batch norm, in the order of the forward: mean and variance over batch and places of what enters
            it, and its running mean and variance.
        normalised_images: x, made images as the data are normalised.
        labels: The classes wanted.
        norms: Factor of that term, at least 0; 10, and 0.01 for ImageNet (100 and 0.05 are the defaults of the code).
        first_norm: Factor of the first batch norm within it; 10 (ImageNet code), 1 in the code for CIFAR-10.
        tv_l1: Factor of that term, at least 0.
        tv_l2: Factor of that term, at least 0; 2.5e-5 for CIFAR-10, 1e-4 for ImageNet.
        l2: Factor of that term, at least 0; 3e-8 for CIFAR-10 (0 in its code), 1e-5 for ImageNet.
        adi: Factor of the adaptive term, at least 0; 0 is plain DeepInversion, 10 is the paper's adaptive variant.
        adi_temperature: T, above 0; 3 in the authors' code.
        mode: `code` (as the authors' code, see the note) or `paper` (equation 9, in nats).

    Returns:
        Terms whose factor is not 0; `norms` and `tv_l2` couple the batch, the others are per sample.

    Raises:
        SignalError: The shapes do not fit, or there is no batch norm.
        ConfigError: The mode is unknown.

    Example:
        >>> found = images_loss(
        ...     torch.zeros(1, 2),
        ...     torch.zeros(1, 2),
        ...     [torch.tensor([[3.0], [5.0], [0.0], [1.0]])],
        ...     torch.ones(1, 1, 2, 2),
        ...     torch.tensor([0]),
        ... )
        >>> found["cross_entropy"], found["norms"], found["tv_l2"]
        (tensor([0.6931]), tensor(700.), tensor(0.))

    References:
        arXiv:1912.08795, equations 2 to 9.

    Note:
        In the code the divergences of JS are turned round (KL of the mean from each side), probabilities and their mean are
        clamped to 0.01..0.99 and the result, a mean over the batch, to 0..1; here each sample's is clamped. The paper names no
        temperature of its own there. The code takes all norms of images after they were rolled (`synthesis.jitter`), so that
        their edges meet; here those of the images. For ImageNet it has jitter 30, flip, a rate of 0.25 that falls along a
        cosine, betas (0.5, 0.9) and two resolutions, of which the last is not offered; for CIFAR-10 no clipping, and it means
        to keep the best images but keeps the last. We are not sure of the paper's `l2` and `adi` for CIFAR-10.
        The adaptive variant needs a student that learns meanwhile: set synthesis.grow to `always` and start to a few batches.
    """
    check_choice("deepinversion", mode=mode, known=("code", "paper"))
    same_length("deepinversion", teacher_norms=teacher_norms)
    check_axes(
        "deepinversion",
        student_logits=(student_logits, "b c"),
        teacher_logits=(teacher_logits, "b c"),
        normalised_images=(normalised_images, "b ch h w"),
        labels=(labels, "b"),
    )
    images, teacher = full(normalised_images), full(teacher_logits)
    found = {"cross_entropy": F.cross_entropy(teacher, labels, reduction="none")}
    if norms:
        found["norms"] = norms * _statistics(teacher_norms, first_norm)
    steps = (
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    if tv_l1:
        found["tv_l1"] = tv_l1 * torch.stack([step.abs().flatten(1).mean(1) for step in steps]).sum(0)
    if tv_l2:
        found["tv_l2"] = tv_l2 * torch.stack([torch.linalg.vector_norm(step) for step in steps]).sum()
    if l2:
        found["l2"] = l2 * torch.linalg.vector_norm(images.flatten(1), dim=1)
    if adi:
        student = F.log_softmax(full(student_logits) / adi_temperature, dim=1)
        found["adaptive"] = adi * (1 - _apart(F.log_softmax(teacher / adi_temperature, dim=1), student, mode))
    return found


def _statistics(teacher_norms: list[Tensor], first: float) -> Tensor:
    found = []
    for i, statistics in enumerate(teacher_norms):
        check_axes("deepinversion", **{f"teacher_norms[{i}]": (statistics, "s n")})
        if len(statistics) != 4:
            raise SignalError(
                f"teacher_norms[{i}]: expected mean, variance, running mean and running variance [4 n], got "
                f"{list(statistics.shape)} (deepinversion)."
            )
        mean, variance, kept_mean, kept_variance = full(statistics)
        apart = torch.linalg.vector_norm(mean - kept_mean) + torch.linalg.vector_norm(variance - kept_variance)
        found.append(first * apart if i == 0 else apart)
    return torch.stack(found).sum()


def _apart(teacher: Tensor, student: Tensor, mode: str) -> Tensor:
    """Jensen-Shannon divergence of two logarithms of distributions, in nats; or what the authors' code has in its place."""
    if mode == "paper":
        mean = torch.logaddexp(teacher, student) - math.log(2.0)
        return 0.5 * (teacher.exp() * (teacher - mean) + student.exp() * (student - mean)).sum(1)
    p, q = teacher.exp(), student.exp()
    p, q, mean = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    return (mean * (mean.log() - 0.5 * (p.log() + q.log()))).sum(1).clamp(0.0, 1.0)
