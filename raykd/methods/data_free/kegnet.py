"""KegNet: told class and noise, a generator makes images from which both can be read back; the student learns on them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.parts.checks import check_axes, check_choice
from raykd.parts.inversion import softened
from raykd.parts.numeric import full

NAME = "KegNet"
PAPER = "Yoo et al.: Knowledge Extraction with No Observable Data. NeurIPS 2019"
SECTION = "3.5"
SCHEME = "data_free"
SYNTHESIS = {
    "generator": "conditional",
    "options": {"join": "onehot", "last": "tanh_each"},
    "latent": 10,
    "before": 20000,
    "generator_steps": 0,
    "student_steps": 1,
    "lr": 1e-3,
}


def kegnet_loss(
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
        temperature: Softens both distributions, above 0; 1.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes wanted of the images; 0.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> kegnet_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])

    References:
        Yoo et al. NeurIPS 2019, section 4.

    Note:
        The authors train the student, a teacher of compressed layers, on images of five generators at once, each with a seed
        of its own; here of one.
    """
    return softened("kegnet", student_logits, teacher_logits, temperature)


def images_loss(
    teacher_logits: Float[Tensor, "b c"],
    images: Float[Tensor, "b _k _h _w"],
    latents: Float[Tensor, "b d"],
    decoded: Float[Tensor, "b d"],
    labels: Int[Tensor, "b"],
    *,
    reconstruction: float = 1.0,
    diversity: float = 1.0,
    mode: str = "code",
) -> dict[str, Float[Tensor, "b"] | Float[Tensor, ""]]:
    """Penalises images in which the teacher does not see the class wanted, from which the noise cannot be told, and that are
    alike though their noise is not.

    With x the images, each channel of each brought to mean 0 and variance 1, flattened, and z the latents:
    classes: KL(labels || softmax(teacher_logits)), which is their cross-entropy
    reconstruction: reconstruction * mean over axes of (decoded - latents)^2
    diversity: diversity * exp(-mean over pairs i, j of d(z_i, z_j) * d(x_i, x_j)); in the mode `code` d is the mean of
    (z_i - z_j)^2 and of |x_i - x_j| over axes, in the mode `norm` the Euclidean distance of both

    Args:
        teacher_logits: Class scores of the images.
        images: In units [0, 1].
        latents: The noise of which they were made.
        decoded: What the decoder makes of them.
        labels: The classes wanted.
        reconstruction: Factor of that term, at least 0; 1.
        diversity: Factor of that term, at least 0; 1 for SVHN, 10 for Fashion-MNIST, 0 for MNIST in the authors' code.
        mode: `code` (as the authors' code) or `norm`.

    Returns:
        Terms `classes` and `reconstruction` per sample; `diversity` couples the batch.

    Raises:
        SignalError: The batches, or latents and decoded, differ in size.
        ConfigError: The mode is unknown.

    Example:
        >>> images, noise = torch.rand(2, 1, 2, 2), torch.ones(2, 3)
        >>> images_loss(torch.zeros(2, 10), images, noise, noise, torch.tensor([0, 1]))
        {'classes': tensor([2.3026, 2.3026]), 'reconstruction': tensor([0., 0.]), 'diversity': tensor(1.)}

    References:
        Yoo et al. NeurIPS 2019, section 3.

    Note:
        `norm` is how a survey writes the distances; we are not sure which of the two is the paper's. The authors train the
        generator for 200 epochs of 100 batches of 256 (`synthesis.before`) at a rate of 1e-3 for MNIST, 1e-2 for Fashion-MNIST
        and SVHN. Their generators end in images of mean 0 and variance 1, which the student's normalisation takes as they are.
    """
    check_choice("kegnet", mode=mode, known=("code", "norm"))
    check_axes(
        "kegnet",
        teacher_logits=(teacher_logits, "b c"),
        images=(images, "b k h w"),
        latents=(latents, "b d"),
        decoded=(decoded, "b d"),
        labels=(labels, "b"),
    )
    made, noise = _plain(images).flatten(1), full(latents)
    exact = "donot_use_mm_for_euclid_dist"
    if mode == "code":
        apart = (noise[:, None] - noise).square().mean(2) * torch.cdist(made, made, p=1.0) / made.shape[1]
    else:
        apart = torch.cdist(noise, noise, compute_mode=exact) * torch.cdist(made, made, compute_mode=exact)
    return {
        "classes": F.cross_entropy(full(teacher_logits), labels, reduction="none"),
        "reconstruction": reconstruction * (full(decoded) - noise).square().mean(1),
        "diversity": diversity * torch.exp(-apart.mean()),
    }


class Images(nn.Module):
    """The decoder: linear layers with ELU and batch norm between them, from an image to its noise.

    Args:
        images: (c, h, w).
        latents: (d,).
        decoder_layers: Hidden layers after the first, at least 0; 1 for MNIST, 3 for Fashion-MNIST and SVHN.
        units: Of each hidden layer; 120.
    """

    def __init__(self, images: tuple[int, ...], latents: tuple[int, ...], *, decoder_layers: int = 1, units: int = 120) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside in [images[0] * images[1] * images[2], *[units] * decoder_layers]:
            layers += [nn.Linear(inside, units), nn.ELU(), nn.BatchNorm1d(units)]
        self.decoder = nn.Sequential(*layers, nn.Linear(units, latents[0]))

    def forward(
        self,
        teacher_logits: Float[Tensor, "b c"],
        images: Float[Tensor, "b _k _h _w"],
        latents: Float[Tensor, "b d"],
        labels: Int[Tensor, "b"],
        *,
        reconstruction: float,
        diversity: float,
        mode: str,
    ) -> dict[str, Float[Tensor, "b"] | Float[Tensor, ""]]:
        """The terms of images_loss."""
        dtype = next(self.parameters()).dtype
        decoded = self.decoder(_plain(images).flatten(1).to(dtype))
        return images_loss(
            teacher_logits, images, latents, decoded, labels, reconstruction=reconstruction, diversity=diversity, mode=mode
        )


def _plain(images: Tensor) -> Tensor:
    """Each channel of each image with mean 0 and variance 1."""
    images = full(images)
    variance, mean = torch.var_mean(images, (2, 3), correction=0, keepdim=True)
    return (images - mean) / (variance + 1e-5).sqrt()
