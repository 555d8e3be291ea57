"""From what a user wrote to a job that says all of a run: reading, checking types and names, filling, setting by path.

The resolved job is written to the run folder as job.json and can be run from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from raykd import catalogue
from raykd.config import (
    NO_DATA,
    Augmentation,
    Branching,
    Data,
    Edge,
    Exchange,
    Job,
    Launch,
    Loss,
    Network,
    Peer,
    Student,
    Synthesis,
    Teacher,
    Training,
)
from raykd.errors import ConfigError, JobFaults, RaykdError, near

_SGD: Mapping[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": False,
    "decay_norms": True,
    "scheduler": "multistep",
    "gamma": 0.1,
    "warmup_epochs": 0.0,
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    # CRD / RepDistiller protocol on CIFAR-100 (lr 0.01 for MobileNetV2 and ShuffleNets: set it in the job)
    "crd": {**_SGD, "epochs": 240, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4, "milestones": (150, 180, 210)},
    # ImageNet, ResNet-34 -> ResNet-18
    "imagenet": {**_SGD, "epochs": 100, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "milestones": (30, 60, 90)},
    # OKDDip, ONE, PCL
    "online": {
        **_SGD,
        "epochs": 300,
        "batch_size": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "milestones": (150, 225),
        "nesterov": True,
    },
    # CS-KD and its kin
    "self_kd": {**_SGD, "epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "milestones": (100, 150)},
}

EMA_DECAY = 0.999  # of the averaged copy, where a loss reads it and the job does not set one (arXiv:1703.01780)
SYNTHESIS: Mapping[str, Any] = {
    "generator": "dcgan",
    "latent": 100,
    "before": 0,
    "generator_steps": 1,
    "student_steps": 1,
    "noise": "step",
    "optimizer": "adam",
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "scheduler": "constant",
    "student_mode": "eval",
    "mode": "lockstep",
    "real": 0.0,
    "steps": 200,
    "reset": "batch",
    "meta": "fomaml",
    "max_restarts": 3,
    "latents_lr": 0.0,
    "keep": "last",
    "jitter": 0,
    "flip": False,
    "clip": False,
    "capacity": 256,
    "grow": "always",
    "start": 1,
}
PEERS_OWN = (
    *("optimizer", "lr", "momentum", "nesterov", "weight_decay", "optimizer_options", "decay_norms", "scheduler", "milestones"),
    *("gamma", "warmup_epochs", "clip_norm", "ema", "ema_warmup", "label_smoothing", "evaluate"),
)  # settings of `training` that a peer may have of its own; the others are of all peers together
T = TypeVar("T")
N = TypeVar("N", bound=Network)
S = TypeVar("S", bound=Student)


def to_dict(value: Any) -> Any:
    """A job (or a part of one) as plain, JSON-ready data; `from_dict` reads it back."""
    if isinstance(value, Loss):
        head: dict[str, Any] = {"method": value.method}
        head |= {"layers": to_dict(value.layers)} if value.layers is not None else {}
        head |= {"teachers": list(value.teachers)} if value.teachers else {}
        head |= {"aggregate": value.aggregate} if value.aggregate is not None else {}
        return head | to_dict(value.options)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    return value


def from_dict(data: Mapping[str, Any]) -> Job:
    """Reads a job from plain data.

    Raises:
        JobFaults: every unknown or ill-typed setting, with its path and nearest neighbours.
    """
    try:
        return TypeAdapter(Job).validate_python(_name_losses(dict(data)))
    except ValidationError as error:
        raise JobFaults.of(_explain(e) for e in error.errors()) from None


def validate(job: Job) -> Job:
    """Checks types and names of a job made in Python (dataclasses do not check), and normalises short forms.

    Raises:
        JobFaults: every unknown or ill-typed setting, option or method, with its path and nearest neighbours.
    """
    if not isinstance(job, Job):
        raise ConfigError(f"Job: expected a raykd.Job, got {type(job).__name__}. A job function returns `raykd.Job(...)`.")
    checked = from_dict(to_dict(job))
    faults = option_faults(checked)
    if faults:
        raise JobFaults.of(faults)
    return checked


def option_faults(job: Job, where: str = "") -> list[str]:
    """Faults of the losses' names, options and teachers, and of recipes, in this job and its stages."""
    faults = []
    if job.training.recipe not in RECIPES:
        faults.append(f"{where}training.recipe: no recipe {job.training.recipe!r}. {near(job.training.recipe, RECIPES)}")
    for name, loss in job.losses.items():
        path = f"{where}losses.{name}"
        try:
            method = catalogue.method(loss.method)
        except RaykdError as error:
            faults.append(f"{path}: {error}")
            continue
        faults += _loss_faults(path, loss, method, job)
    for name, peer in job.peers.items():
        faults += _peer_faults(f"{where}peers.{name}.training", peer, job)
    for name, stage in job.stages.items():
        faults += option_faults(stage, f"{where}stages.{name}.")
    return faults


def _loss_faults(path: str, loss: Loss, method: catalogue.Method, job: Job) -> list[str]:
    faults = []
    known = {*method.options, *catalogue.RESERVED}
    for option, value in loss.options.items():
        if option not in known:
            faults.append(f"{path}.{option}: {method.slug} has no such option. {near(option, sorted(known))}")
            continue
        wanted = _wanted(option, method)
        if wanted is not None and not _fits(value, wanted):
            faults.append(f"{path}.{option}: expected {wanted}, got {value!r}.")
        elif isinstance(value, (int, float)) and (least := _least(option)) and not least[1](value):
            faults.append(f"{path}.{option}: expected {least[0]}, got {value!r}.")
    for declared in method.options.values():
        if declared.default is catalogue.REQUIRED and declared.name not in loss.options:
            faults.append(f"{path}.{declared.name}: {method.slug} needs this option and has no default for it.")
    everyone = (*job.teachers, *job.peers)
    for teacher in loss.teachers:
        if teacher not in everyone:
            faults.append(f"{path}.teachers: no teacher {teacher!r} in this job. {near(teacher, everyone)}")
    return faults + _layer_faults(path, loss.layers, everyone)


def _peer_faults(path: str, peer: Peer, job: Job) -> list[str]:
    known = [f.name for f in dataclasses.fields(Training)]
    faults = []
    for setting in peer.training:
        if setting not in known:
            faults.append(f"{path}.{setting}: no such setting. {near(setting, PEERS_OWN)}")
        elif setting not in PEERS_OWN:
            faults.append(
                f"{path}.{setting}: expected a setting that a peer may have of its own, got one of all. Set training."
            )
    if faults:
        return faults
    try:
        TypeAdapter(Training).validate_python({**to_dict(job.training), **to_dict(peer.training)})
    except ValidationError as error:
        return [f"{path}.{_explain(e)}" for e in error.errors()]
    return []


def _layer_faults(path: str, layers: Any, teachers: tuple[str, ...]) -> list[str]:
    roles = layers if isinstance(layers, Mapping) else {"student": layers or ()}
    known = ("student", "teacher", "peer", *teachers)
    faults = [f"{path}.layers: no role {role!r}. {near(role, known)}" for role in roles if role not in known]
    bad = [name for names in roles.values() for name in names if not isinstance(name, str) or not name]
    return faults + [f"{path}.layers: expected names of layers, got {name!r}." for name in bad]


def _least(option: str) -> tuple[str, Callable[[float], bool]] | None:
    """What an option of this name may be at least, in words and as a test; by name, as it means the same in every method."""
    if option == "temperature" or option.endswith("_temperature"):
        return "a temperature above 0", lambda value: value > 0
    if option in ("weight", "ce_weight"):
        return "a weight of at least 0", lambda value: value >= 0
    return None


def _wanted(option: str, method: catalogue.Method) -> str | None:
    declared = method.options.get(option)
    if declared is not None and declared.annotation:
        return declared.annotation
    return {"weight": "float", "ce_weight": "float", "schedule": "str"}.get(option)


def _fits(value: Any, annotation: str) -> bool:
    literal = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", annotation)
    if literal:
        return repr(value) in [part.strip().replace('"', "'") for part in literal.group(1).split(",")]
    if value is None:
        return "None" in annotation
    kinds = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,)}
    wanted = [kinds[part.strip()] for part in annotation.split("|") if part.strip() in kinds]
    if not wanted:
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False
    flat = tuple(kind for group in wanted for kind in group)
    return isinstance(value, flat) and (bool in flat or not isinstance(value, bool))


def resolve(job: Job) -> Job:
    """Fills what recipes, methods and the data leave open, so that the job says all of the run.

    Raises:
        JobFaults: as `validate`; also losses that disagree on `ce_weight` where the job does not set it.
    """
    job = expand(validate(job))
    training = resolve_training(job.training)
    losses = {name: _resolve_loss(loss) for name, loss in job.losses.items()}
    ce_weights = {loss.options["ce_weight"] for loss in losses.values()}
    ce_weight = job.ce_weight
    if ce_weight is None and len(ce_weights) > 1:
        shown = ", ".join(f"{name} {loss.options['ce_weight']}" for name, loss in losses.items())
        raise JobFaults.of([f"ce_weight: the losses want different weights of cross-entropy ({shown}). Set ce_weight."])
    if ce_weight is None:
        ce_weight = ce_weights.pop() if ce_weights else 1.0
    methods = [catalogue.method(loss.method) for loss in losses.values()]
    if training.ema is None and any("ema" in m.roles or any("ema" in (p.view or "") for p in m.signals) for m in methods):
        training = dataclasses.replace(training, ema=EMA_DECAY)
    synthesis = _synthesis(job.synthesis, methods)
    reads = _reads_images(synthesis, methods)
    return dataclasses.replace(
        job,
        data=_resolve_data(job.data if reads else _without_images(job.data, methods)),
        student=_branched(_resolve_weights(job.student, job.data), methods, "student"),
        teachers={name: _resolve_weights(teacher, job.data) for name, teacher in job.teachers.items()},
        peers={n: _branched(_resolve_weights(p, job.data), methods, f"peers.{n}") for n, p in job.peers.items()},
        training=training,
        synthesis=synthesis,
        losses=losses,
        ce_weight=ce_weight,
        stages={name: resolve(stage) for name, stage in job.stages.items()},
    )


def _branched(spec: S, methods: list[catalogue.Method], where: str) -> S:
    """Its branching, filled from what the losses ask for where the job leaves its kind open.

    Raises:
        JobFaults: the losses ask for different ones.
    """
    asked = [m for m in methods if m.branching]
    if spec.branching.kind is not None or not asked:
        kind = spec.branching.kind or "none"
        return dataclasses.replace(spec, branching=dataclasses.replace(spec.branching, kind=kind))
    if any(dict(m.branching) != dict(asked[0].branching) for m in asked):
        names = ", ".join(m.slug for m in asked)
        raise JobFaults.of([f"{where}.branching: the losses {names} ask for different branches. Set it, or use one of them."])
    default, own = Branching(), to_dict(spec.branching)
    filled = {**own, **{k: to_dict(v) for k, v in asked[0].branching.items() if own[k] == to_dict(getattr(default, k))}}
    return dataclasses.replace(spec, branching=TypeAdapter(Branching).validate_python(filled))


def _without_images(data: Data, methods: list[catalogue.Method]) -> Data:
    """The data of a job that makes its own images: nothing to learn from.

    Raises:
        JobFaults: the job names training images.
    """
    if not any(m.images is not None for m in methods):
        return data
    if data.train not in (None, NO_DATA):
        raise JobFaults.of([f"data.train: this job makes its own images, got {data.train!r} to learn from. Leave it out."])
    return dataclasses.replace(data, train=NO_DATA)


def reads_images(job: Job) -> bool:
    """Whether a job that makes its own images reads training images beside: a share of each batch, or as its method wants."""
    return _reads_images(job.synthesis, [catalogue.method(loss.method) for loss in job.losses.values()])


def _reads_images(spec: Synthesis, methods: Sequence[catalogue.Method]) -> bool:
    return bool(spec.real) or any(m.reads_real for m in methods)


def _synthesis(own: Synthesis, methods: list[catalogue.Method]) -> Synthesis:
    """Its open settings filled from the method that makes images."""
    asked = next((m.synthesis for m in methods if m.images is not None), {})
    filled = {**SYNTHESIS, **{name: value for name, value in asked.items() if hasattr(own, name)}}
    if own.generator not in (None, filled["generator"]):
        filled.pop("options", None)  # they are of another generator
        filled["clip"] = False
    found = {name: value for name, value in filled.items() if getattr(own, name) in (None, {})}
    found["options"] = {**filled.get("options", {}), **own.options}
    return TypeAdapter(Synthesis).validate_python(to_dict(own) | to_dict(found)) if asked else own


def expand(job: Job) -> Job:
    """The job with the stages that its methods run before it (`stages` of a method's file).

    Raises:
        JobFaults: a method cannot make its stages of these options.
    """
    for name, loss in job.losses.items():
        method = catalogue.method(loss.method)
        if "stages" in method.hooks:
            try:
                job = method.imported().stages(job, name)
            except JobFaults:
                raise
            except RaykdError as error:
                place = f"losses.{name}."
                raise JobFaults.of([place + str(error).removeprefix(place)]) from None
    return job


def resolve_training(training: Training) -> Training:
    """Fills the fields left None from the recipe; its milestones are scaled to another number of epochs."""
    recipe = dict(RECIPES[training.recipe])
    if training.epochs is not None and training.milestones is None:
        ratio = training.epochs / recipe["epochs"]
        recipe["milestones"] = tuple(round(m * ratio, 3) for m in recipe["milestones"])
    open_fields = {name: value for name, value in recipe.items() if getattr(training, name) is None}
    return dataclasses.replace(training, **open_fields)


def _resolve_loss(loss: Loss) -> Loss:
    method = catalogue.method(loss.method)
    options = to_dict({"weight": 1.0, "ce_weight": 1.0, "schedule": "constant"} | method.defaults() | dict(loss.options))
    return Loss(
        loss.method,
        layers=loss.layers or method.layers or (method.images and method.images.layers) or None,
        teachers=loss.teachers,
        aggregate=loss.aggregate,
        **options,
    )


def _resolve_weights(spec: N, data: Data) -> N:
    """`{data.root}` in a weights path is the data's root; a local path is made absolute."""
    if spec.weights is None:
        return spec
    return dataclasses.replace(spec, weights=_absolute(spec.weights.replace("{data.root}", data.root or ".")))


def _resolve_data(data: Data) -> Data:
    if data.kind == "digits":
        return dataclasses.replace(data, in_channels=1, num_classes=10, normalise=data.normalise or "digits")
    normalise = data.normalise or ("imagenet" if data.in_channels == 3 else "mnist")
    return dataclasses.replace(data, normalise=normalise, root=data.root and _absolute(data.root))


def _absolute(path: str) -> str:
    """An existing local path from the root of the file system, since workers start in folders of their own."""
    return os.path.abspath(path) if os.path.exists(path) else path


def set_paths(job: Job, settings: Mapping[str, Any]) -> Job:
    """A copy of the job with settings changed by path; strings are read as JSON where they parse, else kept.

    Raises:
        JobFaults: every unknown path or ill-typed value, with near names.
    """
    data = to_dict(job)
    faults = []
    for path, value in settings.items():
        fault = _set(data, path, to_dict(_literal(value)))
        if fault:
            faults.append(fault)
    if faults:
        raise JobFaults.of(faults)
    return validate(from_dict(data))


def parse_settings(pairs: tuple[str, ...] | list[str]) -> dict[str, str]:
    """`["losses.kd.temperature=2"]` -> `{"losses.kd.temperature": "2"}`.

    Raises:
        JobFaults: an entry is not `path=value`.
    """
    bad = [p for p in pairs if "=" not in p]
    if bad:
        raise JobFaults.of(f"--set {p}: expected path=value, for example --set losses.kd.temperature=2." for p in bad)
    return dict(p.split("=", 1) for p in pairs)


def write(job: Job, path: Path) -> None:
    """Writes the job as JSON."""
    path.write_text(json.dumps(to_dict(job), indent=2) + "\n")


def read(path: Path) -> Job:
    """Reads a job.json.

    Raises:
        ConfigError: the file is missing or no JSON. JobFaults: settings are wrong.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"Job file {path}: cannot be read ({error}).") from None
    return from_dict(data)


def each_job(job: Job, visit: Callable[[str, Job], T]) -> list[T]:
    """Calls `visit(path, job)` for every stage, depth first, then for the job itself (path "")."""
    found = []
    for name, stage in job.stages.items():
        found += each_job(stage, lambda path, inner, name=name: visit(f"stages.{name}.{path}", inner))  # type: ignore[misc]
    return [*found, visit("", job)]


def _set(data: dict[str, Any], path: str, value: Any) -> str | None:
    *parents, last = path.split(".")
    place: Any = data
    for depth, part in enumerate(parents):
        if not isinstance(place, dict) or part not in place:
            known = list(place) if isinstance(place, dict) else []
            return f"--set {path}: no setting {'.'.join(parents[: depth + 1])!r}. {near(part, known)}"
        place = place[part]
    if not isinstance(place, dict):
        return f"--set {path}: {'.'.join(parents)!r} is a single value, it holds no settings."
    free = (
        parents[-1:] in (["options"], ["resources"], ["optimizer_options"], ["edges"])
        or parents == []
        or "losses" in parents[-2:-1]
    )
    free = free or ("peers" in parents and parents[-1:] == ["training"])
    if (
        last not in place
        and not (free and parents)
        and not (parents and parents[-1] in ("losses", "teachers", "peers", "stages"))
    ):
        return f"--set {path}: no such setting. {near(last, place)}"
    place[last] = value
    return None


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _name_losses(data: dict[str, Any]) -> dict[str, Any]:
    """Short forms: a loss without `method` is called by its key; a stage may be given as plain data too."""
    data = to_dict(data)
    losses = data.get("losses")
    if isinstance(losses, dict):
        data["losses"] = {k: {"method": k, **v} if isinstance(v, dict) else v for k, v in losses.items()}
    stages = data.get("stages")
    if isinstance(stages, dict):
        data["stages"] = {k: _name_losses(v) if isinstance(v, dict) else v for k, v in stages.items()}
    return data


def _explain(error: Any) -> str:
    tags = ("tuple[", "function-")  # pydantic names the member of a union, or the validator, among the steps of a path
    path = ".".join(str(p) for p in error["loc"] if p != "str" and not str(p).startswith(tags))
    if error["type"] == "unexpected_keyword_argument":
        return f"{path}: no such setting. {near(path.rsplit('.', 1)[-1], _siblings(path))}"
    message = error["msg"][0].lower() + error["msg"][1:]
    message = message.removeprefix("value error, ").replace("input should be ", "expected ")
    message = re.sub(r"^expected (?=greater|less)", "expected a number ", message)
    shown = repr(error["input"])
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        hint = " " + near(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return f"{path}: {message}, got {shown if len(shown) < 80 else shown[:77] + '...'}.{hint}"


def _siblings(path: str) -> list[str]:
    rooms = {"data": Data, "student": Student, "teachers": Teacher, "peers": Peer, "training": Training, "launch": Launch}
    rooms |= {"synthesis": Synthesis, "edges": Edge, "exchange": Exchange}
    parts = [p for p in path.split(".")[:-1] if p != "stages"]
    for inner, kind in (("augmentation", Augmentation), ("branching", Branching)):
        if inner in parts:
            return [f.name for f in dataclasses.fields(kind)]
    room = next((rooms[p] for p in parts if p in rooms), Job)
    return [f.name for f in dataclasses.fields(room)]
