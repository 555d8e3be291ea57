"""KA-Common-Feature: teachers of different classes and the student meet in a common feature space and one list of outputs."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ConfigError
from raykd.parts.adapters import Shape, pointwise
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full, per_sample

NAME = "KA-Common-Feature"
PAPER = (
    "Luo, Wang, Fang, Hu, Tao, Song: Knowledge Amalgamation from Heterogeneous Networks by Common Feature Learning. "
    "IJCAI 2019, arXiv:1906.10546"
)
SECTION = "3.1"
SCHEME = "offline"
LAYERS = ("stage-1",)


def ka_common_feature_loss(
    student_logits: Float[Tensor, "b c"],
    student_common: Float[Tensor, "b d h w"],
    teachers_logits: list[Float[Tensor, "b _k"]],
    teachers_classes: list[Int[Tensor, "_k"]],
    teachers_common: list[Float[Tensor, "b d h w"]],
    teachers_rebuilt: list[Float[Tensor, "b _c _h _w"]],
    teachers_feature: list[Float[Tensor, "b _c _h _w"]],
    *,
    alpha: float = 0.5,
    lam: float = 1.0,
    targets: Literal["l2", "soft"] = "l2",
    temperature: float = 1.0,
    bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0),
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "..."]]:
    """Penalises outputs unlike the teachers', a student off the teachers' place in the common space, and a space that forgets.

    With z_T the logits of all teachers joined to one vector, z_S the student's at the same classes, k(x, y) the sum over
    bandwidths s of exp(-||x - y||^2 / (2 s^2)), and u, v_m the common features of student and teachers, flattened, at unit
    length:
    output = alpha * ||z_S - z_T||^2 (l2), or
    alpha * temperature^2 * KL(softmax(z_T / temperature) || softmax(z_S / temperature)) (soft),
    common = (1 - alpha) * sum over teachers m of
    (mean over i, j of k(u_i, u_j) + mean of k(v_mi, v_mj) - 2 * mean of k(u_i, v_mj)),
    reconstruction = (1 - alpha) * lam * sum over teachers m of mean over channels and places of
    (teachers_rebuilt_m - teachers_feature_m)^2

    Args:
        student_logits: Class scores.
        student_common: The student's feature in the common space.
        teachers_logits: Class scores of each teacher, of its own classes.
        teachers_classes: The student's class of each class of each teacher.
        teachers_common: The teachers' features in the common space.
        teachers_rebuilt: What the decoders make of them again.
        teachers_feature: Activations of each teacher's layer, which the decoders should give.
        alpha: Share of output against common and reconstruction, 0 to 1.
        lam: Factor of reconstruction.
        targets: `l2` compares scores, as the paper; `soft` softened distributions over all teachers' outputs.
        temperature: Of `soft`, above 0.
        bandwidths: Of the kernels, above 0; features have unit length, so distances are at most 2.
        weight: Factor of all terms, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner; 0, no labels are used.

    Returns:
        Terms output (squared scores, or nats times temperature^2) and reconstruction (squared activations) per sample; term
        common per batch, without unit, at least 0: it couples the batch.

    Raises:
        SignalError: The shapes differ. ConfigError: No such targets.

    Example:
        >>> import torch
        >>> x, classes, space = torch.tensor([[1.0, 2.0]]), [torch.arange(2)], torch.ones(1, 2, 1, 1)
        >>> terms = ka_common_feature_loss(x, space, [x - 1], classes, [-space], [space], [space])
        >>> {term: round(value.item(), 4) for term, value in terms.items()}
        {'output': 1.0, 'common': 3.2578, 'reconstruction': 0.0}

    References:
        arXiv:1906.10546

    Note:
        Unsure: the paper's alpha and bandwidths. The kernel mean is over the batch, so the more samples a worker sees the
        better it is; it does not depend on which sample of a teacher stands beside which of the student.
    """
    check_choice("ka-common-feature", targets=targets, known=("l2", "soft"))
    lists = {"teachers_classes": teachers_classes, "teachers_common": teachers_common, "teachers_rebuilt": teachers_rebuilt}
    same_length("ka-common-feature", teachers_logits=teachers_logits, teachers_feature=teachers_feature, **lists)
    for i, logits in enumerate(teachers_logits):
        check_axes(
            "ka-common-feature",
            student_logits=(student_logits, "b classes"),
            student_common=(student_common, "b d m n"),
            **{
                f"teachers_logits[{i}]": (logits, "b k"),
                f"teachers_classes[{i}]": (teachers_classes[i], "k"),
                f"teachers_common[{i}]": (teachers_common[i], "b d m n"),
                f"teachers_rebuilt[{i}]": (teachers_rebuilt[i], "b c h w"),
                f"teachers_feature[{i}]": (teachers_feature[i], "b c h w"),
            },
        )
    student = full(student_logits)[:, torch.cat(teachers_classes)]
    teacher = torch.cat([full(logits) for logits in teachers_logits], dim=1)
    output = (student - teacher).square().sum(1) if targets == "l2" else _divergence(student, teacher, temperature)
    common = [_discrepancy(student_common, other, bandwidths) for other in teachers_common]
    rebuilt = [per_sample((full(a) - full(b)).square()) for a, b in zip(teachers_rebuilt, teachers_feature)]
    return {
        "output": alpha * output,
        "common": (1 - alpha) * torch.stack(common).sum(),
        "reconstruction": (1 - alpha) * lam * torch.stack(rebuilt).sum(0),
    }


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    teacher, student = F.log_softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1)


def _discrepancy(student: Tensor, teacher: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Squared maximum mean discrepancy of two batches at unit length."""
    u, v = F.normalize(full(student).flatten(1), dim=1), F.normalize(full(teacher).flatten(1), dim=1)
    return _kernel_mean(u, u, bandwidths) + _kernel_mean(v, v, bandwidths) - 2 * _kernel_mean(u, v, bandwidths)


def _kernel_mean(a: Tensor, b: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    apart = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
    return torch.stack([(-apart / (2 * width**2)).exp().mean() for width in bandwidths]).sum()


class _Residual(nn.Module):
    """Two 1x1 convolutions added onto their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = pointwise(channels, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class Module(nn.Module):
    """Adapters of student and teachers, a shared extractor into the common space, decoders back, and the loss.

    Adapters are 1x1 convolutions, the extractor three residual blocks of them, each decoder two with a ReLU between. Nothing of
    it is normalised: the kernels see features of unit length.

    Args:
        student_feature: Shape [c h w].
        teachers_feature: Shapes [c h w], one a teacher. All maps are average pooled to the smallest among them, and it is the
            pooled map that is rebuilt.
        common_channels: Of the common space.
    """

    def __init__(self, student_feature: Shape, teachers_feature: list[Shape], *, common_channels: int = 128) -> None:
        super().__init__()
        if common_channels < 1:
            raise ConfigError(f"common_channels: expected at least 1, got {common_channels} (ka-common-feature).")
        shapes = [student_feature, *teachers_feature]
        self.size = (min(shape[-2] for shape in shapes), min(shape[-1] for shape in shapes))
        self.student_adapter = pointwise(student_feature[0], common_channels)
        self.teacher_adapters = nn.ModuleList(pointwise(shape[0], common_channels) for shape in teachers_feature)
        self.extractor = nn.Sequential(*(_Residual(common_channels) for _ in range(3)))
        self.decoders = nn.ModuleList(pointwise(common_channels, common_channels, shape[0]) for shape in teachers_feature)

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        student_feature: Float[Tensor, "b cs hs ws"],
        teachers_logits: list[Float[Tensor, "b _k"]],
        teachers_feature: list[Float[Tensor, "b _ct _ht _wt"]],
        teachers_classes: list[Int[Tensor, "_k"]],
        *,
        alpha: float,
        lam: float,
        targets: Literal["l2", "soft"],
        temperature: float,
        bandwidths: tuple[float, ...],
    ) -> dict[str, Float[Tensor, "..."]]:
        """The loss in the common space."""
        same_length("ka-common-feature", teachers_feature=teachers_feature, adapters=self.teacher_adapters)
        student = self.extractor(self.student_adapter(self._pooled(student_feature)))
        pooled = [self._pooled(feature) for feature in teachers_feature]
        common = [self.extractor(adapt(feature)) for adapt, feature in zip(self.teacher_adapters, pooled)]
        rebuilt = [decode(space) for decode, space in zip(self.decoders, common)]
        return ka_common_feature_loss(
            student_logits,
            student,
            teachers_logits,
            teachers_classes,
            common,
            rebuilt,
            pooled,
            alpha=alpha,
            lam=lam,
            targets=targets,
            temperature=temperature,
            bandwidths=bandwidths,
        )

    def _pooled(self, feature: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(full(feature), self.size)
