"""Network grafting: blocks of the student learn in place of the teacher's among its others, alone, then in a growing chain."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ConfigError, SignalError
from raykd.parts.adapters import Shape
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.grafts import Block, fold
from raykd.parts.numeric import full

NAME = "Progressive network grafting"
PAPER = "Shen et al.: Progressive Network Grafting for Few-Shot Knowledge Distillation. AAAI 2021, arXiv:2012.04915"
SECTION = "3.4"
SCHEME = "offline"
LAYERS = "stages"


def network_grafting_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    normalise: bool = True,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the distance of the grafted network's logits from the teacher's.

    normalise: sum over classes of (student_logits / |student_logits| - teacher_logits / |teacher_logits|)^2,
    else the mean over classes of (student_logits - teacher_logits)^2

    Args:
        student_logits: Class scores of the teacher with blocks of the student in it, at the end of the student.
        teacher_logits: The same of the teacher.
        normalise: Whether logits of a sample are brought to length 1; the paper's way.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy; 0, as the images have no labels here.

    Returns:
        Per sample; normalised from 0 to 4.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> network_grafting_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([2.])

    References:
        arXiv:2012.04915

    Note:
        Unsure which of the two the paper's tables are of; the authors' settings normalise. Ours: an adapter is there only
        where teacher and student have different channels (`adapters`); it has no bias, so that it goes into the convolutions
        after it exactly; it does so as soon as two blocks are joined, where the paper merges at the end. All parts learn at
        one rate, and each graft begins with an optimizer that remembers nothing.
    """
    check_axes("network-grafting", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"))
    student, teacher = full(student_logits), full(teacher_logits)
    if not normalise:
        return (student - teacher).square().mean(1)
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum(1)


class Module(nn.Module):
    """The adapters of each layer at which the networks are cut, and which blocks are grafted now.

    With B blocks there are 2 B - 1 grafts: each block alone, first to last; then the first two together, the first three, and
    so on to all, which is the student. Grafts alone share their part of the training evenly, and so do the others.

    Args:
        student_features: Shapes [c h w] at the layers.
        teacher_features: The same of the teacher, of the same sizes.
        student_blocks: The student's blocks between the layers.
        teacher_tails: What comes after each layer in the teacher, frozen.
        adapters: `where_needed`: where the channels differ; `always`: at every layer.
        block_share: Share of the training in which blocks are grafted alone; 0: they never are.
    """

    started: Tensor

    def __init__(
        self,
        student_features: list[Shape],
        teacher_features: list[Shape],
        student_blocks: list[Block],
        teacher_tails: list[nn.Module],
        *,
        adapters: Literal["where_needed", "always"] = "where_needed",
        block_share: float = 0.5,
    ) -> None:
        super().__init__()
        check_choice("network-grafting", adapters=adapters, known=("where_needed", "always"))
        same_length("network-grafting", student_features=student_features, teacher_features=teacher_features)
        if not 0 <= block_share < 1:
            raise ConfigError(f"block_share: expected a share from 0 to below 1, got {block_share} (network-grafting).")
        for i, (own, theirs) in enumerate(zip(student_features, teacher_features)):
            _check_cut(i, own, theirs, adapters == "always", student_blocks[i + 1])
        pairs = [(own[0], theirs[0]) for own, theirs in zip(student_features, teacher_features)]
        self.inward = nn.ModuleList(_adapter(theirs, own, adapters) for own, theirs in pairs)
        self.outward = nn.ModuleList(_adapter(own, theirs, adapters) for own, theirs in pairs)
        self.blocks, self.tails, self.block_share = list(student_blocks), tuple(teacher_tails), block_share
        alone, last = len(student_blocks) if block_share else 0, len(student_blocks) - 1
        self.grafts = [(i, i) for i in range(alone)] + [(0, i) for i in range(1, last + 1)]
        self.alone, self.now = alone, 0
        self.register_buffer("started", torch.tensor(-1))

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        student_features: list[Float[Tensor, "b _cs _h _w"]],
        teacher_logits: Float[Tensor, "b c"],
        teacher_features: list[Float[Tensor, "b _ct _h _w"]],
        *,
        normalise: bool,
    ) -> Float[Tensor, "b"]:
        """The loss of the graft of this step; teacher_features went into the student's forward before."""
        last = self.grafts[self.now][1]
        logits = student_logits
        if last < len(self.tails):
            logits = self.tails[last](self.outward[last](full(student_features[last])))
        return network_grafting_loss(logits, teacher_logits, normalise=normalise)

    def graft_of(self, step: int, steps: int) -> int:
        """Number of the graft that a step of a training of so many steps is of."""
        joined, done = len(self.grafts) - self.alone, step / steps
        if done < self.block_share:
            return int(done / self.block_share * self.alone)
        return self.alone + int((done - self.block_share) / (1 - self.block_share) * joined)

    def enter(self, graft: int) -> None:
        """Begins a graft: where it joins a block to those before it, the adapters between go into the block's weights."""
        for number in range(int(self.started) + 1, graft + 1):
            if number < self.alone:
                continue
            joined = self.grafts[number][1]
            inward, outward = self.inward[joined - 1], self.outward[joined - 1]
            if isinstance(inward, nn.Conv2d) and isinstance(outward, nn.Conv2d):
                fold(self.blocks[joined].readers, inward.weight[:, :, 0, 0] @ outward.weight[:, :, 0, 0])
        self.started.fill_(graft)


def step(module: Module, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
    """Begins the graft whose turn it is; batch norms and dropout of all blocks but those grafted are as in evaluation."""
    steps, begun = learner.total_steps, int(module.started)
    if begun < 0 and len({module.graft_of(i, steps) for i in range(steps)}) < len(module.grafts):
        wanted = f"a step or more for each of {len(module.grafts)} grafts"
        raise ConfigError(f"training.epochs: expected {wanted}, got {steps} steps in all (network-grafting). Raise it.")
    module.now = module.graft_of(learner.step_count, steps)
    if module.now != begun:
        module.enter(module.now)
        learner.optimizer.state.clear()
    first, last = module.grafts[module.now]
    for place, block in enumerate(module.blocks):
        for part in block.modules:
            part.training = first <= place <= last


def before_forward(
    module: Module,
    modify: Callable[[int, Callable[[Tensor], Tensor]], None],
    teacher_logits: Tensor,
    teacher_features: list[Tensor],
) -> None:
    """Lets the first grafted block read what the teacher's block before it says."""
    first = module.grafts[module.now][0]
    if first:
        entering = module.inward[first - 1](full(teacher_features[first - 1]))
        modify(first - 1, lambda own: entering.to(own))


def _adapter(inputs: int, outputs: int, adapters: str) -> nn.Module:
    if inputs == outputs and adapters == "where_needed":
        return nn.Identity()
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def _check_cut(place: int, own: Shape, theirs: Shape, always: bool, after: Block) -> None:
    """Raises SignalError where a block of one network cannot stand in the other."""
    where = f"layer {place + 1} of the cut (network-grafting)"
    if len(own) != 3 or len(theirs) != 3 or own[1:] != theirs[1:]:
        raise SignalError(
            f"student_features: expected maps [c h w] of the teacher's size {list(theirs[1:])}, got {list(own)}, {where}. "
            "Choose a student of the same strides, or other layers."
        )
    if (always or own[0] != theirs[0]) and not after.readers:
        raise SignalError(
            f"student_features: expected convolutions alone to read them, which an adapter can go into, got {own[0]} channels "
            f"(the teacher's are {theirs[0]}) that something else reads too, {where}. Choose a student of as many channels as "
            "the teacher there and adapters='where_needed', or one with projections, such as crd_resnet."
        )
