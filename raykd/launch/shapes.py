"""What shapes alone can tell, on the meta device: models that take the images, layers that exist, losses that fit.

Every model runs once on a worker's batch of stand-ins, and every loss is called on what comes out, so that a shape that will
not do is found before anything starts. A loss that reads values (crd does) cannot run without them: the first step tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raykd import catalogue, models
from raykd.config import Job, Network
from raykd.errors import ModelError, RaykdError, SignalError, told
from raykd.launch import assembly
from raykd.roles.learner import shapes_of, without_ema
from raykd.roles.losses import BoundLoss, Plan
from raykd.roles.network import Facts, Tapped, branching_of, input_shape, model_options, own_dtype, structured
from raykd.roles.pieces import pieces
from raykd.roles.synthesizer import generator_of
from raykd.signals import CLASSIFIER, LOCAL, Signal, Signals, is_norm

META = torch.device("meta")
FEW = 4  # samples for a model that has to run on the CPU


@dataclass
class Model:
    """One model of a job, where it can run: without memory, or on the CPU where its forward reads values.

    `module` is the plain model, `whole` has its branches too.
    """

    spec: Network
    module: nn.Module
    cost: models.Cost
    device: torch.device
    whole: nn.Module
    branches: int = 1


def model(spec: Network, known: Facts) -> Model:
    """Builds a model and runs it on one image.

    Raises:
        ModelError: no such model, it refuses an option, or it does not take these images.
    """
    shape = input_shape(spec, known)
    try:
        module = assembly.meta_model(spec, known)
        try:
            cost = models.cost(module, shape)
        except Exception as error:
            if not _reads_values(error):
                raise
            module = models.build(spec.model, known.num_classes, **model_options(spec, known))
            cost = models.cost(module, shape)
    except RaykdError:
        raise
    except Exception as error:
        raise ModelError(
            f"{spec.model}: expected a model that takes images of {' x '.join(map(str, shape))}, got {told(error)}. "
            "Change the model, its options or its input_size, or data.size."
        ) from error
    device = next(module.parameters(), torch.empty(0)).device
    if branching_of(spec) is None:
        return Model(spec, module, cost, device, module)
    with torch.random.fork_rng(devices=[]), device:
        whole = structured(spec, known)
    assert isinstance(whole, models.Branched)
    return Model(spec, module, cost, device, whole, whole.count)


def check_layers(plan: Plan, built: Mapping[str, Model]) -> None:
    """Raises SignalError where a layer that a loss reads is not in its model."""
    for name, wanted in (("student", [*plan.student, *plan.ema]), *((t, plan.asks(t)) for t in plan.teachers)):
        for signal in wanted:
            whole = built[name].whole
            if signal.layer is not None and isinstance(whole, models.Branched):
                models.resolve(whole, whole.path(signal.branch, signal.layer))
            elif signal.layer is not None:
                models.resolve(whole, signal.layer)


def signals(found: Model, wanted: list[Signal], known: Facts, batch: int) -> Signals:
    """What a model answers for a batch: key -> tensor without memory.

    Raises:
        RaykdError: a tap never fires, or the model yields no logits.
    """
    count = batch if found.device == META else FEW
    own = [without_ema(s).without(LOCAL) for s in wanted]
    tapped = Tapped(found.spec, found.whole.eval(), [Signal("logits"), *own], known, found.device)
    try:
        with torch.no_grad():
            images = torch.zeros((count, *known.shape), dtype=torch.uint8, device=found.device)
            seen = tapped(images) | (tapped(images, key=0) if any(s.view for s in own) else {})
            seen |= {s.key: seen[plain.key] for s, plain in zip(wanted, own)}
    finally:
        tapped.close()
    if not isinstance(seen["logits"], Tensor):
        raise ModelError(f"{found.spec.model}: expected one tensor of logits, got {type(seen['logits']).__name__}.")
    kinds = catalogue.derived()
    coupled = {s.key for s in wanted if s.kind in kinds and kinds[s.kind].per_batch}
    whole = {s.key for s in wanted if is_norm(s.kind, kinds)}
    shapes = {k: (batch, batch) if k in coupled else (batch, *v.shape[1:]) for k, v in seen.items() if k not in whole}
    shapes |= {key: tuple(seen[key].shape) for key in whole}
    return {key: torch.empty(shape, dtype=seen[key].dtype, device=META) for key, shape in shapes.items()}


def facts_of_teacher(plan: Plan, built: Mapping[str, Model]) -> dict[str, Tensor]:
    """What a loss asks of its teacher once, without values.

    Raises:
        ModelError: the teacher has no such thing.
    """
    if not plan.reads(CLASSIFIER):
        return {}
    return {CLASSIFIER: models.classifier(built[plan.teachers[0]].module).weight.to(META)}


def pieces_of(plan: Plan, built: Mapping[str, Model], known: Facts) -> dict[str, Any]:
    """Parts of student and teacher that a loss is built with, without values.

    Raises:
        ModelError: a network cannot be cut there.
    """
    if not plan.teachers:
        return {}
    student, teacher = built["student"], built[plan.teachers[0]]
    shapes = input_shape(student.spec, known), input_shape(teacher.spec, known)
    return pieces(plan, student.module, lambda: teacher.module, *shapes)


def bind(
    job: Job,
    plan: Plan,
    seen: Mapping[str, Signals],
    known: Facts,
    batch: int,
    images: bool = False,
    more: Mapping[str, Any] | None = None,
) -> tuple[int, bool]:
    """Builds a loss from shapes and calls it once.

    Args:
        job: resolved.
        plan: the loss.
        seen: "student" and each teacher -> its signals; of an aggregate, its key too.
        known: of the data.
        batch: samples of a worker's batch.
        images: whether the images minimise it: then teachers' signals lead back to them.
        more: see `facts_of_teacher` and `pieces_of`.

    Returns:
        (trainable parameters beside the student, whether the loss couples the batch).

    Raises:
        RaykdError: the shapes do not fit, or the loss answers with something that is no loss.
    """
    roles: dict[str, Any] = {"student": {k: _trained(v) for k, v in seen["student"].items()}, "ema": seen["student"]}
    if images:
        seen = {role: {k: _trained(v) for k, v in own.items()} for role, own in seen.items()}
    role = plan.role or "teacher"
    if plan.aggregate is not None and len({tuple(seen[t]["logits"].shape) for t in plan.teachers}) > 1:
        got = ", ".join(f"{t} {seen[t]['logits'].shape[-1]}" for t in plan.teachers)
        raise SignalError(f"aggregate: expected teachers of as many classes, got {got}. Leave `aggregate` out, or a teacher.")
    if plan.lists:
        roles[role] = [seen[name] for name in plan.teachers]
    elif plan.teachers:
        roles[role] = seen[plan.teachers[0]]
    try:
        with META:
            shapes = {role: shapes_of(found) for role, found in roles.items()}
            loss = BoundLoss(plan, shapes, known, torch.zeros(known.num_samples, dtype=torch.int64), job, more)
            loss.to(own_dtype(job.student))
            fields = {name: torch.zeros(batch, dtype=torch.int64) for name in ("labels", "sample_index")}
            fields["images"] = torch.zeros((batch, *known.shape), dtype=torch.float32 if images else torch.uint8)
            fields["latents"] = torch.zeros((batch, job.synthesis.latent or 1))
            fields["normalised_images"] = torch.zeros((batch, *known.shape), requires_grad=images)
            fields["real_images"], fields["real_labels"] = torch.zeros((batch, *known.shape)), fields["labels"]
            terms = _call(loss, fields, roles)
    except RaykdError:
        raise
    except Exception as error:
        there = [*plan.student, *plan.ema, *(s for t in plan.teachers for s in plan.asks(t))]
        every = [seen["student"], *(seen[t] for t in plan.teachers)]
        given = [f"{s.key} {list(own[s.key].shape)}" for s in there for own in every if s.key in own]
        raise SignalError(
            f"expected a loss that runs on {', '.join(dict.fromkeys(given))}, got {told(error, str(plan.method.path))}. "
            "Look at that line, or choose other layers."
        ) from error
    if terms is not None:
        _check_terms(terms, batch, "the images" if images else "the student")
    coupled = terms is not None and any(value.ndim == 0 for value in terms.values())
    return sum(p.numel() for p in loss.parameters()), coupled or assembly.couples_batch(plan)


def generator(job: Job, known: Facts) -> None:
    """Builds the generator and makes images with it, by shapes alone.

    Raises:
        RaykdError: no such generator, or it makes images of another shape.
    """
    spec = job.synthesis
    with torch.random.fork_rng(devices=[]), META:
        made = generator_of(job, known)
        images = made(torch.zeros(FEW, spec.latent or 1), torch.zeros(FEW, dtype=torch.int64))
    if tuple(images.shape[1:]) != known.shape:
        raise ModelError(
            f"{spec.generator}: expected images of {known.shape}, got {tuple(images.shape[1:])}. Change its options."
        )


def _call(loss: BoundLoss, fields: Mapping[str, Tensor], roles: Mapping[str, Any]) -> dict[str, Any] | None:
    """The terms; None where the loss reads values."""
    try:
        with torch.enable_grad():
            loss.critics(fields, 0, 0, 0)
            return loss({**fields, **loss.targets(fields["labels"], torch.Generator("cpu"))}, roles, 0, 0, 0)
    except SignalError as error:
        if error.__cause__ is None:
            raise
        if _reads_values(error.__cause__):
            return None
        raise error.__cause__ from None
    except (NotImplementedError, RuntimeError) as error:  # of `targets`
        if _reads_values(error):
            return None
        raise


def _check_terms(terms: Mapping[str, Any], batch: int, of: str) -> None:
    wanted = f"one value a sample [{batch}], or [] where the loss couples the batch (or a dict of such)"
    for name, value in terms.items():
        where = f" ({name})" if name else ""
        if not isinstance(value, Tensor):
            raise SignalError(f"expected {wanted}, got {type(value).__name__}{where}. End the loss with `return`.")
        if tuple(value.shape) not in ((), (batch,)):
            raise SignalError(f"expected {wanted}, got {list(value.shape)}{where}. Sum or average over the other axes.")
    if not any(value.requires_grad for value in terms.values()):
        use = "a student's signal" if of == "the student" else "a signal of theirs"
        raise SignalError(f"expected a loss that depends on {of}, got one without a gradient. Use {use}.")


def _trained(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value


def _reads_values(error: BaseException) -> bool:
    """Whether something failed only because tensors on the meta device hold no values."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()
