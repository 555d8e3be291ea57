"""DGKD: every assistant and the student learn from the teacher and all larger assistants, some of them dropped each step."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.config import Job, Loss
from raykd.errors import ConfigError
from raykd.parts.chains import heard_by, listening, stage_job, stage_names, stage_teacher, there, words
from raykd.parts.checks import check_axes, same_length
from raykd.parts.numeric import full, per_sample

NAME = "DGKD"
PAPER = (
    "Son, Na, Choi, Hwang: Densely Guided Knowledge Distillation using Multiple Teacher Assistants. ICCV 2021, arXiv:2009.08825"
)
SECTION = "1.1"
SCHEME = "offline"
SPARSE = True


def dgkd_loss(
    student_logits: Float[Tensor, "b *p c"],
    teachers_logits: list[Float[Tensor, "b *p c"]],
    kept: Float[Tensor, "m"],
    *,
    temperature: float = 5.0,
    weight: float = 0.9,
    ce_weight: float = 0.1,
) -> Float[Tensor, "b"]:
    """Penalises the divergence of the learner's softened distribution from those of the guides that this step keeps.

    temperature^2 * sum over guides i of
    kept_i * KL(softmax(teachers_logits_i / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores of the link that learns, classes last.
        teachers_logits: The same of its guides: the teacher and all larger assistants.
        kept: 1 for each guide that is heard in this step, 0 for the others.
        temperature: Softens all distributions, above 0; 5 as in the authors' code.
        weight: The paper's lambda, applied by the learner.
        ce_weight: Factor of the cross-entropy, applied by the learner; the paper's 1 - lambda.

    Returns:
        Per sample, in nats times temperature^2; the mean over positions, if there are any.

    Raises:
        SignalError: The shapes differ, or the number of guides.

    Example:
        >>> import torch
        >>> even, odds = torch.zeros(1, 2), torch.tensor([[5.0, 0.0]])
        >>> dgkd_loss(even, [even, odds], torch.tensor([1.0, 0.0]))
        tensor([0.])

    References:
        arXiv:2009.08825

    Note:
        Unsure: the paper's value of lambda. The authors' public command sets it to 1, which removes the cross-entropy
        altogether, and averages over the classes too; here the sum over classes goes with 0.9 and 0.1. Other losses of the
        job are the last student's alone: they do not go along, and go on listening to the job's own teachers.
    """
    same_length("dgkd", teachers_logits=teachers_logits, kept=kept)
    for i, logits in enumerate(teachers_logits):
        check_axes("dgkd", student_logits=(student_logits, "b *p c"), **{f"teachers_logits[{i}]": (logits, "b *p c")})
    check_axes("dgkd", kept=(kept, "m"))
    student, shares = F.log_softmax(full(student_logits) / temperature, dim=-1), full(kept)
    values = []
    for i, logits in enumerate(teachers_logits):
        teacher = F.log_softmax(full(logits) / temperature, dim=-1)
        values.append(shares[i] * per_sample((teacher.exp() * (teacher - student)).sum(-1)))
    return temperature**2 * torch.stack(values).sum(0)


class Module(nn.Module):
    """Draws the guides of each step, and the loss. It trains and remembers nothing.

    Args:
        assistants: Architectures between teacher and student, large to small: they make the stages. None: the job's
            teachers are the guides.
        drop_num: Guides dropped each step, at random; one is always kept. 0: none, the paper's plain form.
        drop_probability: If set, each guide is dropped with this probability instead, below 1; one is always kept.
    """

    def __init__(self, *, assistants: tuple[str, ...] = (), drop_num: int = 1, drop_probability: float | None = None) -> None:
        super().__init__()
        if drop_num < 0 or not 0 <= (drop_probability or 0.0) < 1:
            raise ConfigError(
                f"drop_num, drop_probability: expected at least 0, below 1, got {drop_num}, {drop_probability} (dgkd)."
            )
        self.drop_num, self.drop_probability = drop_num, drop_probability

    def forward(
        self,
        student_logits: Float[Tensor, "b *p c"],
        teachers_logits: list[Float[Tensor, "b *p c"]],
        generator: torch.Generator,
        *,
        temperature: float,
    ) -> Float[Tensor, "b"]:
        """The loss of the guides that are kept, the same for the whole batch."""
        kept = self.draw(len(teachers_logits), generator).to(student_logits.device)
        return dgkd_loss(student_logits, teachers_logits, kept, temperature=temperature)

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "m"]:
        """1 for a guide that is kept. Each draws a number: the smallest `drop_num` go, or those below the probability, but
        never the largest."""
        numbers = torch.rand(count, generator=generator, dtype=torch.float64)
        rank = numbers.argsort().argsort()
        stays = rank >= self.drop_num if self.drop_probability is None else numbers >= self.drop_probability
        return (stays | (rank == count - 1)).float()


def stages(job: Job, name: str) -> Job:
    """Puts one stage an assistant before the job; each learns from the teacher and all stages before it.

    Raises:
        ConfigError: the names of the stages are taken.
    """
    loss = job.losses[name]
    models = words(loss.options.get("assistants", ()), f"losses.{name}.assistants")
    names = stage_names(name, len(models))
    if not models or there(job, names, models, f"losses.{name}.assistants"):
        return job
    heard = heard_by(job, name)
    guides = {teacher: job.teachers[teacher] for teacher in heard}
    options = {option: value for option, value in loss.options.items() if option != "assistants"}
    found = dict(job.stages)
    for stage, model in zip(names, models):
        taught = Loss(loss.method, teachers=tuple(guides), **options)
        found[stage] = stage_job(job, stage, model, guides, {name: taught})
        guides = {**guides, stage: stage_teacher(job, stage, model, job.teachers[heard[0]])}
    others = listening(job, name)
    last = Loss(loss.method, teachers=tuple(guides), **loss.options)
    losses = {n: last if n == name else others[n] for n in job.losses}
    return replace(job, stages=found, teachers={**job.teachers, **guides}, losses=losses)
