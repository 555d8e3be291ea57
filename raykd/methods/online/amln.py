"""AMLN: block by block, peers make their features pass for each other's before critics, and lead them to the last block."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.adversarial import passing, telling_apart
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.critics import MapCritic
from raykd.parts.numeric import full, per_sample, to_smaller

NAME = "AMLN"
PAPER = (
    "Zhang, Lu, Gong, Luo, Liu: AMLN: Adversarial-based Mutual Learning Network for Online Knowledge Distillation. ECCV 2020, "
    "doi:10.1007/978-3-030-58610-2_10"
)
SECTION = "2.2"
SCHEME = "online"
LAYERS = "stages"
_FORMS = {"least_squares": "least_squares", "cross_entropy": "non_saturating"}  # gan -> form of the game


def amln_loss(
    student_logits: Float[Tensor, "b c"],
    peer_logits: Float[Tensor, "b c"],
    student_scores: list[Float[Tensor, "b"]],
    student_aligned: list[Float[Tensor, "b d h w"]],
    peer_final: Float[Tensor, "b d h w"],
    *,
    temperature: float = 3.0,
    gan: Literal["least_squares", "cross_entropy"] = "least_squares",
    adversarial_weight: float = 1.0,
    alignment_weight: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises class distributions unlike the peer's, blocks that critics can tell from its, and early blocks unlike its last.

    kl          = temperature^2 * KL(softmax(peer_logits / temperature) || softmax(student_logits / temperature))
    adversarial = adversarial_weight * sum over blocks of (1 - score)^2, or with `cross_entropy` of -log sigmoid(score)
    alignment   = alignment_weight * sum over blocks but the last of the mean square of aligned - peer_final

    Args:
        student_logits: Class scores.
        peer_logits: The same of the peer, fixed.
        student_scores: What each block's critic says of the student's adapted feature: the higher, the more the peer's.
        student_aligned: Features of every block but the last, brought to the shape of the peer's last.
        peer_final: Feature of the peer's last block, fixed.
        temperature: Softens both distributions, above 0; 3 is ours.
        gan: Form of the adversarial term.
        adversarial_weight: Factor of term adversarial.
        alignment_weight: Factor of term alignment.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Terms kl, in nats times temperature^2, adversarial, without unit or in nats, and alignment, in the feature's unit
        squared, per sample.

    Raises:
        SignalError: There are fewer than two blocks, or the shapes do not fit together.
        ConfigError: No such form.

    Example:
        >>> import torch
        >>> logits, scores, one = torch.zeros(1, 2), [torch.tensor([0.5]), torch.tensor([1.0])], torch.ones(1, 1, 1, 1)
        >>> amln_loss(logits, logits, scores, [3 * one], one)
        {'kl': tensor([0.]), 'adversarial': tensor([0.2500]), 'alignment': tensor([4.])}

    References:
        doi:10.1007/978-3-030-58610-2_10

    Note:
        No code was published and details are not known to us: the form of the adversarial terms (both usual ones are here),
        all weights, the temperature, which features the critics compare (here a block's own of both peers), the rate of the
        critics, and the architectures of critics, adapters and aligners are ours.
    """
    check_choice("amln", gan=gan, known=("least_squares", "cross_entropy"))
    if len(student_scores) != len(student_aligned) + 1 or not student_aligned:
        raise SignalError(
            f"student_scores: expected one a block, at least two, and one aligned feature fewer, got {len(student_scores)} "
            f"and {len(student_aligned)} (amln). Set `layers` to two or more."
        )
    given = {
        "student_logits": (student_logits, "b c"),
        "peer_logits": (peer_logits, "b c"),
        "peer_final": (peer_final, "b d h w"),
    }
    given |= {f"student_scores[{i}]": (score, "b") for i, score in enumerate(student_scores)}
    given |= {f"student_aligned[{i}]": (feature, "b d h w") for i, feature in enumerate(student_aligned)}
    check_axes("amln", **given)
    fooled = torch.stack([passing(score, _FORMS[gan]) for score in student_scores]).sum(0)
    apart = torch.stack([per_sample((full(a) - full(peer_final)).square()) for a in student_aligned]).sum(0)
    return {
        "kl": kd_loss(student_logits, peer_logits, temperature=temperature),
        "adversarial": adversarial_weight * fooled,
        "alignment": alignment_weight * apart,
    }


def _convolution(student: Shape, peer: Shape) -> nn.Module:
    """From the student's channels to the peer's, where they differ."""
    return nn.Conv2d(student[0], peer[0], 1) if student[0] != peer[0] else nn.Identity()


def _aligner(student: Shape, final: Shape) -> nn.Sequential:
    """3x3 convolutions of stride 2 with a ReLU each, while the map is at least twice as large as wanted, then a 1x1 one."""
    layers: list[nn.Module] = []
    channels, height, width = student
    while min(height // final[1], width // final[2]) >= 2:
        layers += [nn.Conv2d(channels, final[0], 3, stride=2, padding=1), nn.ReLU()]
        channels, height, width = final[0], -(-height // 2), -(-width // 2)
    return nn.Sequential(*layers, nn.Conv2d(channels, final[0], 1))


class Module(nn.Module):
    """For each block an adapter and a critic, for each but the last an aligner; and the loss.

    In each step the critics learn first, see `after_forward`; adapters and aligners learn with the student.

    Args:
        student_features: Shapes [c h w], one a block.
        peer_features: The same of the peer; of two sizes the larger map is average pooled.
        gan: As in the loss.
        critic_lr: Rate of the critics' Adam.
    """

    def __init__(
        self,
        student_features: list[Shape],
        peer_features: list[Shape],
        *,
        gan: Literal["least_squares", "cross_entropy"],
        critic_lr: float = 2e-5,
    ) -> None:
        super().__init__()
        same_length("amln", student_features=student_features, peer_features=peer_features)
        self.gan = gan
        pairs = list(zip(student_features, peer_features))
        self.adapters = nn.ModuleList(_convolution(student, peer) for student, peer in pairs)
        self.aligners = nn.ModuleList(_aligner(student, peer_features[-1]) for student in student_features[:-1])
        self.critics = nn.ModuleList(MapCritic(peer[0], lr=critic_lr) for peer in peer_features)

    def adapted(self, students: list[Tensor], peers: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each block the student's adapted feature and the peer's, of one shape."""
        pairs = [to_smaller(full(student), full(peer)) for student, peer in zip(students, peers)]
        return [(adapt(student), peer) for adapt, (student, peer) in zip(self.adapters, pairs)]

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        peer_logits: Float[Tensor, "b c"],
        student_features: list[Float[Tensor, "b _cs _hs _ws"]],
        peer_features: list[Float[Tensor, "b _cp _hp _wp"]],
        *,
        temperature: float,
        adversarial_weight: float,
        alignment_weight: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss under the critics as they are."""
        pairs = self.adapted(student_features, peer_features)
        scores = [critic(student) for critic, (student, _) in zip(self.critics, pairs)]
        final = full(peer_features[-1])
        aligned = [align(full(student)) for align, student in zip(self.aligners, student_features)]
        size = tuple(min(axis) for axis in zip(final.shape[2:], *(a.shape[2:] for a in aligned)))
        return amln_loss(
            student_logits,
            peer_logits,
            scores,
            [F.adaptive_avg_pool2d(a, size) for a in aligned],
            F.adaptive_avg_pool2d(final, size),
            temperature=temperature,
            gan=self.gan,
            adversarial_weight=adversarial_weight,
            alignment_weight=alignment_weight,
        )


def after_forward(module: Module, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
    """Trains each block's critic on this batch: the peer's feature towards 1, the student's towards 0."""
    found = next(own for own in learner.losses.values() if own.module is module).values(signals)
    with torch.no_grad():
        pairs = module.adapted(found["student_features"], found["peer_features"])
    for critic, (student, peer) in zip(cast(Iterable[MapCritic], module.critics), pairs):
        critic.update(telling_apart(critic(peer), critic(student), _FORMS[module.gan]))
