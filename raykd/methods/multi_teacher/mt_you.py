"""You et al.: the teachers' mean of softened outputs, and the order of dissimilarities they vote for."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raykd.parts.aggregators import mean_probs
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full
from raykd.parts.shares import shares

NAME = "MT-You"
PAPER = "You, Xu, Xu, Tao: Learning from Multiple Teacher Networks. KDD 2017"
SECTION = "3.1"
SCHEME = "offline"
LAYERS = ("stage2",)
SPARSE = True

CHUNK = 16


def mt_you_loss(
    student_logits: Float[Tensor, "b c"],
    teachers_logits: list[Float[Tensor, "b c"]],
    student_gram: Float[Tensor, "b b"],
    teachers_gram: list[Float[Tensor, "b b"]],
    generator: torch.Generator,
    *,
    temperature: float = 4.0,
    margin: float = 0.2,
    vote: Literal["order", "distance"] = "order",
    distance: Literal["unit", "euclidean"] = "unit",
    num_triplets: int | None = None,
    teacher_weights: tuple[float, ...] = (),
    kd_weight: float = 1.0,
    triplet_weight: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> dict[str, Float[Tensor, "..."]]:
    """Penalises outputs far from the teachers' mean, and samples that lie in another order than the teachers vote for.

    With p = softmax(logits / temperature), H the cross-entropy and w the teachers' weights:
    kd = kd_weight * temperature^2 * H(sum over m of w_m * pT_m, pS)
    With d_ij the dissimilarity of samples i and j, and a triplet (i, j, k) such that the vote says j is nearer to i than k:
    triplet = triplet_weight * mean over the triplets of max(0, margin + dS_ij - dS_ik)

    Args:
        student_logits: Class scores.
        teachers_logits: The same of each teacher.
        student_gram: Inner products of the intermediate representations of every two samples.
        teachers_gram: The same of each teacher; they say which of two samples is nearer.
        generator: Draws the triplets where `num_triplets` is set.
        temperature: Softens the distributions, above 0.
        margin: By which the nearer sample must be nearer, in the unit of the distance.
        vote: `order`: each teacher votes for an order, weighed; a tie leaves the triplet out. `distance`: the order of the
            weighted mean of the teachers' distances.
        distance: `unit`: squared distance of the representations brought to unit length, between 0 and 4. `euclidean`: the
            plain distance, for which the margin has the size of the student's features.
        num_triplets: None: all b (b - 1) (b - 2) / 2 of the batch. Otherwise as many drawn with replacement.
        teacher_weights: One a teacher, in the loss's order; empty: all alike.
        kd_weight: Factor of kd.
        triplet_weight: Factor of triplet.
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Term kd per sample, in nats times temperature^2, at least temperature^2 times the entropy of the mean; term triplet
        per batch (it couples the batch), in the unit of the distance, 0 where no order is voted for.

    Raises:
        SignalError: The shapes differ, or not every teacher sends both signals.
        ConfigError: No such vote or distance, or weights that do not fit the teachers.

    Example:
        >>> import torch
        >>> even, near = torch.zeros(3, 2), torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.6], [0.0, 0.6, 1.0]])
        >>> found = mt_you_loss(even, [even], near, [near], torch.Generator(), temperature=1.0, margin=0.5)
        >>> {term: [round(v, 4) for v in value.reshape(-1).tolist()] for term, value in found.items()}
        {'kd': [0.6931, 0.6931, 0.6931], 'triplet': [0.0333]}

    References:
        doi:10.1145/3097983.3098135

    Note:
        Temperature^2 is there as in kd, to keep the gradient's size. The abstract says what is compared (the relative
        dissimilarity of intermediate representations, in triplets, by a vote of the teachers); distance, margin, layer,
        temperature and the two factors are not known to us and are ours. Distances come from grams, so that b numbers
        a sample travel. All triplets are worked off a few anchors at a time and again in the backward pass, so that memory
        grows with b^2.
    """
    check_choice("mt-you", vote=vote, known=("order", "distance"))
    check_choice("mt-you", distance=distance, known=("unit", "euclidean"))
    same_length("mt-you", teachers_logits=teachers_logits, teachers_gram=teachers_gram)
    own = {"student_logits": (student_logits, "b c"), "student_gram": (student_gram, "b b")}
    for i, (logits, gram) in enumerate(zip(teachers_logits, teachers_gram)):
        check_axes("mt-you", **own, **{f"teachers_logits[{i}]": (logits, "b c"), f"teachers_gram[{i}]": (gram, "b b")})
    weights = shares("mt-you", teacher_weights, len(teachers_logits)).to(student_logits.device)
    mean = (mean_probs(teachers_logits, weights, temperature=temperature) / temperature).exp()
    kd = -(mean * F.log_softmax(full(student_logits) / temperature, dim=1)).sum(1)
    apart = _distances(student_gram, distance)
    taught = torch.stack([_distances(gram, distance) for gram in teachers_gram]).detach()
    votes = weights.to(taught.dtype), vote == "order", margin
    if num_triplets is None:
        loss, count = _all(apart, taught, *votes)
    else:
        pairs = _drawn(apart, taught, num_triplets, generator)
        loss, count = _hinges(pairs, torch.ones_like(pairs[0]), *votes)
    return {"kd": kd_weight * temperature**2 * kd, "triplet": triplet_weight * loss / count.clamp_min(1)}


def _distances(gram: Tensor, distance: str) -> Tensor:
    gram = full(gram)
    squares = gram.diagonal().clamp_min(0)
    if distance == "unit":
        lengths = squares.clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        return 2 - 2 * (gram / lengths[:, None] / lengths[None, :]).clamp(-1, 1)
    smallest = torch.finfo(gram.dtype).eps * squares.detach().max() + torch.finfo(gram.dtype).tiny
    return (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(smallest).sqrt()


_Pairs = tuple[Tensor, Tensor, Tensor, Tensor]  # distances of two samples to an anchor, the student's and the teachers'


def _hinges(pairs: _Pairs, kept: Tensor, weights: Tensor, orders: bool, margin: float) -> tuple[Tensor, Tensor]:
    """Sum of the hinges of the pairs that are kept, each put in the order that is voted for; and their number."""
    near, far, taught_near, taught_far = pairs
    ahead = taught_far - taught_near  # above 0: a teacher says `near` is nearer
    votes = torch.tensordot(weights, ahead.sign() if orders else ahead, dims=1)
    voted = torch.where(votes.abs() > (1e-6 if orders else 0.0), votes.sign(), 0.0) * kept
    return (F.relu(margin + voted * (near - far)) * voted.abs()).sum(), voted.abs().sum()


def _all(apart: Tensor, taught: Tensor, weights: Tensor, orders: bool, margin: float) -> tuple[Tensor, Tensor]:
    total, count = apart.new_zeros(()), apart.new_zeros(())
    votes = weights, orders, margin
    for start in range(0, len(apart), CHUNK):
        anchors = torch.arange(start, min(start + CHUNK, len(apart)), device=apart.device)
        loss, found = checkpoint(_at, apart, taught, anchors, *votes, use_reentrant=False, preserve_rng_state=False)
        total, count = total + loss, count + found
    return total, count


def _at(apart: Tensor, taught: Tensor, anchors: Tensor, weights: Tensor, orders: bool, margin: float) -> tuple[Tensor, Tensor]:
    """The triplets of some anchors: every two other samples, once."""
    place = torch.arange(len(apart), device=apart.device)
    other = place != anchors[:, None]
    kept = other[:, :, None] & other[:, None, :] & (place[:, None] < place)
    rows, taught_rows = apart[anchors], taught[:, anchors]
    pairs = rows[:, :, None], rows[:, None, :], taught_rows[..., :, None], taught_rows[..., None, :]
    return _hinges(pairs, kept, weights, orders, margin)


def _drawn(apart: Tensor, taught: Tensor, count: int, generator: torch.Generator) -> _Pairs:
    """Distances of `count` triplets of three samples, drawn uniformly."""
    samples = len(apart)
    steps = [torch.randint(samples - i, (count,), generator=generator).to(apart.device) for i in range(3)]
    anchor = steps[0]
    first = (anchor + 1 + steps[1]) % samples
    ring = (anchor + 1 + steps[2]) % samples  # of the others without the last
    second = torch.where(ring == first, (anchor + samples - 1) % samples, ring)
    return apart[anchor, first], apart[anchor, second], taught[:, anchor, first], taught[:, anchor, second]
