"""KDCL: peers that see the same images augmented differently follow one strong target made of all their outputs."""

from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.methods.response.kd import kd_loss
from raykd.parts.adapters import Shape
from raykd.parts.checks import check_axes, check_choice
from raykd.parts.numeric import full
from raykd.parts.parallel import gather

NAME = "KDCL"
PAPER = (
    "Guo, Wang, Wu, Yu, Liang, Hu, Luo: Online Knowledge Distillation via Collaborative Learning. CVPR 2020, "
    "doi:10.1109/CVPR42600.2020.01103"
)
SECTION = "2.2"
SCHEME = "online"

TARGETS = ("naive", "linear", "minlogit", "general")


def kdcl_loss(
    student_logits: Float[Tensor, "b c"],
    peers_logits: list[Float[Tensor, "b c"]],
    labels: Int[Tensor, "b"],
    network_weights: Float[Tensor, "m"],
    *,
    target: Literal["naive", "linear", "minlogit", "general"] = "minlogit",
    temperature: float = 2.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's softened class distribution from that of a target made of all networks.

    temperature^2 * KL(softmax(z_t / temperature) || softmax(z_1 / temperature)), with z_1 the student's logits, z_2, ..., z_m
    the peers', y the label, and z_t of each sample
    naive:    the z_i of least cross-entropy with y
    linear:   sum over i of a_i * z_i, with a the convex weights under which its cross-entropy with y is least
    minlogit: for each class k the least z_i[k] - z_i[y]
    general:  sum over i of w_i * z_i, with w the network_weights

    Args:
        student_logits: Class scores of the student; as a part of the target they are fixed.
        peers_logits: The same of each peer.
        labels: True classes.
        network_weights: w, the student's first, adding up to 1.
        target: Which of the paper's four.
        temperature: Softens both distributions, above 0; the paper's 2 for CIFAR-100.
        weight: Factor of the loss, the paper's lambda of 1, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ, or the weights are not as many as the networks.
        ConfigError: No such target.

    Example:
        >>> import torch
        >>> even, sure, half = torch.zeros(1, 2), torch.tensor([[100.0, 0.0]]), torch.full((2,), 0.5)
        >>> kdcl_loss(even, [sure], torch.tensor([0]), half)
        tensor([2.7726])

    References:
        doi:10.1109/CVPR42600.2020.01103

    Note:
        Each network of the paper sees an augmentation of its own: `exchange.views = "own"`. The default is the target without
        a search or a memory; the paper finds linear and minlogit best on ImageNet and general on CIFAR-100. Unsure: the
        temperature for ImageNet, and whether general combines logits, as here and as linear does, or probabilities. The
        problem of linear is solved for each sample: for two networks exactly, for more by 30 rounds over their pairs, which end
        short of the least where logits are large. The plain mean of the logits, which public code takes, is `general` in its
        first epoch.
    """
    check_choice("kdcl", target=target, known=TARGETS)
    if len(network_weights) != len(peers_logits) + 1 or network_weights.ndim != 1 or not peers_logits:
        raise SignalError(
            f"network_weights: expected [{len(peers_logits) + 1}] of the student and at least one peer, got "
            f"{list(network_weights.shape)} (kdcl). Give one for each network."
        )
    for i, logits in enumerate(peers_logits):
        named = {f"peers_logits[{i}]": (logits, "b c")}
        check_axes("kdcl", student_logits=(student_logits, "b c"), labels=(labels, "b"), **named)
    networks = torch.stack([full(logits).detach() for logits in (student_logits, *peers_logits)])
    if target == "naive":
        aim = _best(networks, labels)
    elif target == "minlogit":
        aim = _above_label(networks, labels).amin(0)
    elif target == "general":
        aim = torch.einsum("m,mbc->bc", full(network_weights).to(networks.dtype), networks)
    else:
        aim = torch.einsum("mb,mbc->bc", _convex(networks, labels), networks.double()).to(networks.dtype)
    return kd_loss(student_logits, aim, temperature=temperature)


def _best(networks: Float[Tensor, "m b c"], labels: Int[Tensor, "b"]) -> Float[Tensor, "b c"]:
    """For each sample the logits of least cross-entropy."""
    given = F.log_softmax(networks, dim=2).gather(2, labels.expand(len(networks), -1)[..., None]).squeeze(2)
    return networks[given.argmax(0), torch.arange(len(labels), device=labels.device)]


def _above_label(networks: Float[Tensor, "m b c"], labels: Int[Tensor, "b"]) -> Float[Tensor, "m b c"]:
    """How far each class's logit lies above the label's."""
    return networks - networks.gather(2, labels.expand(len(networks), -1)[..., None])


def _convex(networks: Float[Tensor, "m b c"], labels: Int[Tensor, "b"]) -> Float[Tensor, "m b"]:
    """Weights of each sample, at least 0 and adding up to 1, of the combination of least cross-entropy; float64.

    Moves weight between two networks at a time, by as much as is best: a convex function of one number, whose minimum lies
    where its slope vanishes.
    """
    values = _above_label(networks.double(), labels)
    weights = torch.full(values.shape[:2], 1 / len(values), dtype=values.dtype, device=values.device)
    rounds, steps = (1, 60) if len(values) == 2 else (30, 15)
    for i, j in [*combinations(range(len(values)), 2)] * rounds:
        here = torch.einsum("mb,mbc->bc", weights, values)
        moved = _least(here, values[i] - values[j], -weights[i], weights[j], steps)
        weights = weights.index_add(0, torch.tensor([i, j], device=values.device), torch.stack([moved, -moved]))
    return weights


def _least(here: Tensor, way: Tensor, low: Tensor, high: Tensor, steps: int) -> Float[Tensor, "b"]:
    """The s between low and high where logsumexp(here + s * way) is least; Newton's method, kept within shrinking bounds."""

    def slopes(s: Tensor) -> tuple[Tensor, Tensor]:
        p = F.softmax(here + s[:, None] * way, dim=1)
        first = (p * way).sum(1)
        return first, (p * (way - first[:, None]).square()).sum(1)

    at_low, at_high = slopes(low)[0] >= 0, slopes(high)[0] <= 0
    left, right, s = low, high, (low + high) / 2
    for _ in range(steps):
        first, second = slopes(s)
        left, right = torch.where(first < 0, s, left), torch.where(first > 0, s, right)
        newton = s - first / second
        within = (newton >= left) & (newton <= right)
        s = torch.where(within, newton, (left + right) / 2)
    return torch.where(at_low, low, torch.where(at_high, high, s))


class Module(nn.Module):
    """How the networks err together, the weights of `general` that follow, and the loss.

    Buffers: `network_weights` [m], the student's first, alike on all workers; and what is counted within an epoch on this
    worker: `errors` [m m] and `seen` [].

    Args:
        peers_logits: Shapes [c], one a peer.
    """

    network_weights: Tensor
    errors: Tensor
    seen: Tensor

    def __init__(self, peers_logits: list[Shape]) -> None:
        super().__init__()
        networks = len(peers_logits) + 1
        self.register_buffer("network_weights", torch.full((networks,), 1 / networks))
        self.register_buffer("errors", torch.zeros(networks, networks))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        peers_logits: list[Float[Tensor, "b c"]],
        labels: Int[Tensor, "b"],
        *,
        target: Literal["naive", "linear", "minlogit", "general"],
        temperature: float,
    ) -> Float[Tensor, "b"]:
        """The loss under the weights as they are; in training, `general` counts the batch.

        The paper measures errors on validation images; here they are those of the epoch's training batches, augmented as each
        network sees them. Once a peer is lost, the others count alike.
        """
        whole = len(peers_logits) + 1 == len(self.network_weights)
        if not whole:
            weights = self.network_weights.new_full((len(peers_logits) + 1,), 1 / (len(peers_logits) + 1))
        else:
            weights = self.network_weights.clone()
        loss = kdcl_loss(student_logits, peers_logits, labels, weights, target=target, temperature=temperature)
        if self.training and target == "general" and whole:
            self._count([student_logits, *peers_logits], labels)
        return loss

    @torch.no_grad()
    def _count(self, networks: list[Tensor], labels: Tensor) -> None:
        """Adds inner products of the networks' errors, each its probabilities minus one at the label."""
        probabilities = F.softmax(torch.stack([full(logits) for logits in networks]), dim=2)
        errors = (probabilities - F.one_hot(labels, probabilities.shape[2])).flatten(1).to(self.errors.dtype)
        self.errors += errors @ errors.T
        self.seen += len(labels)


def on_epoch(module: Module, epoch: int) -> None:
    """Turns what was counted, on all workers together, into the weights of `general`.

    With C the mean product of errors, w = the row sums of its inverse over their sum, the weights under which the combination's
    squared error is least; negative ones become 0.
    """
    errors, seen = gather(module.errors[None]).sum(0).double().cpu(), int(gather(module.seen[None]).sum())
    if seen:
        weights = torch.linalg.pinv(errors / seen, hermitian=True).sum(1).clamp_min(0)
        if weights.sum() > 0:
            module.network_weights.copy_(weights / weights.sum())
    module.errors.zero_()
    module.seen.zero_()
