"""CRD: an embedding picks its own image out of a memory of the other network's embeddings."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.parts.adapters import LinearEmbed, Shape
from raykd.parts.checks import check_axes
from raykd.parts.memory import OtherClasses, bank_scores, blend_rows, uniform_bank
from raykd.parts.numeric import full
from raykd.parts.parallel import gather

NAME = "CRD"
PAPER = "Tian, Krishnan, Isola: Contrastive Representation Distillation. ICLR 2020, arXiv:1910.10699"
SECTION = "1.3"
SCHEME = "offline"


def crd_loss(
    student_embedding: Float[Tensor, "b d"],
    teacher_embedding: Float[Tensor, "b d"],
    student_bank: Float[Tensor, "n d"],
    teacher_bank: Float[Tensor, "n d"],
    candidates: Int[Tensor, "b k"],
    student_z: Float[Tensor, ""],
    teacher_z: Float[Tensor, ""],
    *,
    temperature: float = 0.07,
    weight: float = 0.8,
    ce_weight: float = 1.0,
) -> Float[Tensor, "b"]:
    """Penalises embeddings that do not tell their own image from others in the other network's memory.

    With r = k - 1 negatives, h_j = exp(anchor . bank[candidates_j] / temperature) / z and P_j = h_j / (h_j + r / n):
    -log P_0 - sum over j >= 1 of log(1 - P_j), once with the student's embedding as anchor in the teacher's bank (over
    student_z) and once with the teacher's in the student's (over teacher_z)

    Args:
        student_embedding: Of unit length, after its linear layer.
        teacher_embedding: The same of the teacher.
        student_bank: One row for each sample of the training set.
        teacher_bank: The same of the teacher.
        candidates: Rows of the banks; the sample's own first, then its negatives.
        student_z: Normaliser of the student's anchors, above 0.
        teacher_z: Normaliser of the teacher's anchors, above 0.
        temperature: Of the similarities, above 0; the paper's 0.07.
        weight: Factor of the loss, the paper's 0.8, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner.

    Returns:
        Per sample, in nats.

    Raises:
        SignalError: The shapes do not fit together.

    Example:
        >>> import torch
        >>> one, bank, z = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor(1.0)
        >>> crd_loss(one, one, bank, bank, torch.tensor([[0, 1]]), z, z)
        tensor([3.0082])

    References:
        arXiv:1910.10699

    Note:
        As in the authors' code the positive is the bank's row, from before this step, and both anchors are trained. The
        code adds 1e-7 inside the logarithms; here they are exact at any size.
    """
    check_axes(
        "crd",
        student_embedding=(student_embedding, "b d"),
        teacher_embedding=(teacher_embedding, "b d"),
        student_bank=(student_bank, "n d"),
        teacher_bank=(teacher_bank, "n d"),
        candidates=(candidates, "b k"),
        student_z=(student_z, ""),
        teacher_z=(teacher_z, ""),
    )
    ratio = (candidates.shape[1] - 1) / len(student_bank)
    from_teacher = bank_scores(full(student_embedding), full(teacher_bank), candidates) / temperature
    from_student = bank_scores(full(teacher_embedding), full(student_bank), candidates) / temperature
    return _contrast(from_teacher, full(student_z), ratio) + _contrast(from_student, full(teacher_z), ratio)


def _contrast(scores: Tensor, z: Tensor, ratio: float) -> Tensor:
    """-log P of the first column and -log(1 - P) of the others, with odds = exp(scores) / (z * ratio)."""
    log_odds = scores - z.log() - math.log(ratio)
    return -F.logsigmoid(log_odds[:, 0]) - F.logsigmoid(-log_odds[:, 1:]).sum(1)


class Module(nn.Module):
    """Two linear layers onto the unit sphere, two banks with a row for each training sample, and the loss.

    Memory is 2 * num_samples * embed_dim floats: 51 MB for CIFAR-100, 1.3 GB for ImageNet. Under data parallelism every
    rank holds the same banks and normalisers.

    Args:
        student_embedding: Shape [d].
        teacher_embedding: Shape [d].
        num_samples: Of the training set.
        num_classes: Of the training set.
        embed_dim: Width of the common space; the paper's 128.
        num_negatives: For each sample, of other classes, with replacement; the paper's 16384.
        momentum: Share of the old row when the bank is updated; the paper's 0.5.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    student_z: Tensor
    teacher_z: Tensor

    def __init__(
        self,
        student_embedding: Shape,
        teacher_embedding: Shape,
        num_samples: int,
        num_classes: int,
        *,
        embed_dim: int = 128,
        num_negatives: int = 16384,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_negatives, self.momentum = num_negatives, momentum
        self.student_embed = LinearEmbed(student_embedding[0], embed_dim)
        self.teacher_embed = LinearEmbed(teacher_embedding[0], embed_dim)
        self.others = OtherClasses(num_samples, num_classes)
        self.register_buffer("student_bank", uniform_bank(num_samples, embed_dim))
        self.register_buffer("teacher_bank", uniform_bank(num_samples, embed_dim))
        self.register_buffer("student_z", torch.zeros(()))
        self.register_buffer("teacher_z", torch.zeros(()))

    def forward(
        self,
        student_embedding: Float[Tensor, "b ds"],
        teacher_embedding: Float[Tensor, "b dt"],
        labels: Int[Tensor, "b"],
        sample_index: Int[Tensor, "b"],
        generator: torch.Generator,
        *,
        temperature: float,
    ) -> Float[Tensor, "b"]:
        """The loss against the banks as they are; then, in training, the batch enters them."""
        student, teacher = self.student_embed(student_embedding), self.teacher_embed(teacher_embedding)
        candidates = torch.cat([sample_index[:, None], self.sample_negatives(labels, generator)], dim=1)
        if not self.student_z.item():  # fixed by the first batch
            self.student_z.copy_(self._normaliser(student, self.teacher_bank, candidates, temperature))
            self.teacher_z.copy_(self._normaliser(teacher, self.student_bank, candidates, temperature))
        z = self.student_z, self.teacher_z
        loss = crd_loss(student, teacher, self.student_bank, self.teacher_bank, candidates, *z, temperature=temperature)
        if self.training:
            blend_rows(self.student_bank, sample_index, student, self.momentum)
            blend_rows(self.teacher_bank, sample_index, teacher, self.momentum)
        return loss

    def sample_negatives(self, labels: Int[Tensor, "b"], generator: torch.Generator) -> Int[Tensor, "b r"]:
        """Rows of the banks for each sample, none of its class."""
        return self.others.draw(labels, self.num_negatives, generator)

    @torch.no_grad()
    def _normaliser(self, anchor: Tensor, bank: Tensor, candidates: Tensor, temperature: float) -> Tensor:
        """num_samples times the mean of exp(score), over the batches of all ranks."""
        return gather((bank_scores(anchor, bank, candidates) / temperature).exp().mean(1)).mean() * len(bank)


def prepare(module: Module, dataset_labels: Int[Tensor, "n"]) -> None:
    """Tells the module which samples are of which class."""
    module.others.fit(dataset_labels)
