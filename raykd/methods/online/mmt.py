"""MMT: peers learn from hard labels, which may be made by clustering, and from the averaged copies of the other peers."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ConfigError
from raykd.parts.adapters import Shape
from raykd.parts.checks import check_axes, same_length
from raykd.parts.memory import blend_rows
from raykd.parts.numeric import full

NAME = "MMT"
PAPER = (
    "Ge, Chen, Li: Mutual Mean-Teaching: Pseudo Label Refinery for Unsupervised Domain Adaptation on Person "
    "Re-identification. ICLR 2020, arXiv:2001.01526"
)
SECTION = "2.2"
SCHEME = "online"

ROUNDS = 100
CHUNK = 8192


def mmt_loss(
    student_logits: Float[Tensor, "b c"],
    student_embedding: Float[Tensor, "b d"],
    peers_logits_ema: list[Float[Tensor, "b c"]],
    peers_embedding_ema: list[Float[Tensor, "b _e"]],
    labels: Int[Tensor, "b"],
    *,
    soft_ce_share: float = 0.5,
    soft_triplet_share: float = 0.8,
    label_smoothing: float = 0.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "..."]]:
    """Penalises classes and triplets that differ from the labels', and from those of the peers' averaged copies.

    With p, q the class probabilities of student and averaged copy; for an anchor, P the farthest sample of its label and N the
    nearest of another, as the student sees them; t = exp(d(N)) / (exp(d(P)) + exp(d(N))) with d the distance of embeddings to
    the anchor's, and u the same of the averaged copy for the same samples:
    ce           = (1 - soft_ce_share) * cross-entropy(p, label)
    soft_ce      = soft_ce_share * mean over peers of -sum over classes of q * log p
    triplet      = (1 - soft_triplet_share) * mean over anchors of -log t
    soft_triplet = soft_triplet_share * mean over peers and anchors of -(u * log t + (1 - u) * log(1 - t))

    Args:
        student_logits: Class scores.
        student_embedding: Input of the classifier.
        peers_logits_ema: Class scores of each peer's averaged copy, fixed.
        peers_embedding_ema: The same of the embeddings.
        labels: True or pseudo classes; a sample below 0 has none, and is in soft_ce alone.
        soft_ce_share: Between 0 and 1; the paper's 0.5.
        soft_triplet_share: Between 0 and 1; the paper's 0.8.
        label_smoothing: Share of ce's target that is spread over all classes; the authors' code takes 0.1.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of a plain cross-entropy with the true labels, applied by the learner; 0, since term ce is one.

    Returns:
        Terms ce and soft_ce per sample, in nats; triplet and soft_triplet, in nats: each couples the batch.

    Raises:
        SignalError: The shapes do not fit together.

    Example:
        >>> import torch
        >>> logits, line = torch.zeros(3, 2), torch.tensor([[0.0], [1.0], [1.0]])
        >>> found = mmt_loss(logits, line, [logits], [line], torch.tensor([0, 0, 1]))
        >>> {term: [round(v, 4) for v in value.reshape(-1).tolist()] for term, value in found.items()}
        {'ce': [0.3466, 0.3466, 0.3466], 'soft_ce': [0.3466, 0.3466, 0.3466], 'triplet': [0.18], 'soft_triplet': [0.5249]}

    References:
        arXiv:2001.01526; authors' code: github.com/yxgeee/MMT

    Note:
        The authors' training script has 0.5 and 0.8, as here; the trainer it calls has 0.5 for both, as the survey's table.
        Without another sample of its label an anchor is its own P, at distance 0, as in the code; without one of another label
        it is left out. Batches of the authors hold four images each of 16 labels. `training.ema` is the averaged copies' decay,
        the paper's 0.999, with `training.ema_warmup`; they answer in evaluation mode, where the code has them in training
        mode. Each peer of the paper sees an augmentation of its own, and its copy the same: `exchange.views = "own"`. Unsure:
        label smoothing in the paper.
    """
    same_length("mmt", peers_logits_ema=peers_logits_ema, peers_embedding_ema=peers_embedding_ema)
    own = {"student_logits": (student_logits, "b c"), "student_embedding": (student_embedding, "b d"), "labels": (labels, "b")}
    for i, (logits, embedding) in enumerate(zip(peers_logits_ema, peers_embedding_ema)):
        check_axes("mmt", **own, **{f"peers_logits_ema[{i}]": (logits, "b c"), f"peers_embedding_ema[{i}]": (embedding, "b e")})
    known = labels >= 0
    log_p = F.log_softmax(full(student_logits), dim=1)
    hard = F.cross_entropy(log_p, labels.clamp_min(0), reduction="none", label_smoothing=label_smoothing)
    soft = [-(F.softmax(full(logits).detach(), dim=1) * log_p).sum(1) for logits in peers_logits_ema]

    apart = _distances(full(student_embedding))
    positive, negative, valid = _hardest(apart.detach(), labels)
    gap = _gap(apart, positive, negative)
    count = valid.sum().clamp_min(1)
    theirs = [_gap(_distances(full(e).detach()), positive, negative).sigmoid() for e in peers_embedding_ema]
    soft_triplets = [-(u * F.logsigmoid(gap) + (1 - u) * F.logsigmoid(-gap)) for u in theirs]
    return {
        "ce": (1 - soft_ce_share) * torch.where(known, hard, 0.0),
        "soft_ce": soft_ce_share * torch.stack(soft).mean(0),
        "triplet": (1 - soft_triplet_share) * torch.where(valid, -F.logsigmoid(gap), 0.0).sum() / count,
        "soft_triplet": soft_triplet_share * torch.where(valid, torch.stack(soft_triplets).mean(0), 0.0).sum() / count,
    }


def _distances(embedding: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    return torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")


def _hardest(apart: Float[Tensor, "b b"], labels: Int[Tensor, "b"]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each anchor: the farthest sample of its label, the nearest of another, and whether it has a label and the latter."""
    same, known = labels[:, None] == labels, labels >= 0
    other = ~same & known
    positive = apart.masked_fill(~same, -1.0).argmax(1)
    negative = apart.masked_fill(~other, float("inf")).argmin(1)
    return positive, negative, other.any(1) & known


def _gap(apart: Float[Tensor, "b b"], positive: Int[Tensor, "b"], negative: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Distance to the negative less that to the positive: its sigmoid is t."""
    return (apart.gather(1, negative[:, None]) - apart.gather(1, positive[:, None])).squeeze(1)


class Module(nn.Module):
    """The loss and, with `pseudo_labels`, a memory of what all averaged copies make of each sample, and its clusters.

    Buffers, with `pseudo_labels`: `bank` [n e], for each sample the embeddings of the student's and of every peer's averaged
    copy, each of unit length, one behind the other, 0 where it was not seen; `centres` [k e]; `pseudo` [n], the sample's
    cluster, -1 where it has none. Alike on all workers.

    Args:
        ema_embedding: Shape [d].
        peers_embedding_ema: Shapes [e], one a peer.
        student_logits: Shape [c].
        num_samples: Of the training set.
        pseudo_labels: Whether the labels are clusters, made before each epoch but the first, and the true ones go unread.
        clusters: How many, at most as many as the classifier's outputs; None: as many as it has.
    """

    bank: Tensor
    centres: Tensor
    pseudo: Tensor

    def __init__(
        self,
        student_logits: Shape,
        ema_embedding: Shape,
        peers_embedding_ema: list[Shape],
        num_samples: int,
        *,
        pseudo_labels: bool = False,
        clusters: int | None = None,
    ) -> None:
        super().__init__()
        self.pseudo_labels, self.peers = pseudo_labels, len(peers_embedding_ema)
        count = student_logits[0] if clusters is None else clusters
        if not 1 <= count <= student_logits[0]:
            raise ConfigError(
                f"clusters: expected 1 to {student_logits[0]}, the classifier's outputs, got {count} (mmt). "
                "Each cluster is a class of the student."
            )
        rows = num_samples if pseudo_labels else 0
        width = ema_embedding[0] + sum(shape[0] for shape in peers_embedding_ema)
        self.widths = [ema_embedding[0], *(shape[0] for shape in peers_embedding_ema)]
        self.register_buffer("bank", torch.zeros(rows, width))
        self.register_buffer("centres", torch.zeros(count if pseudo_labels else 0, width))
        self.register_buffer("pseudo", torch.full((rows,), -1, dtype=torch.int64))

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        student_embedding: Float[Tensor, "b d"],
        ema_embedding: Float[Tensor, "b d"],
        peers_logits_ema: list[Float[Tensor, "b c"]],
        peers_embedding_ema: list[Float[Tensor, "b _e"]],
        labels: Int[Tensor, "b"],
        sample_index: Int[Tensor, "b"],
        *,
        soft_ce_share: float,
        soft_triplet_share: float,
        label_smoothing: float,
    ) -> dict[str, Float[Tensor, "..."]]:
        """The loss; in training, with pseudo labels, the batch then enters the memory.

        The paper extracts embeddings of all images as they are before an epoch; here they are those of the epoch before, each
        from the step that saw the sample. Once a peer is lost, memory and pseudo labels stay as they are.
        """
        if self.pseudo_labels:
            labels = self.pseudo[sample_index]
        loss = mmt_loss(
            student_logits,
            student_embedding,
            peers_logits_ema,
            peers_embedding_ema,
            labels,
            soft_ce_share=soft_ce_share,
            soft_triplet_share=soft_triplet_share,
            label_smoothing=label_smoothing,
        )
        if self.training and self.pseudo_labels and len(peers_embedding_ema) == self.peers:
            for block, embedding in zip(self.bank.split(self.widths, dim=1), (ema_embedding, *peers_embedding_ema)):
                blend_rows(block, sample_index, full(embedding).detach(), 0.0)
        return loss


def on_epoch(module: Module, epoch: int) -> None:
    """Clusters the memory, with as many seen samples as clusters; the clusters' numbers are those of the epoch before.

    k-means over the samples seen so far, on the CPU in float64. The centres begin as samples at even distances in the order
    of the data set, and later where they were: a cluster keeps its number, and the classifier its meaning, where the paper
    begins anew and writes the centres into the classifiers. All peers find the same clusters where each hears all others, with
    no codec between.
    """
    if not module.pseudo_labels:
        return
    seen = module.bank.abs().amax(1) > 0
    if int(seen.sum()) < len(module.centres):
        return
    columns = _columns(module.bank, module.widths)
    rows = module.bank[seen][:, columns].double().cpu()
    centres = module.centres[:, columns].double().cpu()
    if not bool(centres.any()):
        centres = rows[torch.arange(len(centres)) * len(rows) // len(centres)]
    nearest, centres = _cluster(rows, centres)
    module.centres[:, columns] = centres.to(module.centres)
    module.pseudo[seen] = nearest.to(module.pseudo.device)


def _columns(bank: Float[Tensor, "n e"], widths: list[int]) -> Int[Tensor, "e"]:
    """The bank's columns, model by model, in an order that follows from their numbers: every peer's own stands first in its
    bank, and sums are to be alike at all."""
    blocks = list(zip(torch.arange(sum(widths)).split(widths), bank.split(widths, dim=1)))
    ordered = sorted(blocks, key=lambda block: (block[1].shape[1], float(block[1].double().contiguous().sum())))
    return torch.cat([place for place, _ in ordered]).to(bank.device)


def _cluster(rows: Float[Tensor, "n e"], centres: Float[Tensor, "k e"]) -> tuple[Int[Tensor, "n"], Float[Tensor, "k e"]]:
    """Lloyd's algorithm until nothing changes, for at most ROUNDS rounds; a centre without samples stays where it is."""
    nearest = torch.full((len(rows),), -1)
    for _ in range(ROUNDS):
        before = nearest
        size = centres.square().sum(1)
        nearest = torch.cat([(size - 2 * part @ centres.T).argmin(1) for part in rows.split(CHUNK)])
        if torch.equal(nearest, before):
            break
        count = nearest.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        centres = torch.where(count > 0, sums / count.clamp_min(1), centres)
    return nearest, centres
