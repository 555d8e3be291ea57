"""Chains of jobs: what `stages` of a method is made of. Pure functions of frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raykd.config import Job, Loss, Teacher
from raykd.errors import ConfigError

COMPARED = ("temperature", "weight", "ce_weight", "drop_num", "drop_probability")  # options that a stage has of its loss


def stage_names(name: str, count: int) -> list[str]:
    """`<loss>-1`, `<loss>-2`, ..."""
    return [f"{name}-{k}" for k in range(1, count + 1)]


def there(job: Job, names: Sequence[str], models: Sequence[str], where: str) -> bool:
    """Whether these stages are in the job already; False where none is.

    Args:
        job: with or without them.
        names: of the stages.
        models: the architecture each trains.
        where: the option that names these.

    Raises:
        ConfigError: some are, or a teacher has the name of one: they are not ours. Or they were made of other settings.
    """
    if names and all(name in job.stages for name in names):
        own = job.losses[where.split(".")[1]].options
        for name, model in zip(names, models):
            stage = job.stages[name]
            made = {"model": stage.student.model, "seed": stage.seed}
            made |= {o: v for loss in stage.losses.values() for o, v in loss.options.items() if o in own and o in COMPARED}
            now = {"model": model, "seed": job.seed, **{option: own[option] for option in made if option in own}}
            changed = [f"{o} was {made[o]!r}, is {now[o]!r}" for o in made if made[o] != now[o]]
            if changed:
                raise ConfigError(
                    f"{where}: expected the settings that stage {name!r} was made of, got others ({'; '.join(changed)}). "
                    "Start from the job's own file, or change the stages too."
                )
        return True
    taken = [name for name in names if name in job.stages or name in job.teachers]
    if taken:
        raise ConfigError(
            f"{where}: expected no stage or teacher called {' or '.join(names)}, got {', '.join(taken)}. "
            "Call them, or the loss, something else."
        )
    return False


def words(value: Any, where: str) -> tuple[str, ...]:
    """An option that lists architectures, as a tuple; one word may stand for a list of it alone.

    Raises:
        ConfigError: it lists something else.
    """
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (tuple, list)) or not all(isinstance(entry, str) and entry for entry in found):
        raise ConfigError(f"{where}: expected names of architectures, got {value!r}.")
    return tuple(found)


def heard_by(job: Job, name: str) -> tuple[str, ...]:
    """The teachers a loss listens to.

    Raises:
        ConfigError: there are none.
    """
    found = job.losses[name].teachers or tuple(job.teachers)
    missing = [teacher for teacher in found if teacher not in job.teachers]
    if not found or missing:
        wanted = "at least one teacher in the job" if not found else f"teachers of the job, {', '.join(job.teachers) or 'none'}"
        raise ConfigError(
            f"losses.{name}.teachers: expected {wanted}, got {', '.join(missing) or 'none'}. Add them to `teachers`."
        )
    return tuple(found)


def stage_job(job: Job, stage: str, model: str, teachers: Mapping[str, Teacher], losses: Mapping[str, Loss]) -> Job:
    """The job of one stage: a student of another architecture, from scratch, with the job's data and training."""
    student = replace(job.student, model=model, weights=None, weights_sha256=None, options={})
    changed: dict[str, Any] = {"teachers": dict(teachers), "losses": dict(losses), "stages": {}, "baseline": False}
    return replace(job, name=f"{job.name}-{stage}", student=student, **changed)


def stage_teacher(job: Job, stage: str, model: str, like: Teacher) -> Teacher:
    """The student of a stage as a teacher: it lives where `like` lives, and sees what a student sees."""
    student = job.student
    return replace(
        like,
        model=model,
        weights=f"stage:{stage}",
        weights_sha256=None,
        options={},
        normalise=student.normalise,
        input_size=student.input_size,
        dtype=student.dtype,
        compile=student.compile,
        channels_last=student.channels_last,
        placement="pool" if like.placement == "store" else like.placement,
        on_loss="stop",
        weight=1.0,
        actor=None,
        label_map=None,
        store=None,
        fill="none",
    )


def listening(job: Job, besides: str) -> dict[str, Loss]:
    """The job's other losses, each naming the teachers it listens to now, since the job will get more."""
    return {
        name: loss
        if loss.teachers or not job.teachers
        else Loss(loss.method, layers=loss.layers, teachers=tuple(job.teachers), aggregate=loss.aggregate, **loss.options)
        for name, loss in job.losses.items()
        if name != besides
    }
