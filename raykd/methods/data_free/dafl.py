"""DAFL: a generator makes images of all classes, of which the teacher is sure; the student follows the teacher on them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.checks import check_axes, check_choice
from raykd.parts.numeric import full

NAME = "DAFL"
PAPER = "Chen et al.: Data-Free Learning of Student Networks. ICCV 2019, arXiv:1904.01186"
SECTION = "3.4"
SCHEME = "data_free"
SYNTHESIS = {
    "generator": "dcgan",
    "options": {"last": "tanh_norm"},
    "latent": 100,
    "generator_steps": 1,
    "student_steps": 1,
    "lr": 1e-3,
}


def dafl_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's class distribution from the teacher's on made images.

    temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        temperature: Softens both distributions, above 0; 1 in the authors' code.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes wanted, which this generator is not told; 0.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> dafl_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])

    References:
        arXiv:1904.01186, equation 2.

    Note:
        The paper writes a cross-entropy of the teacher's probabilities, which differs from the divergence by a constant.
    """
    check_axes("dafl", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    student = F.log_softmax(full(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)


def images_loss(
    teacher_logits: Float[Tensor, "b c"],
    teacher_embedding: Float[Tensor, "b d"],
    *,
    one_hot: float = 1.0,
    entropy: float = 5.0,
    activation: float = 0.1,
    mode: str = "code",
) -> dict[str, Float[Tensor, "b"] | Float[Tensor, ""]]:
    """Penalises images of which the teacher is unsure, that excite it little, and batches in which classes are missing.

    With p = softmax(teacher_logits), m = its mean over the batch, c classes and d axes of the embedding:
    one_hot: one_hot * -log max(p)
    activation: activation * -sum |teacher_embedding| / d; in the mode `paper` the sum
    entropy: entropy * sum m log10(m); in the mode `paper` entropy * sum m log(m) / c

    Args:
        teacher_logits: Class scores of the images.
        teacher_embedding: What the teacher's classifier receives.
        one_hot: Factor of that term, at least 0; 1 for MNIST, 0.05 for CIFAR-10, 0.5 for CIFAR-100 (authors' scripts).
        entropy: Factor of that term, at least 0; 5 for MNIST and CIFAR-10, 20 for CIFAR-100.
        activation: Factor of that term, at least 0; 0.1 for MNIST and CIFAR-100, 0.01 for CIFAR-10.
        mode: `code` (as the authors' code) or `paper` (equations 4 and 5).

    Returns:
        Terms `one_hot` and `activation` per sample; `entropy` couples the batch.

    Raises:
        SignalError: The batches differ in size.
        ConfigError: The mode is unknown.

    Example:
        >>> found = images_loss(torch.zeros(2, 10), torch.ones(2, 3))
        >>> found["one_hot"], found["entropy"]
        (tensor([2.3026, 2.3026]), tensor(-5.0000))

    References:
        arXiv:1904.01186, equations 3 to 6.

    Note:
        The authors' feature is that before the first linear layer, ours the input of the last one; they are the same in a
        network with one linear layer. In their code the student learns from the generator's own batch of the same step; here
        it gets a new one. With the scale of the paper's terms the factors are other ones; those above are the code's.
        The entropy is of each worker's share of the batch.
    """
    check_axes("dafl", teacher_logits=(teacher_logits, "b c"), teacher_embedding=(teacher_embedding, "b d"))
    check_choice("dafl", mode=mode, known=("code", "paper"))
    known, excited = F.log_softmax(full(teacher_logits), dim=1), full(teacher_embedding).abs()
    mean = torch.logsumexp(known, dim=0) - math.log(len(known))  # its logarithm: a class may be missing
    scale = math.log(10.0) if mode == "code" else float(known.shape[1])
    return {
        "one_hot": -one_hot * known.amax(1),
        "activation": -activation * (excited.mean(1) if mode == "code" else excited.sum(1)),
        "entropy": entropy * (mean.exp() * mean).sum() / scale,
    }
