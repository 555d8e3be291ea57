"""CMI: each batch of images is inverted from the teacher and told apart from those before; a student learns from all."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import SignalError
from raykd.parts.checks import check_axes, same_length
from raykd.parts.inversion import softened, statistics_gap, where_they_agree
from raykd.parts.numeric import full

NAME = "CMI"
PAPER = "Fang et al.: Contrastive Model Inversion for Data-Free Knowledge Distillation. IJCAI 2021, arXiv:2105.08584"
SECTION = "3.4"
SCHEME = "data_free"
LAYERS = "norms"
SYNTHESIS = {
    "mode": "bank",
    "generator": "dcgan",
    "options": {"init": "normal"},
    "latent": 256,
    "steps": 200,
    "reset": "batch",
    "lr": 1e-3,
    "latents_lr": 1e-3,
    "betas": (0.5, 0.999),
    "keep": "best",
    "jitter": 4,
    "flip": True,
}


def cmi_loss(
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
        >>> cmi_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.])

    References:
        arXiv:2105.08584.
    """
    return softened("cmi", student_logits, teacher_logits, temperature)


def images_loss(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    teacher_norms: list[Float[Tensor, "4 _c"]],
    labels: Int[Tensor, "b"],
    parts: Float[Tensor, "b d"],
    wholes: Float[Tensor, "b d"],
    parts_bank: Float[Tensor, "k d"],
    wholes_bank: Float[Tensor, "k d"],
    *,
    bn: float = 1.0,
    oh: float = 1.0,
    adv: float = 0.5,
    cr: float = 0.8,
    contrast_temperature: float = 0.1,
) -> dict[str, Float[Tensor, "b"] | Float[Tensor, ""]]:
    """Penalises images that are not of the class wanted, whose statistics the teacher does not know, that the student
    understands already, and whose parts are taken for parts of other images, now or earlier.

    oh: oh * cross-entropy(teacher_logits, labels)
    bn: bn * sum over batch norms of ||mean - running mean|| + ||variance - running variance||
    adv: -adv * KL(softmax(teacher_logits) || softmax(student_logits)) where both see the same class, else 0
    cr: cr * (m(parts) + m(parts_bank)), with m(a) the mean over its rows i of
    -log(exp(cos(a_i, whole of i) / t) / sum over all wholes w, the bank's too, of exp(cos(a_i, w) / t)) and
    t = contrast_temperature

    Args:
        student_logits: Class scores of the images.
        teacher_logits: The same of the teacher.
        teacher_norms: Mean, variance, running mean and running variance at each of the teacher's batch norms.
        labels: The classes wanted.
        parts: What Images makes of a part of each image.
        wholes: What it makes of each whole image; it takes them as given.
        parts_bank: As `parts`, of earlier images; there may be none.
        wholes_bank: As `wholes`, of the same earlier images.
        bn: Factor of that term, at least 0; 1.
        oh: Factor of that term, at least 0; 0.5 or 1 in the authors' scripts.
        adv: Factor of that term, at least 0; 0.5.
        cr: Factor of that term, at least 0; 0.8.
        contrast_temperature: Of the cosines, above 0; 0.1, or 0.2.

    Returns:
        Terms `oh` and `adv` per sample; `bn` and `cr` couple the batch.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> one, none = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(0, 2)
        >>> of_batch = [torch.zeros(2, 5), torch.zeros(2, 5), [torch.zeros(4, 3)], torch.tensor([0, 1])]
        >>> images_loss(*of_batch, one, one, none, none, cr=1.0, contrast_temperature=1.0)["cr"]
        tensor(0.3133)

    References:
        arXiv:2105.08584, equations 2 to 9.

    Note:
        As in the authors' code the mean over the bank's parts trains the head alone, and is a term of its own, so that a large
        bank does not drown the images. It makes a batch for every 400 steps of the student, who sees crops and mirror images:
        set synthesis.pace and data.augmentation. Its head has an Adam of its own that goes on; ours shares the generator's,
        which begins anew with each batch. Its wholes are crops of each image after padding; ours are rolled and mirrored a
        batch at a time.
    """
    check_axes(
        "cmi",
        student_logits=(student_logits, "b c"),
        teacher_logits=(teacher_logits, "b c"),
        labels=(labels, "b"),
        parts=(parts, "b d"),
        wholes=(wholes, "b d"),
        parts_bank=(parts_bank, "k d"),
        wholes_bank=(wholes_bank, "k d"),
    )
    anchors = F.normalize(torch.cat([full(parts), full(parts_bank)]), dim=1)
    others = F.normalize(torch.cat([full(wholes), full(wholes_bank)]), dim=1)
    apart = -F.log_softmax(anchors @ others.T / contrast_temperature, dim=1).diagonal()
    now, earlier = apart[: len(parts)], apart[len(parts) :]
    contrast = now.mean() + earlier.mean() if len(earlier) else now.mean()
    return {
        "oh": oh * F.cross_entropy(full(teacher_logits), labels, reduction="none"),
        "bn": bn * statistics_gap("cmi", teacher_norms),
        "adv": -adv * where_they_agree(student_logits, teacher_logits),
        "cr": cr * contrast,
    }


class Images(nn.Module):
    """The head, two linear layers on what enters the teacher's batch norms, each map averaged; and the memory it is told from.

    The memory is a ring with the features of earlier batches, of each those of the least loss. A batch begins at step 0; the
    rows that it writes count from the next batch on. Where generator and student take turns (mode="lockstep") there is no
    second batch, and the contrast is among the images of the batch.

    Args:
        teacher_features: Shapes of a sample at each layer, of the whole images.
        memory: Images remembered; 40960. It holds two float rows of all channels each: 225 MB for a ResNet-20.
        negatives: Of these, drawn anew at each step; 4096.
        head: Axes of what the head makes; 128, or 256.
    """

    memory: Tensor
    place: Tensor
    filled: Tensor
    written: Tensor
    least: Tensor

    def __init__(
        self, teacher_features: list[tuple[int, ...]], *, memory: int = 40960, negatives: int = 4096, head: int = 128
    ) -> None:
        super().__init__()
        width = sum(shape[0] for shape in teacher_features)
        self.negatives = negatives
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, head))
        self.register_buffer("memory", torch.zeros(memory, 2, width))
        for name in ("place", "filled", "written"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("least", torch.tensor(float("inf")))

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        teacher_logits: Float[Tensor, "b c"],
        teacher_norms: list[Float[Tensor, "4 _c"]],
        teacher_features: list[Float[Tensor, "b *_p"]],
        teacher_features_local: list[Float[Tensor, "b *_p"]],
        labels: Int[Tensor, "b"],
        step: int,
        generator: torch.Generator,
        *,
        bn: float,
        oh: float,
        adv: float,
        cr: float,
        contrast_temperature: float,
    ) -> dict[str, Float[Tensor, "b"] | Float[Tensor, ""]]:
        """The terms of images_loss.

        Raises:
            SignalError: The batch is larger than the memory.
        """
        same_length("cmi", teacher_features=teacher_features, teacher_features_local=teacher_features_local)
        if step == 0:
            self._begin(len(labels))
        dtype = self.memory.dtype
        part, whole = (_pooled(features).to(dtype) for features in (teacher_features_local, teacher_features))
        earlier = self._drawn(len(labels), generator)
        terms = images_loss(
            student_logits,
            teacher_logits,
            teacher_norms,
            labels,
            self.head(part),
            self.head(whole).detach(),
            self.head(earlier[:, 0]),
            self.head(earlier[:, 1]).detach(),
            bn=bn,
            oh=oh,
            adv=adv,
            cr=cr,
            contrast_temperature=contrast_temperature,
        )
        self._note(torch.stack([part, whole], 1).detach(), terms)
        return terms

    @torch.no_grad()
    def _begin(self, count: int) -> None:
        if count > len(self.memory):
            raise SignalError(
                f"memory: expected at least the {count} images of a batch, got {len(self.memory)} (cmi). Raise it."
            )
        size = len(self.memory)
        self.place.copy_((self.place + self.written) % size)
        self.filled.copy_((self.filled + self.written).clamp(max=size))
        self.written.zero_()
        self.least.fill_(float("inf"))

    def _drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Rows of earlier batches, without those that this one writes over."""
        size = len(self.memory)
        there = min(int(self.filled), size - count)
        back = torch.randperm(there, generator=generator)[: self.negatives].to(self.memory.device)
        return self.memory[(self.place - 1 - back) % size]

    @torch.no_grad()
    def _note(self, rows: Tensor, terms: dict[str, Tensor]) -> None:
        total = torch.stack([term.mean() for term in terms.values()]).sum().to(self.least.dtype)
        if bool(total < self.least):
            at = (self.place + torch.arange(len(rows), device=rows.device)) % len(self.memory)
            self.memory[at] = rows
            self.written.fill_(len(rows))
            self.least.copy_(total)


def _pooled(features: list[Tensor]) -> Tensor:
    """Each map averaged over places, `[b d]`."""
    return torch.cat([full(f).flatten(2).mean(2) if f.ndim > 2 else full(f) for f in features], 1)
