"""AFD, online: each peer makes its feature map pass for the other's before a critic, and peers share class probabilities."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.adversarial import passing, telling_apart
from raykd.parts.checks import check_axes
from raykd.parts.critics import MapCritic
from raykd.parts.numeric import full, to_smaller
from raykd.parts.parallel import gather

NAME = "AFD (online)"
PAPER = "Chung, Park, Kim, Kwak: Feature-map-level Online Adversarial Knowledge Distillation. ICML 2020, arXiv:2002.01775"
SECTION = "2.2"
SCHEME = "online"
LAYERS = ("stage-1",)


def afd_online_loss(
    student_logits: Float[Tensor, "b c"],
    peer_logits: Float[Tensor, "b c"],
    student_score: Float[Tensor, "b"],
    *,
    temperature: float = 3.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises class distributions unlike the peer's, and features that the critic can tell from the peer's.

    kl          = temperature^2 * KL(softmax(peer_logits / temperature) || softmax(student_logits / temperature))
    adversarial = (1 - student_score)^2

    Args:
        student_logits: Class scores.
        peer_logits: The same of the peer, fixed.
        student_score: What the critic says of the student's adapted feature: towards 1 the peer's, towards 0 the student's.
        temperature: Softens both distributions, above 0; the paper's 3.
        weight: Factor of the terms that the learner's optimizer follows, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Terms kl, in nats times temperature^2, and adversarial, without unit, per sample.

    Raises:
        SignalError: The shapes do not fit together.

    Example:
        >>> import torch
        >>> afd_online_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0.5]))
        {'kl': tensor([0.]), 'adversarial': tensor([0.2500])}

    References:
        arXiv:2002.01775

    Note:
        The paper's critic of a network takes that network's own feature for fake and the other's for real, and the network
        learns to pass for the other: least squares, as here. Wording the labels the other way, own for real, names the same two
        critics after the other network of each pair and changes no update. More than two peers learn in a circle:
        `exchange.graph="ring"`. No code was published.
    """
    given = {"student_logits": (student_logits, "b c"), "peer_logits": (peer_logits, "b c")}
    check_axes("afd-online", **given, student_score=(student_score, "b"))
    kl = kd_loss(student_logits, peer_logits, temperature=temperature)
    return {"kl": kl, "adversarial": passing(student_score, "least_squares")}


class _Adapter(nn.Module):
    """Brings the student's feature to the peer's channels, by a 1x1 convolution where they differ."""

    def __init__(self, student: Shape, peer: Shape, own_update: bool) -> None:
        super().__init__()
        self.own_update = own_update
        self.convolution = nn.Conv2d(student[0], peer[0], 1) if student[0] != peer[0] else nn.Identity()

    def forward(self, student: Tensor, peer: Tensor) -> tuple[Tensor, Tensor]:
        """Both features, of one shape: the larger map is average pooled."""
        student, peer = to_smaller(full(student), full(peer))
        return self.convolution(student), peer


class _Extractor(nn.Module):
    """An Adam that moves the adapter, and what lies below the student's feature, along the adversarial term alone.

    Its update follows the learner's own, with the gradient of the same forward.

    Args:
        lr: Rate.
        decay: Weight decay, in the gradient.
    """

    own_update = True

    def __init__(self, lr: float, decay: float) -> None:
        super().__init__()
        self.lr, self.decay = lr, decay
        self._adam: torch.optim.Adam | None = None
        self._state: dict[str, Any] = {}
        self._sums: list[Tensor | None] = []
        self._count = 0
        self._followed = 0  # the optimizer whose updates it follows

    def get_extra_state(self) -> dict[str, Any]:
        """The state of Adam: tensors and numbers."""
        return self._adam.state_dict() if self._adam is not None else self._state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Adam goes on from this state."""
        self._adam, self._state = None, state

    def follow(self, losses: Float[Tensor, "b"], learner: Any, adapter: nn.Module) -> None:
        """Moves down the adversarial term, by its gradient as it is now, right after the learner's coming update.

        Args:
            losses: The term of this worker's samples; where a batch comes in parts, of one part a call.
            learner: Whose student and optimizer.
            adapter: What moves along.
        """
        parameters = [p for p in (*learner.student.parameters(), *adapter.parameters()) if p.requires_grad]
        gradients = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
        if not self._sums:
            self._sums, self._count = [None] * len(parameters), 0
        if self._followed != id(learner.optimizer):
            self._followed = id(learner.optimizer)

            def moved(*_: Any) -> None:
                if self._sums:
                    self._move(parameters)

            learner.optimizer.register_step_post_hook(moved)
        self._sums = [g if total is None else total + g for total, g in zip(self._sums, gradients)]
        self._count += len(losses)

    def _move(self, parameters: list[nn.Parameter]) -> None:
        if self._adam is None:
            self._adam = torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.decay)
            if self._state:
                self._adam.load_state_dict(self._state)
        found = [(p, total) for p, total in zip(parameters, self._sums) if total is not None]
        kept, self._sums = [p.grad for p in parameters], []
        for parameter in parameters:
            parameter.grad = None
        flat = [total.reshape(-1) for _, total in found]
        message = torch.cat([*flat, flat[0].new_tensor([self._count])])
        *totals, samples = gather(message[None]).sum(0).split([p.numel() for p, _ in found] + [1])
        for (parameter, _), total in zip(found, totals):
            parameter.grad = (total / samples).view_as(parameter)
        self._adam.step()
        for parameter, gradient in zip(parameters, kept):
            parameter.grad = gradient


class Module(nn.Module):
    """An adapter, the critic of the edge from peer to student, and the loss.

    In each step the critic learns first, then the student passes for the peer before it. See `after_forward`.

    Args:
        student_feature: Shape [c h w] of the layer, before the classifier.
        peer_feature: The same of the peer; of two sizes the larger map is average pooled.
        separate_optimizer: The adversarial term has an Adam of its own, as in the paper, and reaches only the adapter and
            the student's layers up to the feature, whatever weight and schedule are; False: it is a term of the loss.
        adversarial_lr: Rate of that Adam and of the critic's.
        adversarial_decay: Weight decay of both, in the gradient.

    Note:
        The paper moves along the class probabilities first and then, slower, along the features; here both gradients are of
        one forward. Rate 2e-5 and weight decay 0.1 are the paper's as far as we know; the rate does not follow
        `training.scheduler`. The critic's architecture and the 1x1 adapter are ours: the paper's transfer layers, where shapes
        differ, stand on both sides.
    """

    def __init__(
        self,
        student_feature: Shape,
        peer_feature: Shape,
        *,
        separate_optimizer: bool = True,
        adversarial_lr: float = 2e-5,
        adversarial_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.adapter = _Adapter(student_feature, peer_feature, separate_optimizer)
        self.critic = MapCritic(peer_feature[0], lr=adversarial_lr, weight_decay=adversarial_decay)
        self.extractor = _Extractor(adversarial_lr, adversarial_decay) if separate_optimizer else None

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        peer_logits: Float[Tensor, "b c"],
        student_feature: Float[Tensor, "b cs hs ws"],
        peer_feature: Float[Tensor, "b cp hp wp"],
        *,
        temperature: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss under the critic as it is; without its adversarial term where that has an optimizer of its own."""
        if self.extractor is not None:
            return {"kl": kd_loss(student_logits, peer_logits, temperature=temperature)}
        score = self.critic(self.adapter(student_feature, peer_feature)[0])
        return afd_online_loss(student_logits, peer_logits, score, temperature=temperature)


def after_forward(module: Module, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
    """Trains the critic on this batch: (1 - critic(peer's))^2 + critic(student's)^2. Then the student, by an own optimizer."""
    found = next(own for own in learner.losses.values() if own.module is module).values(signals)
    student, peer = module.adapter(found["student_feature"], found["peer_feature"])
    module.critic.update(telling_apart(module.critic(peer.detach()), module.critic(student.detach()), "least_squares"))
    if module.extractor is not None:
        module.extractor.follow(passing(module.critic(student), "least_squares"), learner, module.adapter)
