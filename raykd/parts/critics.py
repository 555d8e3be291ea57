"""Critics: small networks that tell two sources of a signal apart, each trained by an Adam of its own."""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykd.parts.numeric import full
from raykd.parts.parallel import gather


class Critic(nn.Module):
    """A scorer that updates itself: other optimizers leave it out, a method's `after_forward` calls `update`.

    Its checkpoint holds Adam's state beside the weights. Scores may carry a student's gradient through it; only `update`
    moves its weights.

    Args:
        layers: What scores, `[b ...]` to `[b 1]`, or to `[b k]`, several scores. Without batch normalisation, so that a
            sample's score is its own.
        lr: Rate.
        betas: Decay of Adam's two moments, per update.
        weight_decay: Added to the gradient.
    """

    own_update = True

    def __init__(
        self, layers: nn.Module, *, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = layers
        self._weights = list(self.layers.parameters())
        self._adam = torch.optim.Adam(self._weights, lr=lr, betas=betas, weight_decay=weight_decay)

    def forward(self, signal: Float[Tensor, "b *p"]) -> Float[Tensor, "b *k"]:
        """A score a sample, or several, of any size."""
        score: Tensor = self.layers(full(signal))
        return score.squeeze(1)

    def update(self, losses: Float[Tensor, "b"] | Float[Tensor, ""]) -> None:
        """One step of Adam along the mean of `losses` over the samples of all workers; every worker calls it.

        Args:
            losses: Of this worker's samples, made of scores; one number counts as one sample.
        """
        grads = torch.autograd.grad(losses.sum(), self._weights)
        message = torch.cat([g.reshape(-1) for g in grads] + [grads[0].new_tensor([float(losses.numel())])])
        *total, count = gather(message[None]).sum(0).split([p.numel() for p in self._weights] + [1])
        for parameter, gradient in zip(self._weights, total):
            parameter.grad = (gradient / count).view_as(parameter)
        self._adam.step()
        self._adam.zero_grad()

    def get_extra_state(self) -> dict[str, Any]:
        """The state of Adam: tensors and numbers."""
        return self._adam.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Adam goes on from this state."""
        self._adam.load_state_dict(state)


class MapCritic(Critic):
    """Scores feature maps [b c h w] of any size: convolutions 3x3 of stride 2, the mean over positions, a linear layer.

    Args:
        channels: Of the maps.
        width: Channels of the first convolution, doubled by each further one.
        depth: Number of convolutions, at least 1.
        adam: Options of Critic.
    """

    def __init__(self, channels: int, *, width: int = 64, depth: int = 2, **adam: Any) -> None:
        widths = [channels] + [width * 2**i for i in range(depth)]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1)]
        super().__init__(nn.Sequential(*layers, *pooled), **adam)


class VectorCritic(Critic):
    """Scores vectors [b d]: hidden linear layers, a linear layer.

    Args:
        inputs: d.
        width: Of each hidden layer.
        depth: Number of hidden layers, at least 1.
        adam: Options of Critic.
    """

    def __init__(self, inputs: int, *, width: int = 64, depth: int = 2, **adam: Any) -> None:
        widths = [inputs] + [width] * depth
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
        super().__init__(nn.Sequential(*layers, nn.Linear(width, 1)), **adam)
