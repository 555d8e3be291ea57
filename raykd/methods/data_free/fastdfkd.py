"""FastDFKD: a generator learns how to begin, so that a few steps make a batch; batches go to a bank, the student follows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.parts.checks import check_axes
from raykd.parts.inversion import softened, statistics_gap, where_they_agree
from raykd.parts.numeric import full

NAME = "FastDFKD"
PAPER = "Fang et al.: Up to 100x Faster Data-free Knowledge Distillation. AAAI 2022, arXiv:2112.06444"
SECTION = "3.4"
SCHEME = "data_free"
SYNTHESIS = {
    "mode": "bank",
    "generator": "dcgan",
    "latent": 256,
    "steps": 5,
    "reset": "meta",
    "meta": "fomaml",
    "lr": 3e-3,
    "latents_lr": 0.01,
    "betas": (0.5, 0.999),
    "keep": "best",
    "jitter": 4,
    "flip": True,
    "start": 20,
    "max_restarts": 0,
}


def fastdfkd_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 20.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the student's softened class distribution from the teacher's on made images.

    temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores.
        teacher_logits: The same of the teacher.
        temperature: Softens both distributions, above 0; 20 in the authors' scripts.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the classes wanted of the images; 0.

    Returns:
        Per sample, in nats times temperature^2.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> fastdfkd_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])

    References:
        arXiv:2112.06444.
    """
    return softened("fastdfkd", student_logits, teacher_logits, temperature)


def images_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    teacher_norms: list[Float[Tensor, "4 _c"]],
    labels: Int[Tensor, "b"],
    *,
    bn: float = 10.0,
    oh: float = 0.5,
    adv: float = 1.0,
) -> dict[str, Float[Tensor, "b"] | Float[Tensor, ""]]:
    """Penalises images that are not of the class wanted, whose statistics the teacher does not know, and that the student
    understands already.

    oh: oh * cross-entropy(teacher_logits, labels)
    bn: bn * sum over batch norms of ||mean - running mean|| + ||variance - running variance||
    adv: -adv * KL(softmax(teacher_logits) || softmax(student_logits)) where both see the same class, else 0

    Args:
        student_logits: Class scores of the images.
        teacher_logits: The same of the teacher.
        teacher_norms: Mean, variance, running mean and running variance at each of the teacher's batch norms; through Images
            the first two are averaged with those of earlier batches.
        labels: The classes wanted.
        bn: Factor of that term, at least 0; 10 in the authors' scripts, with averaged statistics, else 1.
        oh: Factor of that term, at least 0; 0.5, for Wide ResNets 0.4.
        adv: Factor of that term, at least 0; 1.0 for VGG, 1.1 for Wide ResNets, 1.33 for ResNet-34.

    Returns:
        Terms `oh` and `adv` per sample; `bn` couples the batch.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> norm = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
        >>> images_loss(torch.zeros(1, 2), torch.zeros(1, 2), [norm], torch.tensor([0]), oh=1.0)["bn"]
        tensor(50.)

    References:
        arXiv:2112.06444, equations 2 to 5; `synthesis.meta` says how the generator learns: algorithm 1.

    Note:
        Each batch: a copy of the generator and the noise take `synthesis.steps` steps of Adam, then the generator takes one, of
        a rate `steps` times as large, along the sum of the gradients met (`fomaml`) or towards the copy (`reptile`), as in the
        authors' code. With 2, 5, 10 steps its rates are 0.005, 0.003, 0.002 and, of the noise, 0.015, 0.01, 0.01. It makes a
        batch for every 400 steps of the student, who sees crops and mirror images: set synthesis.pace and data.augmentation.
        Its option to set weights anew after 120 batches is not offered: its condition for two layers holds for all. Its crops
        for the teacher are of each image, padded; ours roll and mirror a batch.
    """
    check_axes("fastdfkd", student_logits=(student_logits, "b c"), teacher_logits=(teacher_logits, "b c"), labels=(labels, "b"))
    return {
        "oh": oh * F.cross_entropy(full(teacher_logits), labels, reduction="none"),
        "bn": bn * statistics_gap("fastdfkd", teacher_norms),
        "adv": -adv * where_they_agree(student_logits, teacher_logits),
    }


class Images(nn.Module):
    """Averages the statistics over batches; the student is heard from batch number `warmup` on.

    A batch begins at step 0: the statistics of the last step before are those of the batch that has ended. Where generator and
    student take turns (mode="lockstep") there is no second batch, so no average, and `adv` acts only if `warmup` is at most 1.

    Args:
        teacher_norms: Shapes without the first axis.
        momentum: Share of the average in what is compared, and of the old average in the new one, 0 to below 1; 0.9.
        warmup: Batches, from 1, before which `adv` is 0; 20.
    """

    averages: Tensor
    latest: Tensor
    batches: Tensor

    def __init__(self, teacher_norms: list[tuple[int, ...]], *, momentum: float = 0.9, warmup: int = 20) -> None:
        super().__init__()
        width = sum(shape[-1] for shape in teacher_norms)
        self.momentum, self.warmup = momentum, warmup
        self.register_buffer("averages", torch.zeros(2, width))
        self.register_buffer("latest", torch.zeros(2, width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        teacher_logits: Float[Tensor, "b c"],
        teacher_norms: list[Float[Tensor, "4 _c"]],
        labels: Int[Tensor, "b"],
        step: int,
        *,
        bn: float,
        oh: float,
        adv: float,
    ) -> dict[str, Float[Tensor, "b"] | Float[Tensor, ""]]:
        """The terms of images_loss."""
        if step == 0:
            self._begin()
        batches, share = int(self.batches), self.momentum
        seen = torch.cat([full(norm)[:2] for norm in teacher_norms], 1)
        self.latest.copy_(seen.detach())
        if batches > 1 and share:
            seen = share * self.averages + (1 - share) * seen
        parts = seen.split([norm.shape[1] for norm in teacher_norms], 1)
        norms = [torch.cat([part, full(norm)[2:]]) for part, norm in zip(parts, teacher_norms)]
        heard = adv if batches >= self.warmup else 0.0
        return images_loss(student_logits, teacher_logits, norms, labels, bn=bn, oh=oh, adv=heard)

    @torch.no_grad()
    def _begin(self) -> None:
        if int(self.batches) == 1:
            self.averages.copy_(self.latest)
        elif int(self.batches) > 1:
            self.averages.lerp_(self.latest, 1 - self.momentum)
        self.batches += 1
