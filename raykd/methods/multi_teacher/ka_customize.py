"""KA-Customize: a student for the classes one wants, out of teachers that each know some of them, without labels."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.config import Job, Loss
from raykd.errors import ConfigError
from raykd.parts.adapters import Shape, pointwise
from raykd.parts.chains import heard_by, listening, stage_job, stage_names, stage_teacher, there, words
from raykd.parts.checks import check_axes, check_choice, same_length
from raykd.parts.numeric import full, per_sample

NAME = "KA-Customize"
PAPER = (
    "Shen, Xue, Wang, Song, Sun, Song: Customizing Student Networks From Heterogeneous Teachers via Adaptive Knowledge "
    "Amalgamation. ICCV 2019, arXiv:1908.07121"
)
SECTION = "3.1"
SCHEME = "offline"
LAYERS = "stages"


def ka_customize_loss(
    student_logits: Float[Tensor, "b c"],
    student_commons: list[Float[Tensor, "b _d _h _w"]],
    teachers_logits: list[Float[Tensor, "b _k"]],
    teachers_classes: list[Int[Tensor, "_k"]],
    teachers_commons: list[list[Float[Tensor, "b _d _h _w"]]],
    *,
    lam: float = 1.0,
    targets: Literal["soft", "l2"] = "soft",
    temperature: float = 1.0,
    weight: float = 1.0,
    ce_weight: float = 0.0,
) -> dict[str, Float[Tensor, "b"]]:
    """Penalises outputs and features unlike those of the teachers that are surest of each sample.

    With H_m the entropy of softmax(teachers_logits_m), over the log of its number of classes, and the share s_m the part of
    teacher m's classes that no teacher with a smaller H knows too:
    output = sum over teachers m of s_m * temperature^2 *
    KL(softmax(teachers_logits_m / temperature) || softmax(student_logits at teachers_classes_m / temperature)), or of
    s_m * mean over classes of the squared difference of the logits (l2),
    feature = lam * sum over teachers m and layers l of
    s_m * mean over channels and places of (student_commons_l - teachers_commons_ml)^2

    Args:
        student_logits: Class scores.
        student_commons: The student's layers in the common spaces, one a layer.
        teachers_logits: Class scores of each teacher, of its own classes.
        teachers_classes: The student's class of each class of each teacher.
        teachers_commons: Each teacher's layers in the common spaces.
        lam: Factor of feature.
        targets: `soft` compares softened distributions, `l2` the scores.
        temperature: Of `soft`, above 0.
        weight: Factor of both terms, applied by the learner.
        ce_weight: Factor of the cross-entropy with the labels, applied by the learner; 0, no labels are used.

    Returns:
        Terms output (nats times temperature^2, or squared scores) and feature (squared activations) per sample.

    Raises:
        SignalError: The shapes differ. ConfigError: No such targets.

    Example:
        >>> import torch
        >>> sure, unsure, classes = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.arange(2)
        >>> space = torch.ones(1, 2, 1, 1)
        >>> terms = ka_customize_loss(sure, [space], [unsure, sure], [classes, classes], [[-space], [space]])
        >>> {term: value.item() for term, value in terms.items()}
        {'output': 0.0, 'feature': 0.0}

    References:
        arXiv:1908.07121

    Note:
        Teachers that know the same classes compete for each sample, as the paper's do for each task, and the surest alone
        teaches it; teachers that share no class all teach it. Where label maps overlap in part, the less sure teacher keeps the
        share of its classes that it alone knows. Unsure: the paper's loss weights and its form of the soft targets. Both
        adapters are trained, as the row of the survey has it; since a common space of nothing would please this term, the
        Module's `trained_adapters="student"` holds the teachers' side still.
    """
    check_choice("ka-customize", targets=targets, known=("soft", "l2"))
    same_length(
        "ka-customize", teachers_logits=teachers_logits, teachers_classes=teachers_classes, teachers_commons=teachers_commons
    )
    for m, (logits, classes) in enumerate(zip(teachers_logits, teachers_classes)):
        signals = {f"teachers_logits[{m}]": (logits, "b k"), f"teachers_classes[{m}]": (classes, "k")}
        check_axes("ka-customize", student_logits=(student_logits, "b c"), **signals)
        same_length("ka-customize", student_commons=student_commons, **{f"teachers_commons[{m}]": teachers_commons[m]})
        for i, (own, common) in enumerate(zip(student_commons, teachers_commons[m])):
            pair = {f"student_commons[{i}]": (own, "b d h w"), f"teachers_commons[{m}][{i}]": (common, "b d h w")}
            check_axes("ka-customize", student_logits=(student_logits, "b c"), **pair)
    shares = _shares(teachers_logits, teachers_classes, student_logits.shape[1])
    output, feature = [], []
    for m, (logits, classes) in enumerate(zip(teachers_logits, teachers_classes)):
        output.append(shares[:, m] * _apart(full(student_logits)[:, classes], full(logits), targets, temperature))
        gaps = [per_sample((full(a) - full(b)).square()) for a, b in zip(student_commons, teachers_commons[m])]
        feature.append(shares[:, m] * torch.stack(gaps).sum(0))
    return {"output": torch.stack(output).sum(0), "feature": lam * torch.stack(feature).sum(0)}


def _shares(logits: list[Tensor], classes: list[Tensor], count: int) -> Float[Tensor, "b m"]:
    """For each sample, the share of each teacher's classes for which it is the surest of those that know the class."""
    unsure = []
    for scores in logits:
        log_p = F.log_softmax(full(scores.detach()), dim=1)
        unsure.append(-(log_p.exp() * log_p).sum(1) / math.log(max(scores.shape[1], 2)))
    entropy = torch.stack(unsure, dim=1)
    knows = torch.stack([torch.zeros(count, device=c.device).index_fill(0, c, 1.0) for c in classes])
    doubt = torch.where(knows.T[None] > 0, entropy[:, None, :], torch.inf)
    surest = F.one_hot(doubt.argmin(2), len(logits)).to(entropy.dtype) * knows.T.to(entropy.dtype)
    return surest.sum(1) / knows.sum(1).to(entropy.dtype)


def _apart(student: Tensor, teacher: Tensor, targets: str, temperature: float) -> Tensor:
    if targets == "l2":
        return (student - teacher).square().mean(1)
    log_p, log_q = F.log_softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)


def _places(teacher: int, classes: list[int], asked: tuple[int, ...]) -> list[int]:
    """Where in a teacher's logits the classes stand that are asked of it; everywhere if none are named."""
    unknown = [k for k in asked if k not in classes]
    if unknown:
        raise ConfigError(
            f"known[{teacher}]: expected classes among {classes}, got {unknown} (ka-customize). See its label_map."
        )
    return [place for place, k in enumerate(classes) if not asked or k in asked]


class Module(nn.Module):
    """1x1 convolutions of student and teachers into a common space for each layer, and the loss.

    Args:
        student_features: Shapes [c h w], one a layer.
        teachers_features: Shapes [c h w], for each teacher one a layer. Of one layer, all maps are average pooled to the
            smallest.
        teachers_classes: The student's class of each class of each teacher.
        components: Architectures of the first step: one for each group of teachers with the same label map, or one for all.
            They make the stages; none: the student learns from the teachers directly.
        known: For each teacher the student's classes that are asked of it; empty: all of its own. `components` sets it.
        common_channels: Of the common spaces.
        trained_adapters: `both`, or `student`: the teachers' stay as they were drawn.
    """

    def __init__(
        self,
        student_features: list[Shape],
        teachers_features: list[list[Shape]],
        teachers_classes: list[Int[Tensor, "_k"]],
        *,
        components: tuple[str, ...] = (),
        known: tuple[tuple[int, ...], ...] = (),
        common_channels: int = 128,
        trained_adapters: Literal["both", "student"] = "both",
    ) -> None:
        super().__init__()
        check_choice("ka-customize", trained_adapters=trained_adapters, known=("both", "student"))
        if known and len(known) != len(teachers_features):
            raise ConfigError(
                f"known: expected classes for each of {len(teachers_features)} teachers, got {len(known)} (ka-customize)."
            )
        for shapes in teachers_features:
            same_length("ka-customize", student_features=student_features, teachers_features=shapes)
        self.places = [_places(m, own.tolist(), known[m] if known else ()) for m, own in enumerate(teachers_classes)]
        layers = list(zip(student_features, *teachers_features))
        self.sizes = [(min(shape[-2] for shape in layer), min(shape[-1] for shape in layer)) for layer in layers]
        self.student_adapters = nn.ModuleList(pointwise(shape[0], common_channels) for shape in student_features)
        self.teacher_adapters = nn.ModuleList(
            nn.ModuleList(pointwise(shape[0], common_channels) for shape in shapes) for shapes in teachers_features
        )
        self.teacher_adapters.requires_grad_(trained_adapters == "both")

    def forward(
        self,
        student_logits: Float[Tensor, "b c"],
        student_features: list[Float[Tensor, "b _cs _hs _ws"]],
        teachers_logits: list[Float[Tensor, "b _k"]],
        teachers_features: list[list[Float[Tensor, "b _ct _ht _wt"]]],
        teachers_classes: list[Int[Tensor, "_k"]],
        *,
        lam: float,
        targets: Literal["soft", "l2"],
        temperature: float,
    ) -> dict[str, Float[Tensor, "b"]]:
        """The loss in the common spaces."""
        same_length("ka-customize", teachers_features=teachers_features, adapters=self.teacher_adapters)
        student = self._common(self.student_adapters, student_features)
        teachers = [self._common(own.children(), features) for own, features in zip(self.teacher_adapters, teachers_features)]
        logits = [z[:, at] for z, at in zip(teachers_logits, self.places, strict=True)]
        classes = [own[at] for own, at in zip(teachers_classes, self.places)]
        options = {"lam": lam, "temperature": temperature}
        return ka_customize_loss(student_logits, student, logits, classes, teachers, targets=targets, **options)

    def _common(self, adapters: Iterable[nn.Module], features: list[Tensor]) -> list[Tensor]:
        triples = zip(adapters, features, self.sizes, strict=True)
        return [adapt(F.adaptive_avg_pool2d(full(feature), size)) for adapt, feature, size in triples]


def stages(job: Job, name: str) -> Job:
    """The first step, where components are named: one stage for each group of teachers that know the same classes.

    A component has the student's outputs and learns those of its group; in the second step, which is the job itself, it is
    asked for these alone. (So its own accuracy over all classes says little.)

    Raises:
        ConfigError: there are more groups than components, or the names of the stages are taken.
    """
    loss = job.losses[name]
    models = words(loss.options.get("components", ()), f"losses.{name}.components")
    if not models:
        return job
    heard = heard_by(job, name)
    maps = list(dict.fromkeys(job.teachers[teacher].label_map for teacher in heard))
    names = stage_names(name, len(maps))
    if there(job, names, models, f"losses.{name}.components"):
        return job
    if len(models) not in (1, len(maps)):
        raise ConfigError(
            f"losses.{name}.components: expected one architecture, or one for each of {len(maps)} groups of teachers with the "
            f"same label map, got {len(models)}."
        )
    options = {option: value for option, value in loss.options.items() if option not in ("components", "known")}
    found, components = dict(job.stages), {}
    for stage, model, classes in zip(names, models * (len(maps) if len(models) == 1 else 1), maps):
        group = {t: job.teachers[t] for t in heard if job.teachers[t].label_map == classes}
        taught = Loss(loss.method, layers=loss.layers, teachers=tuple(group), **options)
        found[stage] = stage_job(job, stage, model, group, {name: taught})
        components[stage] = stage_teacher(job, stage, model, next(iter(group.values())))
    others = listening(job, name)
    kept = {t: spec for t, spec in job.teachers.items() if any(t in other.teachers for other in others.values())}
    known = tuple(classes or () for classes in maps)
    last = Loss(loss.method, layers=loss.layers, teachers=tuple(components), **{**loss.options, "known": known})
    losses = {n: last if n == name else others[n] for n in job.losses}
    return replace(job, stages=found, teachers={**kept, **components}, losses=losses)
