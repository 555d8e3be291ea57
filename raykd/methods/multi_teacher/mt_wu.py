"""Wu et al.: the student's similarity matrix follows a mixture of the teachers', whose weights a held-out risk decides."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raykd.errors import ConfigError
from raykd.parts.adapters import Shape
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full
from raykd.parts.parallel import gather

NAME = "MT-Wu"
PAPER = "Wu, Zheng, Guo, Lai: Distilled Person Re-identification: Towards a More Scalable System. CVPR 2019"
SECTION = "3.1"
SCHEME = "offline"


def mt_wu_loss(
    student_similarity: Float[Tensor, "b b"],
    teachers_similarity: list[Float[Tensor, "b b"]],
    alpha: Float[Tensor, "m"],
    *,
    epsilon: float = 1e-3,
    weight: float = 1.0,
    ce_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Penalises a similarity matrix far from the teachers' mixture, in the log-Euclidean distance of positive matrices.

    With I the identity and log the matrix logarithm:
    || log(student_similarity + epsilon I) - log(sum over m of alpha_m * teachers_similarity_m + epsilon I) ||_F^2 / b^2

    Args:
        student_similarity: Cosines between the embeddings of every two samples.
        teachers_similarity: The same of each teacher.
        alpha: Weight of each teacher, at least 0, adding up to 1.
        epsilon: Makes the matrices positive definite, above 0: a batch is larger than the embedding is wide. Ours.
        weight: Factor of the loss, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner.

    Returns:
        Per batch (it couples the batch), without unit.

    Raises:
        SignalError: The matrices are not square or differ in size, or there is not one weight a teacher.

    Example:
        >>> import torch
        >>> one, other = torch.diag(torch.tensor([2.718282, 1.0])), torch.eye(2)
        >>> round(mt_wu_loss(one, [other, other], torch.tensor([0.5, 0.5]), epsilon=1e-9).item(), 4)
        0.25

    References:
        doi:10.1109/CVPR.2019.00128

    Note:
        The paper's distance is b^2 times this; so the size of the batch does not set the weight, which is not known to us.
        Logarithms are taken of float64 eigenvalues, and their gradient by divided differences, which stay finite where
        eigenvalues coincide; it cannot be differentiated a second time. Eigenvalues below epsilon / 2 (rounded signals) count
        as that.
    """
    same_length("mt-wu", teachers_similarity=teachers_similarity, alpha=alpha)
    for i, similarity in enumerate(teachers_similarity):
        given = {"student_similarity": (student_similarity, "b b"), f"teachers_similarity[{i}]": (similarity, "b b")}
        check_axes("mt-wu", **given, alpha=(alpha, "m"))
    mixed = torch.stack([full(alpha[i]) * full(similarity) for i, similarity in enumerate(teachers_similarity)]).sum(0)
    return (_log(full(student_similarity), epsilon) - _log(mixed, epsilon)).square().mean()


def _log(matrix: Tensor, epsilon: float) -> Tensor:
    """log((matrix + its transpose) / 2 + epsilon I), with the right gradient.

    d log A = U (G * (U^T dA U)) U^T with A = U diag(v) U^T and G_ij = (log v_i - log v_j) / (v_i - v_j), or 1 / v_i
    """
    wide = (matrix.double() + matrix.double().T) / 2
    fixed = wide.detach() + epsilon * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    values, vectors = torch.linalg.eigh(fixed)
    values = values.clamp_min(epsilon / 2)
    total, apart = values[:, None] + values, values[:, None] - values
    ratio = apart / total
    near = ratio.abs() < 1e-4
    slopes = torch.where(near, 1 + ratio.square() / 3, ratio.atanh() / ratio.masked_fill(near, 1.0)) * 2 / total
    moved = vectors @ (slopes * (vectors.T @ (wide - wide.detach()) @ vectors)) @ vectors.T  # 0, with a gradient
    return ((vectors * values.log()) @ vectors.T + moved).to(matrix.dtype)


class Module(nn.Module):
    """The teachers' weights `alpha` [m], equal at the start and alike on all workers, and the loss.

    `step` says how they learn.

    Args:
        teachers_similarity: One shape a teacher.
        epsilon: As in the loss.
        validation_share: Share of each batch, its last samples, whose labels judge the teachers; the rest makes the virtual
            step. 0: the weights stay equal.
        alpha_lr: Rate of the weights. Ours: the paper's is not known to us.
        risk: `similarity`: squared difference between the cosine of two held-out samples and 1 if they are of one class, else
            0, since the paper's identities are not those of a classifier; the exact form is ours. `cross_entropy`: of the
            student's logits.
    """

    alpha: Tensor

    def __init__(
        self,
        teachers_similarity: list[Shape],
        *,
        epsilon: float,
        validation_share: float = 0.25,
        alpha_lr: float = 10.0,
        risk: Literal["similarity", "cross_entropy"] = "similarity",
    ) -> None:
        super().__init__()
        check_choice("mt-wu", risk=risk, known=("similarity", "cross_entropy"))
        if not 0 <= validation_share < 1:
            raise ConfigError(
                f"validation_share: expected a number from 0 to below 1, got {validation_share} (mt-wu). Lower it."
            )
        self.epsilon, self.validation_share, self.alpha_lr, self.risk = epsilon, validation_share, alpha_lr, risk
        self.register_buffer("alpha", torch.full((len(teachers_similarity),), 1 / len(teachers_similarity)))

    def forward(
        self, student_similarity: Float[Tensor, "b b"], teachers_similarity: list[Float[Tensor, "b b"]]
    ) -> Float[Tensor, ""]:
        """The loss under the weights as they are."""
        return mt_wu_loss(student_similarity, teachers_similarity, self.alpha, epsilon=self.epsilon)


def step(module: Module, learner: Any, batch: Mapping[str, Tensor], signals: Mapping[str, Any]) -> None:
    """Moves `alpha` down the risk that the student would have on the held-out samples after a step along this loss alone.

    With L the loss on the other samples, f its weight, r the learner's rate now and R the risk on the held-out ones:
    theta' = theta - r f dL/dtheta, alpha becomes the point of the simplex nearest to alpha - alpha_lr * dR(theta')/dalpha,
    where dR(theta')/dalpha = -r f d2L/(dalpha dtheta) dR(theta')/dtheta', its mean over the workers.

    Three more passes over parts of the batch. The step is virtual: parameters, statistics of batch norm and random numbers
    are as before.
    """
    samples = len(batch["labels"])
    held = round(module.validation_share * samples)
    found = module.alpha.new_zeros(0, len(module.alpha))  # too few samples to judge by
    if held >= 2 and samples - held >= 2:
        found = _slope(module, learner, batch, signals["teachers"], samples - held)[None]
    found = gather(found)
    if len(found):
        module.alpha.copy_(_on_simplex(module.alpha - module.alpha_lr * found.mean(0)))


def _slope(
    module: Module, learner: Any, batch: Mapping[str, Tensor], teachers: list[Mapping[str, Tensor]], cut: int
) -> Float[Tensor, "m"]:
    """dR(theta')/dalpha, with the samples before `cut` for the step and those from it on for the risk."""
    images, labels, student = batch["images"], batch["labels"], learner.student
    taught = [found["similarity"][:cut, :cut] for found in teachers]
    rate = learner.optimizer.param_groups[0]["lr"] * next(own.weight for own in learner.losses.values() if own.module is module)
    parameters = [p for p in student.parameters() if p.requires_grad]
    kept, buffers = [p.detach().clone() for p in parameters], [b.clone() for b in student.buffers()]
    alpha = module.alpha.clone().requires_grad_()
    downhill = _gradient(_loss(module, _repeated(learner.tapped, images[:cut]), taught, alpha), parameters)
    _assign(parameters, [p - rate * g for p, g in zip(kept, downhill)])
    uphill = _gradient(_risk(module, _repeated(learner.tapped, images[cut:]), labels[cut:]), parameters)
    _assign(parameters, kept)
    along = _gradient(_loss(module, _repeated(learner.tapped, images[:cut]), taught, alpha), parameters, create_graph=True)
    (found,) = torch.autograd.grad(torch.stack([(a * u).sum() for a, u in zip(along, uphill)]).sum(), [alpha])
    _assign(list(student.buffers()), buffers)
    return -rate * found


def _repeated(tapped: Any, images: Tensor) -> Mapping[str, Tensor]:
    """The student's signals under the same dropout at every call; the random numbers of the step are not used up."""
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        return tapped(images)


def _loss(module: Module, student: Mapping[str, Tensor], taught: list[Tensor], alpha: Tensor) -> Tensor:
    return mt_wu_loss(student["similarity"], taught, alpha, epsilon=module.epsilon)


def _risk(module: Module, student: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    if module.risk == "cross_entropy":
        return nn.functional.cross_entropy(full(student["logits"]), labels)
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    alike = (labels[:, None] == labels)[others]
    return (full(student["similarity"])[others] - alike.to(module.alpha.dtype)).square().mean()


def _gradient(value: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(value, parameters, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


@torch.no_grad()
def _assign(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values):
        tensor.copy_(value)


def _on_simplex(point: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """The nearest point with coordinates of at least 0 that add up to 1 (Duchi et al., ICML 2008)."""
    falling = point.sort(descending=True).values
    excess = (falling.cumsum(0) - 1) / torch.arange(1, len(point) + 1, device=point.device)
    level = excess[(falling > excess).nonzero().max()]
    return (point - level).clamp_min(0)
