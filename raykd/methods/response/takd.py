"""TAKD: a chain of assistants between teacher and student, each distilled from the one before it."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from raykd.config import Job, Loss
from raykd.errors import ConfigError
from raykd.methods.response.kd import kd_loss
from raykd.parts.chains import heard_by, listening, stage_job, stage_names, stage_teacher, there, words
from raykd.parts.checks import check_axes

NAME = "TAKD"
PAPER = (
    "Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh: Improved Knowledge Distillation via Teacher Assistant. "
    "AAAI 2020, arXiv:1902.03393"
)
SECTION = "1.1"
SCHEME = "offline"
SPARSE = True


def takd_loss(
    student_logits: Float[Tensor, "b *p c"],
    teacher_logits: Float[Tensor, "b *p c"],
    *,
    assistants: tuple[str, ...] = (),
    temperature: float = 4.0,
    weight: float = 0.9,
    ce_weight: float = 0.1,
) -> Float[Tensor, "b"]:
    """Penalises, at every link of the chain, the divergence of the learner's softened distribution from its predecessor's.

    temperature^2 * KL(softmax(teacher_logits / temperature) || softmax(student_logits / temperature))

    Args:
        student_logits: Class scores of the link that learns, classes last.
        teacher_logits: The same of the link before it, which is frozen.
        assistants: Architectures between teacher and student, large to small. They make the stages; the formula does not
            read them.
        temperature: Softens both distributions, above 0. The paper searches it in {1, 2, 5, 10, 15, 20}; 4 as in kd.
        weight: The paper's lambda, at every link; searched in 0.05 to 1 there; 0.9 as in kd. Applied by the learner.
        ce_weight: Factor of the cross-entropy at every link, applied by the learner; the paper's 1 - lambda.

    Returns:
        Per sample, in nats times temperature^2; the mean over positions, if there are any.

    Raises:
        SignalError: The shapes differ.

    Example:
        >>> import torch
        >>> takd_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])

    References:
        arXiv:1902.03393

    Note:
        Each link is one stage with the data, the budget and the seed of the job, its student from scratch. Other losses of
        the job are the last student's alone: they do not go along, and go on listening to the job's own teachers. Public code
        averages over the classes too (the divergence is then as many times smaller), searches the seed among the
        hyper-parameters and selects on the test images; none of that is done here.
    """
    check_axes("takd", student_logits=(student_logits, "b *p c"), teacher_logits=(teacher_logits, "b *p c"))
    return kd_loss(student_logits, teacher_logits, temperature=temperature)


def stages(job: Job, name: str) -> Job:
    """Puts one stage an assistant before the job: teacher -> `<name>-1` -> ... -> student.

    Raises:
        ConfigError: no assistants are named, or the names of the stages are taken.
    """
    loss = job.losses[name]
    models = words(loss.options.get("assistants", ()), f"losses.{name}.assistants")
    if not models:
        raise ConfigError(
            f"losses.{name}.assistants: expected architectures between teacher and student, large to small, got none. Set it, "
            f"for example assistants=('crd_resnet32',), or take `kd`, which has none."
        )
    names = stage_names(name, len(models))
    if there(job, names, models, f"losses.{name}.assistants"):
        return job
    heard = heard_by(job, name)
    teachers = {teacher: job.teachers[teacher] for teacher in heard}
    link = {**(takd_loss.__kwdefaults__ or {}), **loss.options}
    del link["assistants"]
    found = dict(job.stages)
    for stage, model in zip(names, models):
        taught = Loss("kd", teachers=tuple(teachers), aggregate=loss.aggregate if len(teachers) > 1 else None, **link)
        found[stage] = stage_job(job, stage, model, teachers, {name: taught})
        teachers = {stage: stage_teacher(job, stage, model, job.teachers[heard[0]])}
    others = listening(job, name)
    kept = {t: spec for t, spec in job.teachers.items() if any(t in other.teachers for other in others.values())}
    last = Loss(loss.method, teachers=tuple(teachers), **loss.options)
    losses = {n: last if n == name else others[n] for n in job.losses}
    return replace(job, stages=found, teachers={**kept, **teachers}, losses=losses)
