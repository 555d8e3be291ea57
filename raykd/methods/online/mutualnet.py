"""MutualNet: one network at narrower widths and lower resolutions learns from its own output at full width."""

from jaxtyping import Float
from torch import Tensor

from raykd.methods.response.kd import kd_loss
from raykd.parts.branches import check_branches
from raykd.parts.numeric import full

NAME = "MutualNet"
PAPER = (
    "Yang, Zhu, Chen, Yan, Zhang, Willis: MutualNet: Adaptive ConvNet via Mutual Learning from Network Width and Resolution. "
    "ECCV 2020, arXiv:1909.12978"
)
SECTION = "2.2"
SCHEME = "online"
BRANCHING = {"kind": "widths", "count": 4, "least": 0.25}


def mutualnet_loss(
    student_logits_branches: list[Float[Tensor, "b c"]],
    *,
    temperature: float = 1.0,
    detach: bool = True,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises narrower widths whose class distribution differs from that of the full width.

    temperature^2 * sum over widths w >= 1 of
    KL(softmax(student_logits_branches[0] / temperature) || softmax(student_logits_branches[w] / temperature))

    Args:
        student_logits_branches: Class scores at each width, the full one's first.
        temperature: Softens the distributions, above 0; the paper's 1.
        detach: Whether the full width is a target without gradient, as in the paper.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the full width's cross-entropy, applied by the learner.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: Fewer than two widths, or the shapes differ.

    Example:
        >>> import torch
        >>> mutualnet_loss([torch.zeros(1, 2), torch.zeros(1, 2)])
        tensor([0.])

    References:
        arXiv:1909.12978

    Note:
        The branching draws widths and resolutions: in each step the full width at full resolution, the least width and two
        random ones, each at a drawn resolution. Widths are multiples of 0.05, where the authors' code draws from the whole
        range. One update follows the sum of all losses, as in the paper. The full width is deployed; another width needs batch
        statistics of its own, measured after the training.
    """
    check_branches("mutualnet", student_logits_branches)
    target, *narrower = (full(branch) for branch in student_logits_branches)
    target = target.detach() if detach else target
    found = [kd_loss(branch, target, temperature=temperature) for branch in narrower]
    return sum(found[1:], found[0])
