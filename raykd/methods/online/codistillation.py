"""Codistillation: copies of a model trained apart follow the mean prediction of the others, of some time ago."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from raykd.parts.aggregators import mean_logits, mean_probs
from raykd.parts.checks import check_axes, check_choice
from raykd.parts.numeric import full, per_sample

NAME = "Codistillation"
PAPER = (
    "Anil, Pereyra, Passos, Ormandi, Dahl, Hinton: Large scale distributed neural network training through online "
    "distillation. ICLR 2018, arXiv:1804.03235"
)
SECTION = "2.2"
SCHEME = "online"


def codistillation_loss(
    student_logits: Float[Tensor, "b *p c"],
    peers_logits: list[Float[Tensor, "b *p c"]],
    *,
    mean: Literal["probs", "logits"] = "probs",
    temperature: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises the cross-entropy of the student's class distribution under the peers' mean.

    With p = softmax(logits / temperature) and q the mean over peers of their p:
    -temperature^2 * sum over classes of q * log p_student; mean `logits`: q = softmax(mean of their logits / temperature)

    Args:
        student_logits: Class scores, classes last; axes between batch and classes are positions.
        peers_logits: The same of each peer, fixed.
        mean: What is averaged: `probs`, the paper's, or `logits`.
        temperature: Softens the distributions, above 0; the paper's 1.
        weight: Factor of the loss, applied by the learner; the paper's 1.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Per sample, in nats times temperature^2; the mean over positions, if there are any. At least the entropy of q, not 0.

    Raises:
        SignalError: The shapes differ.
        ConfigError: No such mean.

    Example:
        >>> import torch
        >>> even, sure = torch.zeros(1, 2), torch.tensor([[50.0, 0.0]])
        >>> codistillation_loss(even, [even, sure])
        tensor([0.6931])

    References:
        arXiv:1804.03235

    Note:
        The loss is the small part of the method. Its peers learn from parts of the data of their own (`exchange.shards =
        "disjoint"`), and each keeps copies of the others that are renewed every so many steps (`exchange.what = "weights"`,
        `exchange.every`) and answer in evaluation mode. The paper leaves the term out of the first steps: `schedule =
        "start(E)"` does, by epochs; it names no length that fits all data. Only `probs` is in the paper.
    """
    check_choice("codistillation", mean=mean, known=("probs", "logits"))
    for i, logits in enumerate(peers_logits):
        named = {f"peers_logits[{i}]": (logits, "b *p c")}
        check_axes("codistillation", student_logits=(student_logits, "b *p c"), **named)
    even = torch.ones(len(peers_logits), dtype=torch.float64, device=student_logits.device)
    peers = [logits.detach() for logits in peers_logits]
    if mean == "probs":
        target = mean_probs(peers, even, temperature=temperature)
    else:
        target = mean_logits(peers, even)
    q = F.softmax(target / temperature, dim=-1)
    return temperature**2 * per_sample(-(q * F.log_softmax(full(student_logits) / temperature, dim=-1)).sum(-1))
