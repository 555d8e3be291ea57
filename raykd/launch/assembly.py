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
from raykd.data.splits import has_split, open_data
from raykd.errors import ConfigError, DataError, ModelError
from raykd.exchange import codec as codecs
from raykd.exchange.asking import Ask, Asks
from raykd.exchange.sources import InlineSource, LocalSource, Source
from raykd.exchange.stored import StoreSource
from raykd.resolve import reads_images
from raykd.roles.losses import Plan, image_plans, plans
from raykd.roles.network import Facts, branching_of, input_shape, model_options, pick_device, structured
from raykd.roles.process import settle
from raykd.roles.teacher import Committee, own_facts
from raykd.roles.teacher import Teacher as TeacherRole
from raykd.signals import Signal, is_norm

STAGE = "stage:"
AT_ONE = ("mean_logits", "confidence", "entropy", "label")  # aggregators that read logits beside softmax(z / temperature)


def facts(job: Job) -> Facts:
    """Facts of the training data; of a job that makes its own images, what they are to be like."""
    if makes_images(job):
        like = open_data(job.data, next(s for s in ("test", "eval") if has_split(job.data, s)))
        return Facts(
            job.synthesis.steps_per_epoch * (job.training.batch_size or 1), job.data.num_classes, like.shape, job.data.normalise
        )
    train = open_data(job.data, "train", job.data_seed)
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
    return {name: stages_of(spec, known) for name, spec in {"student": job.student, **job.teachers}.items()}


def stages_of(spec: Network, known: Facts) -> list[str]:
    """The names of a model's stages."""
    return models.stages(meta_model(spec, _own(spec, known)))


def _own(spec: Network, known: Facts) -> Facts:
    """Facts as this model sees them."""
    return own_facts(spec, known) if isinstance(spec, Teacher) else known


def connect(job: Job, known: Facts) -> list[Plan]:
    """The job's losses, connected to layers that exist."""
    return plans(job, stages(job, known), branches=branches(job.student, known), norms=norms(job, known))


def norms(job: Job, known: Facts) -> dict[str, list[str]]:
    """ "student" and each teacher -> the names of that model's batch norms, where a loss reads their statistics."""
    methods = [m for loss in job.losses.values() for m in (catalogue.method(loss.method),)]
    methods += [m.images for m in methods if m.images is not None]
    if not any(is_norm(p.kind, catalogue.derived()) for m in methods for p in m.signals):
        return {}
    specs: dict[str, Network] = {"student": job.student, **job.teachers}
    return {name: models.norms(meta_model(spec, _own(spec, known)), input_shape(spec, known)) for name, spec in specs.items()}


def makes_images(job: Job) -> bool:
    """Whether a job has no images to learn from, and makes its own."""
    return any(catalogue.method(loss.method).images is not None for loss in job.losses.values())


def check_beside(job: Job, known: Facts) -> None:
    """Whether training images beside made ones, and views of images from a bank, are of the size of those that are made.

    Raises:
        ConfigError: they are augmented to another size.
        DataError: training images are of another shape, or cannot be read.
    """
    beside = reads_images(job) and has_split(job.data, "train")
    shape = open_data(job.data, "train", job.data_seed).shape if beside else known.shape
    if job.data.augmentation.out_shape(shape) != shape:
        raise ConfigError(
            f"data.augmentation.resized_crop: expected {shape[1]}, as images are without it, got "
            f"{job.data.augmentation.resized_crop}. Change it, or data.size."
        )
    if shape != known.shape:
        raise DataError(
            f"data.train: expected images of {known.shape}, as those that are measured on and made, got {shape}. Set data.size."
        )


def tells_of_data(job: Job) -> bool:
    """Whether what a job has learned from is a part of its result: it makes images, or reads a few of each class."""
    return makes_images(job) or job.data.per_class is not None


def real_data(job: Job) -> str:
    """What a job knows of real images beside those it is measured on; where it makes its own, its method says the rest."""
    methods = (catalogue.method(loss.method) for loss in job.losses.values())
    said = [m.synthesis.get("real_data") for m in methods if m.images is not None]
    known = [str(word) for word in said if word]
    if reads_images(job) or not makes_images(job):
        data = job.data
        count = f"{data.per_class} a class" if data.per_class is not None else f"{data.limit or 'all'} of them"
        known.insert(0, f"training images ({count})")
    return "; ".join(known) or "none"


def connect_images(job: Job, known: Facts) -> list[Plan]:
    """What a job's own images minimise, connected to layers that exist."""
    if not makes_images(job):
        return []
    return image_plans(job, stages(job, known), branches(job.student, known), norms(job, known))


def branches(spec: Network, known: Facts) -> int:
    """How many branches a model has."""
    if branching_of(spec) is None:
        return 1
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = structured(spec, known)
    assert isinstance(model, models.Branched)
    return model.count


def groups(job: Job) -> dict[str, tuple[str, ...]]:
    """Source -> the teachers it answers for: a teacher's own name, or the actor that several share."""
    found: dict[str, tuple[str, ...]] = {}
    for name, spec in job.teachers.items():
        shared = spec.actor if spec.placement == "pool" and spec.actor is not None else name
        found[shared] = (*found.get(shared, ()), name)
    return found


def asks(job: Job, found: list[Plan], teachers: tuple[str, ...]) -> Asks:
    """What the job's losses ask of the teachers of one source; what they aggregate of these teachers alone is made there."""
    there = [p.aggregate for p in found if p.aggregate is not None and _made_there(p, teachers)]
    of = tuple(Ask(name, wanted(found, name, teachers), codec(job, found, name)) for name in teachers)
    return Asks(of, tuple(dict.fromkeys(there)))


def wanted(found: list[Plan], teacher: str, sharing: tuple[str, ...] = ()) -> tuple[Signal, ...]:
    """What the losses ask of one teacher, each signal once; not what is aggregated among the teachers `sharing` its actor."""
    return tuple(dict.fromkeys(s for plan in found if not _made_there(plan, sharing) for s in plan.asks(teacher)))


def _made_there(plan: Plan, teachers: tuple[str, ...]) -> bool:
    return plan.aggregate is not None and len(teachers) > 1 and set(plan.aggregate.teachers) <= set(teachers)


def codec(job: Job, found: list[Plan], teacher: str) -> codecs.Codec:
    """The codec of one teacher; a topk codec is cut at the temperature of the losses that listen.

    Raises:
        ConfigError: a listening loss needs every class, or the temperatures differ.
    """
    chosen = codecs.parse(job.teachers[teacher].codec)
    if chosen.kind != "topk":
        return chosen
    listening = [p for p in found if any(s.kind == "logits" for s in p.asks(teacher))]
    dense = sorted({p.name for p in listening if not p.method.sparse})
    if dense:
        raise ConfigError(
            f"teachers.{teacher}.codec: expected one that keeps every class for {', '.join(dense)}, "
            f"got {job.teachers[teacher].codec}. Use dense, fp16 or int8."
        )
    unfit = sorted({p.name for p in listening if p.aggregate is not None and p.aggregate.how in AT_ONE})
    if unfit:
        raise ConfigError(
            f"teachers.{teacher}.codec: {job.teachers[teacher].codec} is exact at the loss's temperature only, and the "
            f"aggregate of {', '.join(unfit)} reads more. Use dense, fp16 or int8, or aggregate='mean_probs'."
        )
    temperatures = {float(p.loss.options.get("temperature", 1.0)) for p in listening}
    if len(temperatures) > 1:
        raise ConfigError(
            f"teachers.{teacher}.codec: {job.teachers[teacher].codec} is exact at one temperature only, and the losses use "
            f"{sorted(temperatures)}. Use dense, fp16 or int8, or one temperature."
        )
    return dataclasses.replace(chosen, temperature=temperatures.pop() if temperatures else 1.0)


def make_committee(job: Job, names: tuple[str, ...], known: Facts) -> Committee:
    """The teachers of one replica, in this process."""
    settle(job.launch.threads)
    specs = {name: job.teachers[name] for name in names}
    gpus = max(spec.gpus if pooled(spec) else job.launch.gpus for spec in specs.values())
    device = pick_device(job.launch.device, gpus)
    teachers = {name: TeacherRole(spec, known, device, name) for name, spec in specs.items()}
    return Committee(teachers, job.data_seed, _restore(job, next(iter(specs.values()))))


def pooled(spec: Teacher) -> bool:
    """Whether replicas of a teacher are started: to answer, or for what its store has not."""
    return spec.placement == "pool" or (spec.placement == "store" and spec.fill == "pool")


def local_sources(job: Job, found: list[Plan], known: Facts, pickled: bool) -> dict[str, Source]:
    """Sources for teachers in this process: all of them (local backend, `pickled`), or those placed inline or in a store."""
    sources: dict[str, Source] = {}
    for source, names in groups(job).items():
        spec = job.teachers[names[0]]
        live: Source | None = None
        if spec.placement == "inline" or (spec.placement == "store" and spec.fill == "inline"):
            live = InlineSource(make_committee(job, names, known), asks(job, found, names))
        elif pooled(spec) and pickled:
            live = LocalSource(make_committee(job, names, known), asks(job, found, names), spec.inputs)
        if spec.placement == "store":
            sources[source] = StoreSource(Path(str(spec.store)), source, wanted(found, source), live)
        elif live is not None:
            sources[source] = live
    return sources


def with_stage_weights(job: Job, folders: Mapping[str, Path]) -> Job:
    """Replaces `weights="stage:<name>"` by the file that stage wrote; stages that have not run yet stay as they are."""
    teachers = {name: _from_stage(spec, folders) for name, spec in job.teachers.items()}
    peers = {name: _from_stage(spec, folders) for name, spec in job.peers.items()}
    return dataclasses.replace(job, teachers=teachers, peers=peers, student=_from_stage(job.student, folders))


def _from_stage(spec: Any, folders: Mapping[str, Path]) -> Any:
    stage, peer = stage_of(spec.weights)
    if stage is None or stage not in folders:
        return spec
    place = folders[stage] / "peers" / peer if peer else folders[stage]
    return dataclasses.replace(spec, weights=str(place / "student.safetensors"))


def stage_of(weights: str | None) -> tuple[str | None, str]:
    """`stage:<name>` or, of a stage with peers, `stage:<name>/<peer>`: the stage, None where weights are something else; the
    peer."""
    if weights is None or not weights.startswith(STAGE):
        return None, ""
    stage, _, peer = weights[len(STAGE) :].partition("/")
    return stage, peer


def _restore(job: Job, spec: Teacher) -> Any:
    if spec.inputs != "recipe":
        return None
    train = open_data(job.data, "train", job.data_seed)
    train.read(np.zeros(1, np.int64))  # decodes the whole set where there is no cache yet: now, not in the first request

    def restore(fields: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return from_recipe(train, job.data.augmentation, job.data_seed, Batch(fields), job.data.view)

    return restore


def couples_batch(plan: Plan) -> bool:
    """Whether a loss reads a signal that is reduced over the batch."""
    known = catalogue.derived()
    every = [s for w in plan.wires for s in w.signals]
    return any(is_norm(s.kind, known) or (s.kind in known and known[s.kind].per_batch) for s in every)
