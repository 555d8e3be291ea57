"""ANC: the student's embedding passes for the teacher's before a critic that is held back; its logits match; no labels."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykd.errors import ConfigError
from raykd.parts.adapters import Shape
from raykd.parts.adversarial import passing, telling_apart
from raykd.parts.checks import check_axes, check_choice
from raykd.parts.critics import Critic
from raykd.parts.numeric import full

NAME = "ANC"
PAPER = "Belagiannis, Farshad, Galasso: Adversarial Network Compression. ECCV Workshops 2018, arXiv:1803.10750"
SECTION = "3.5"
SCHEME = "offline"


def anc_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    student_score: Float[Tensor, "b"],
    *,
    gan: Literal["saturating", "non_saturating", "least_squares"] = "saturating",
    logits_weight: float = 0.1,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises logits unlike the teacher's, and embeddings that the critic can tell from the teacher's.

    logits      = logits_weight * sum over classes of (student_logits - teacher_logits)^2
    adversarial = log(1 - sigmoid(student_score)), or as `gan` says

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        student_score: What the critic says of the student's embedding: the higher, the more the teacher's.
        gan: Form of the game: saturating is the paper's equation; non_saturating, -log sigmoid(student_score), has the same
            critic and a gradient that lasts while the critic wins; least_squares is (1 - student_score)^2.
        logits_weight: The paper's lambda; 0.1 is ours.
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner; 0, as the paper trains without labels.

    Returns:
        Terms logits, in squared class scores, and adversarial, in nats or without unit, per sample; the saturating form is
        below 0.

    Raises:
        SignalError: The shapes do not fit together.
        ConfigError: No such form.

    Example:
        >>> import torch
        >>> anc_loss(torch.full((1, 2), 3.0), torch.ones(1, 2), torch.zeros(1), gan="least_squares", logits_weight=1.0)
        {'logits': tensor([8.]), 'adversarial': tensor([1.])}

    References:
        arXiv:1803.10750

    Note:
        The value of lambda is not known to us. Public code of others trains with the non-saturating form.
    """
    given = {"student_logits": (student_logits, "b c"), "teacher_logits": (teacher_logits, "b c")}
    check_axes("anc", **given, student_score=(student_score, "b"))
    apart = (full(student_logits) - full(teacher_logits)).square().sum(1)
    return {"logits": logits_weight * apart, "adversarial": passing(student_score, gan)}


def _judge(inputs: int) -> nn.Sequential:
    """Hidden layers of 128, 256 and 128 units with a ReLU each, and a linear layer to the score."""
    layers: list[nn.Module] = []
    for before, after in ((inputs, 128), (128, 256), (256, 128)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 1))


class Module(nn.Module):
    """The critic, a linear layer from the student's embedding to the teacher's width where they differ, and the loss.

    In each step the critic learns first, see `after_forward`; the linear layer learns with the student.

    Args:
        student_embedding: Shape [d].
        teacher_embedding: The same of the teacher.
        gan: As in the loss.
        dropout: Share of the student's embedding that is zeroed, the rest scaled up, before the critic; 0 to below 1.
        critic_lr: Rate of the critic's Adam.
        regulariser: What holds the critic back: adversarial (the student's samples once more, as if they were the
            teacher's), l2 or l1 (of its weights), none.
        regulariser_weight: Factor of l2 and l1; adversarial has none, as in the paper.

    Raises:
        ConfigError: A dropout out of range, no such regulariser.

    Note:
        As far as we know the paper's critic has the three hidden layers here and adversarial samples are its choice among the
        three regularisers. Rate, `regulariser_weight` and the share of dropout are ours. Critic and student each
        see a dropout of their own; public code of others leaves it out where the critic learns what is fake.
    """

    def __init__(
        self,
        student_embedding: Shape,
        teacher_embedding: Shape,
        *,
        gan: Literal["saturating", "non_saturating", "least_squares"],
        dropout: float = 0.5,
        critic_lr: float = 1e-4,
        regulariser: Literal["adversarial", "l2", "l1", "none"] = "adversarial",
        regulariser_weight: float = 1e-3,
    ) -> None:
        super().__init__()
        check_choice("anc", regulariser=regulariser, known=("adversarial", "l2", "l1", "none"))
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout: expected 0 to below 1, got {dropout} (anc). It is the share that is zeroed.")
        self.gan, self.dropout = gan, dropout
        self.regulariser, self.regulariser_weight = regulariser, regulariser_weight
        (own,), (theirs,) = student_embedding, teacher_embedding
        self.adapter = nn.Linear(own, theirs) if own != theirs else nn.Identity()
        self.critic = Critic(_judge(theirs), lr=critic_lr)
        self.draws: Tensor
        self.register_buffer("draws", torch.randint(2**31, ()))  # seeds the dropout of the critic's next update

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        teacher_logits: Float[Tensor, "b c"],
        student_embedding: Float[Tensor, "b ds"],
        teacher_embedding: Float[Tensor, "b dt"],
        generator: torch.Generator,
        *,
        logits_weight: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss under the critic as it is, with dropout on the student's embedding."""
        score = self.critic(self.shown(student_embedding, generator))
        return anc_loss(student_logits, teacher_logits, score, gan=self.gan, logits_weight=logits_weight)

    def shown(self, embedding: Float[Tensor, "b ds"], generator: torch.Generator) -> Float[Tensor, "b dt"]:
        """What the critic sees of the student: its embedding after dropout, at the teacher's width."""
        embedding = full(embedding)
        if self.dropout:
            kept = torch.rand(embedding.shape, generator=generator, dtype=torch.float64) >= self.dropout
            embedding = embedding * kept.to(embedding) / (1 - self.dropout)
        adapted: Tensor = self.adapter(embedding)
        return adapted

    def against(self, student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
        """What the critic minimises, with what holds it back."""
        fake = self.critic(student)
        losses = telling_apart(self.critic(teacher), fake, self.gan)
        if self.regulariser == "adversarial":
            return losses + passing(fake, "least_squares" if self.gan == "least_squares" else "non_saturating")
        power = {"l1": 1, "l2": 2}.get(self.regulariser)
        if power is None:
            return losses
        size = torch.stack([p.abs().pow(power).sum() for p in self.critic.parameters()]).sum()
        return losses + self.regulariser_weight * size


def after_forward(module: Module, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
    """Trains the critic on this batch: the teacher's embedding for real, the student's for fake."""
    found = next(own for own in learner.losses.values() if own.module is module).values(signals)
    generator = torch.Generator().manual_seed(int(module.draws))
    with torch.no_grad():
        module.draws += 1
        student = module.shown(found["student_embedding"], generator)
    module.critic.update(module.against(student, full(found["teacher_embedding"])))
