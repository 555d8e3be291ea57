"""From a resolved job to the objects that run it: connected losses, teachers, sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raykd import catalogue, models
from raykd.config import Job, Network, Teacher
from raykd.data.batches import Batch, from_recipe
from raykd.data.splits import open_data
from raykd.errors import ConfigError, ModelError
from raykd.exchange import codec as codecs
from raykd.exchange.sources import InlineSource, LocalSource, Source
from raykd.roles.losses import Plan, plans
from raykd.roles.network import Facts, model_options, pick_device
from raykd.roles.teacher import Teacher as TeacherRole
from raykd.signals import Signal

STAGE = "stage:"


def facts(job: Job) -> Facts:
    """Facts of the training data."""
    train = open_data(job.data, "train", job.seed)
    shape = job.data.augmentation.out_shape(train.shape)
    return Facts(len(train), job.data.num_classes, shape, job.data.normalise)


def meta_model(spec: Network, known: Facts) -> torch.nn.Module:
    """The model for shapes, layers and costs: without weights or memory, unless its factory cannot do without.

    Raises:
        ModelError: there is no such model, or it refuses an option.
    """
    with torch.random.fork_rng(devices=[]):
        if spec.weights == "pretrained":
            models.check_published(spec.model)
            with torch.device("meta"):
                return models.build_default(spec.model)
        try:
            with torch.device("meta"):
                return models.build(spec.model, known.num_classes, **model_options(spec, known))
        except ModelError:  # a factory that reads values needs them; what is wrong anyway is told by the second attempt
            return models.build(spec.model, known.num_classes, **model_options(spec, known))


def stages(job: Job, known: Facts) -> dict[str, list[str]]:
    """ "student" and each teacher -> the names of that model's stages."""
    specs: dict[str, Network] = {"student": job.student, **job.teachers}
    return {name: models.stages(meta_model(spec, known)) for name, spec in specs.items()}


def connect(job: Job, known: Facts) -> list[Plan]:
    """The job's losses, connected to layers that exist."""
    return plans(job, stages(job, known))


def wanted(found: list[Plan], teacher: str) -> tuple[Signal, ...]:
    """What the losses ask of one teacher, each signal once."""
    return tuple(dict.fromkeys(s for plan in found if plan.teacher == teacher for s in plan.wanted("teacher")))


def codec(job: Job, found: list[Plan], teacher: str) -> codecs.Codec:
    """The codec of one teacher; a topk codec is cut at the temperature of the losses that listen.

    Raises:
        ConfigError: a listening loss needs every class, or the temperatures differ.
    """
    chosen = codecs.parse(job.teachers[teacher].codec)
    if chosen.kind != "topk":
        return chosen
    listening = [p for p in found if p.teacher == teacher and any(s.kind == "logits" for s in p.wanted("teacher"))]
    dense = sorted({p.name for p in listening if not p.method.sparse})
    if dense:
        raise ConfigError(
            f"teachers.{teacher}.codec: expected one that keeps every class for {', '.join(dense)}, "
            f"got {job.teachers[teacher].codec}. Use dense, fp16 or int8."
        )
    temperatures = {float(p.loss.options.get("temperature", 1.0)) for p in listening}
    if len(temperatures) > 1:
        raise ConfigError(
            f"teachers.{teacher}.codec: {job.teachers[teacher].codec} is exact at one temperature only, and the losses use "
            f"{sorted(temperatures)}. Use dense, fp16 or int8, or one temperature."
        )
    return dataclasses.replace(chosen, temperature=temperatures.pop() if temperatures else 1.0)


def make_teacher(job: Job, name: str, found: list[Plan], known: Facts) -> TeacherRole:
    """One replica of a teacher, in this process."""
    torch.set_num_threads(job.launch.threads)
    spec = job.teachers[name]
    device = pick_device(job.launch.device, spec.gpus if spec.placement == "pool" else job.launch.gpus)
    return TeacherRole(spec, wanted(found, name), known, codec(job, found, name), device, _restore(job, spec), name)


def local_sources(job: Job, found: list[Plan], known: Facts, pickled: bool) -> dict[str, Source]:
    """Sources for teachers in this process: all of them (local backend, `pickled`), or those placed inline."""
    sources: dict[str, Source] = {}
    for name, spec in job.teachers.items():
        if spec.placement == "inline":
            sources[name] = InlineSource(make_teacher(job, name, found, known))
        elif pickled:
            sources[name] = LocalSource(make_teacher(job, name, found, known), spec.inputs)
    return sources


def with_stage_weights(job: Job, folders: Mapping[str, Path]) -> Job:
    """Replaces `weights="stage:<name>"` by the file that stage wrote."""
    teachers = {name: _from_stage(spec, folders) for name, spec in job.teachers.items()}
    return dataclasses.replace(job, teachers=teachers, student=_from_stage(job.student, folders))


def _from_stage(spec: Any, folders: Mapping[str, Path]) -> Any:
    if spec.weights is None or not spec.weights.startswith(STAGE):
        return spec
    return dataclasses.replace(spec, weights=str(folders[spec.weights[len(STAGE) :]] / "student.safetensors"))


def _restore(job: Job, spec: Teacher) -> Any:
    if spec.inputs != "recipe":
        return None
    train = open_data(job.data, "train", job.seed)
    train.read(np.zeros(1, np.int64))  # decodes the whole set where there is no cache yet: now, not in the first request

    def restore(fields: Mapping[str, Any]) -> Tensor:
        recipe = Batch({name: torch.from_numpy(value.copy()) for name, value in fields.items()})
        return from_recipe(train, job.data.augmentation, job.seed, recipe)["images"]

    return restore


def couples_batch(plan: Plan) -> bool:
    """Whether a loss reads a signal that is reduced over the batch."""
    known = catalogue.derived()
    return any(known[s.kind].per_batch for w in plan.wires for s in w.signals if s.kind in known)
