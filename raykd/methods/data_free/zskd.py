"""ZSKD: free pixels become images of class probabilities, drawn as the teacher's last layer says that classes are alike."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ConfigError
from raykd.parts.checks import check_axes
from raykd.parts.numeric import full

NAME = "ZSKD"
PAPER = "Nayak et al.: Zero-Shot Knowledge Distillation in Deep Networks. ICML 2019, arXiv:1905.08114"
SECTION = "3.4"
SCHEME = "data_free"
SYNTHESIS = {
    "generator": "pixels",
    "options": {"start": "grey", "noise": 0.29},
    "latent": 1,
    "mode": "bank",
    "steps": 1500,
    "lr": 1e-2,
    "clip": True,
    "capacity": 64,
    "start": 64,
    "grow": "once",
}
LEAST = 1e-4  # added to each concentration, as in the authors' code: a class least like another has 0


def zskd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 20.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's class distribution from the teacher's on made images.

    temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        temperature: Softens both distributions, above 0; the same as in the making of images, 20 in the paper.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes whose row of similarities an image was drawn by; 0.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> zskd_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])

    References:
        arXiv:1905.08114, equation 5.

    Note:
        The paper trains on scaled, rotated and moved copies of its images too; ours are as they were made.
    """
    check_axes("zskd", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    student = F.log_softmax(full(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)


def images_loss(
    teacher_logits: Float[Tensor, "b c"],
    targets: Float[Tensor, "b c"],
    *,
    temperature: float = 20.0,
) -> Float[Tensor, "b"]:
    """Penalises images for which the teacher's class distribution is not the one drawn.

    -sum over classes of targets * log softmax(teacher_logits / temperature)

    Args:
        teacher_logits: Class scores of the images.
        targets: The distribution wanted of each image.
        temperature: Softens the teacher's distribution, above 0; the same option as the student's loss has.

    Returns:
        Per sample, in nats.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> images_loss(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]]))
        tensor([0.6931])

    References:
        arXiv:1905.08114, equation 4.

    Note:
        The rate of 0.01 is between those we know of, 0.001 in the authors' code for CIFAR-10 and 0.1; we are not sure of the
        paper's. Their code stretches a whole batch of images to 0..1 after each update, ours clips each pixel.
    """
    check_axes("zskd", teacher_logits=(teacher_logits, "b c"), targets=(targets, "b c"))
    return -(full(targets) * F.log_softmax(full(teacher_logits) / temperature, dim=1)).sum(1)


class Images(nn.Module):
    """The concentrations of a Dirichlet distribution for each class, of what the teacher's last layer knows.

    Row k: cosines between the weights of class k and those of every class, stretched to 0..1.

    Args:
        teacher_classifier: Weights of the teacher's last linear layer, [c d].
        betas: Factors of the concentrations, above 0; the images of a batch take them in turn. Small ones draw distributions
            with few classes.

    Raises:
        ConfigError: A factor is not positive, or there is none.

    Note:
        Half of the images for each of 1.0 and 0.1, as in the paper. In the authors' code the second is lost: rows that were
        divided by 10 are stretched to 0..1 again.
    """

    def __init__(self, teacher_classifier: Float[Tensor, "c d"], *, betas: tuple[float, ...] = (1.0, 0.1)) -> None:
        super().__init__()
        if not betas or min(betas) <= 0:
            raise ConfigError(f"betas: expected positive factors, at least one, got {list(betas)} (zskd).")
        self.betas = tuple(betas)
        rows = F.normalize(teacher_classifier.detach().double(), dim=1)
        alike = rows @ rows.T
        least, most = alike.amin(1, keepdim=True), alike.amax(1, keepdim=True)
        self.concentration: Tensor
        self.register_buffer("concentration", (alike - least) / (most - least).clamp_min(1e-12))

    def forward(self, teacher_logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
        return images_loss(teacher_logits, targets, temperature=temperature)


def targets(module: Images, labels: Tensor, generator: torch.Generator) -> Tensor:
    """A class distribution for each image, `[b c]`: Dirichlet, by the row of its class."""
    known = labels.cpu().numpy()
    scales = np.resize(np.asarray(module.betas), len(known))
    alpha = scales[:, None] * module.concentration.cpu().double().numpy()[known] + LEAST
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn = np.random.default_rng(seed).standard_gamma(alpha)
    own = (np.arange(len(known)), known)
    drawn[own] = np.maximum(drawn[own], np.finfo(np.float64).tiny)  # where all are too small for a float
    return torch.from_numpy(drawn / drawn.sum(1, keepdims=True))
