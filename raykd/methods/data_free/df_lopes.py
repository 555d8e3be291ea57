"""DF-Lopes: free pixels become images whose activations are drawn by a record of those that the training images had."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ConfigError, SignalError
from raykd.parts.checks import check_axes, same_length
from raykd.parts.numeric import full
from raykd.parts.records import load, pooled

NAME = "Data-free KD from activation records"
PAPER = "Lopes, Fenu, Starner: Data-Free Knowledge Distillation for Deep Neural Networks. arXiv:1710.07535 (2017)"
SECTION = "3.4"
SCHEME = "data_free"
LAYERS = ("logits",)
SYNTHESIS = {
    "generator": "pixels",
    "options": {"start": "grey", "noise": 0.1},
    "latent": 1,
    "mode": "bank",
    "steps": 1000,
    "lr": 0.07,
    "clip": True,
    "capacity": 64,
    "start": 64,
    "grow": "once",
    "real_data": "metadata: mean and covariance of the teacher's activations on its training images",
}


def df_lopes_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 8.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's class distribution from the teacher's on made images.

    temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        temperature: Softens both distributions, above 0; 8, of which we are not sure.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes whose record an image was drawn by; 0.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> df_lopes_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])

    References:
        arXiv:1710.07535, section 3.
    """
    check_axes("df-lopes", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    student = F.log_softmax(full(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full(teacher_logits) / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)


def images_loss(
    teacher_features: list[Float[Tensor, "b *_p"]],
    targets: Float[Tensor, "b t"],
    *,
    relu: bool = True,
) -> Float[Tensor, "b"]:
    """Penalises images whose activations are not those drawn.

    With f a layer's activations, of maps their means over places, d its number of them, and g its part of the targets:
    one layer: mean over d of (relu(g) - relu(f))^2; several: the sum of these, each / d

    Args:
        teacher_features: Activations of the images at each layer, [b d] or [b d h w]. The top layer (`logits`) by default; all
            layers: `layers=("stage1", ..., "logits")` and a record of these.
        targets: The activations wanted of each image, those of all layers one after the other.
        relu: Whether negative activations count as 0.

    Returns:
        Per sample, in units of squared activations.

    Raises:
        SignalError: The shapes do not fit, or a layer has neither vectors nor maps.

    Example:
        >>> images_loss([torch.tensor([[1.0, -5.0]])], torch.tensor([[3.0, -2.0]]))
        tensor([2.])

    References:
        arXiv:1710.07535, sections 3.1 and 3.2.

    Note:
        Of the authors' objectives, top layer and all layers; they have each place of a map as an activation, ours is the mean
        over places, so that the covariance stays small. Activations under dropout and spectral records are not offered. Their
        code draws by the transpose of the covariance's root, which gives another covariance. Their images begin as noise
        N(0.15, 0.1) on MNIST, ours as N(0.5, 0.1).
    """
    same_length("df-lopes", teacher_features=teacher_features)
    check_axes("df-lopes", targets=(targets, "b t"), **_axes(teacher_features))
    found = pooled([full(feature) for feature in teacher_features])
    if found.shape != targets.shape:
        raise SignalError(
            f"targets: expected {list(found.shape)} activations, got {list(targets.shape)} (df-lopes). Make the records of "
            "these layers."
        )
    wanted = full(targets)
    if relu:
        found, wanted = found.relu(), wanted.relu()
    sizes = [feature.shape[1] for feature in teacher_features]
    means = [part.mean(1) for part in (wanted - found).square().split(sizes, 1)]
    return torch.stack([mean / size for mean, size in zip(means, sizes)]).sum(0) if len(sizes) > 1 else means[0]


def _axes(features: list[Tensor]) -> dict[str, tuple[Tensor, str]]:
    """A layer has vectors or maps; each its own letters."""
    return {
        f"teacher_features[{i}]": (feature, f"b d{i} h{i} w{i}" if feature.ndim == 4 else f"b d{i}")
        for i, feature in enumerate(features)
    }


class Images(nn.Module):
    """Records of the activations that the training images had: of all of them, or of each class.

    Args:
        teacher_features: Shapes of the layers' activations, without the batch axis.
        records: Path of the file that `raykd.parts.records.Records.save` wrote; absolute, and readable where images are made.

    Raises:
        ConfigError: There is no such file, it is no record, or one of other layers.
    """

    def __init__(self, teacher_features: list[tuple[int, ...]], *, records: str = "") -> None:
        super().__init__()
        mean, covariance = load(records, "df-lopes")
        sizes = [shape[0] for shape in teacher_features]
        if mean.shape[-1] != sum(sizes):
            raise ConfigError(
                f"records: expected {sum(sizes)} activations ({' + '.join(map(str, sizes))} of the layers), got "
                f"{mean.shape[-1]} in {records} (df-lopes). Make records of the layers that the job names."
            )
        self.mean: Tensor
        self.root: Tensor
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("root", torch.from_numpy(_root(covariance)))

    def forward(self, teacher_features: list[Tensor], targets: Tensor, *, relu: bool) -> Tensor:
        return images_loss(teacher_features, targets, relu=relu)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root, also of a covariance in which some activations do not vary."""
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = (vectors * np.sqrt(values.clip(min=0.0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    return root


def targets(module: Images, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Activations for each image, `[b t]`: normal, by the record of its class, or of all where classes were not told apart."""
    mean, root, known = module.mean.cpu(), module.root.cpu(), labels.cpu()
    noise = torch.randn(len(known), mean.shape[-1], generator=generator, dtype=torch.float64).to(mean)
    if mean.ndim == 1:
        return mean + noise @ root
    if int(known.max()) >= len(mean):
        raise ConfigError(f"records: expected {int(known.max()) + 1} classes at least, got {len(mean)} (df-lopes).")
    found = torch.empty_like(noise)
    for label in known.unique().tolist():
        found[known == label] = mean[label] + noise[known == label] @ root[label]
    return found
