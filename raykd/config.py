"""The job: a frozen dataclass that says all of a run.

Jobs are Python: a function in `jobs/*.py` returns one. Every setting has a path (`losses.kd.temperature`,
`teachers.resnet56.replicas`), used by `--set`, by sweeps and by error messages. Fields that are None where a recipe or a method
has a default are filled by `resolve`; the resolved job is written to the run folder as job.json and can be run from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from raykd import catalogue
from raykd.errors import ConfigError, JobFaults, RaykdError, near

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Stats = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, keyed by (seed, epoch, sample_index); every role sees the same view.

    Attributes:
        crop: pixels of padding at each side before a random crop of the old size (He et al. 2015 use 4 on CIFAR); 0 is none.
        pad_mode: how the padding is filled.
        flip: mirror half of the images, left to right.
        randaugment: (operations an image, magnitude 0..30), None is none (arXiv:1909.13719; (2, 9) is common).
        resized_crop: side of the square, px, that a random part is resized to; None is none (ImageNet: 224).
        scale: least and greatest share of the area of that part.
        ratio: least and greatest width / height of it.
        erase: probability that a rectangle gets one random colour (arXiv:1708.04896).
        mixup: alpha of Beta(alpha, alpha), 0 is off (arXiv:1710.09412).
        cutmix: alpha of Beta(alpha, alpha), 0 is off (arXiv:1905.04899); with mixup too, each image takes either with 1/2.
        mix_probability: share of the images that are mixed at all.
    """

    __pydantic_config__ = STRICT
    crop: Natural = 0
    pad_mode: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    randaugment: tuple[Count, Annotated[int, Field(ge=0, le=30)]] | None = None
    resized_crop: Count | None = None
    scale: tuple[Positive, Share] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    erase: Share = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    mix_probability: Share = 1.0

    @property
    def mixes(self) -> bool:
        """Whether batches carry mix_labels and mix_weight."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0

    def out_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(c, h, w) of augmented images of shape (c, h, w)."""
        return (shape[0], self.resized_crop, self.resized_crop) if self.resized_crop else shape

    def faults(self) -> list[str]:
        """Settings that contradict each other."""
        found = []
        if self.crop and self.resized_crop:
            found.append("resized_crop: expected either crop or resized_crop, got both. Set one of them.")
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                found.append(f"{name}: expected least <= greatest, got {low}, {high}.")
        return found


@dataclass(frozen=True)
class Data:
    """Where images and labels come from.

    `train` is learnt from, `eval` is measured every `training.eval_every` epochs, `test` is touched once (teachers before the
    training, the student after it). For `parquet` and `folder` they are glob patterns below `root`, a local path or any
    fsspec / pyarrow URI.
    """

    __pydantic_config__ = STRICT
    kind: str = "digits"  # digits | parquet | folder | torchvision:CIFAR100 | package.module:factory
    root: str | None = None
    train: str | tuple[str, ...] | None = None
    eval: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    num_classes: Count = 10
    image_column: str = "image"
    label_column: str = "label"
    size: tuple[Count, Count] | None = None  # (rows, columns), px; needed where files differ in size
    in_channels: Literal[1, 3] = 3
    cache: Literal["disk", "memory", "none"] = "disk"  # decoded uint8 images
    limit: Count | None = None  # first n training images
    per_class: Count | None = None  # k training images of each class
    eval_limit: Count | None = None
    noisy_labels: bool = False  # replace training labels by uniform noise (a control: does the teacher teach?)
    download: bool = False
    normalise: str | Stats | None = None  # preset name, or (mean, std) a channel in [0, 1]
    augmentation: Augmentation = Augmentation()


@dataclass(frozen=True)
class Network:
    """One model: architecture, weights, input and number format."""

    __pydantic_config__ = STRICT
    model: str = "crd_resnet20"  # raykd's zoo | timm:name | torchvision:name | package.module:factory
    weights: str | None = None  # file | pretrained | stage:<name>
    weights_sha256: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the factory
    normalise: str | Stats | None = None  # None: as the data
    input_size: tuple[Count, Count] | None = None  # None: as the data
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    compile: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class Teacher(Network):
    """A frozen model that answers requests for signals."""

    __pydantic_config__ = STRICT
    placement: Literal["pool", "inline"] = "pool"
    replicas: Count = 1
    cpus: NonNegative = 0.5  # CPUs each replica reserves
    gpus: NonNegative = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)  # custom Ray resources each replica reserves
    codec: str = "dense"  # dense | fp16 | int8 | topk:<k> (logits only; other signals stay dense)
    inputs: Literal["pixels", "recipe"] = "pixels"
    weight: NonNegative = 1.0  # share in losses that listen to several teachers
    max_restarts: int = 3  # Ray restarts a dead replica this often; -1 is always


@dataclass(frozen=True)
class Student(Network):
    """The model that learns."""

    __pydantic_config__ = STRICT


@dataclass(frozen=True, init=False)
class Loss:
    """One method at work in a job: `Loss("at", layers=("stage1", "stage2"), weight=500)`.

    Attributes:
        method: slug of the catalogue, or `package.module:my_loss`.
        layers: layers it reads, the same names for both models, or {"student": (...), "teacher": (...)}; None: the method's.
        teachers: names of the teachers it listens to; empty: all.
        options: the method's hyper-parameters, `weight`, `ce_weight` and `schedule` among them; unset ones are the paper's.
    """

    method: str
    layers: tuple[str, ...] | Mapping[str, tuple[str, ...]] | None = None
    teachers: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        method: str,
        *,
        layers: tuple[str, ...] | Mapping[str, tuple[str, ...]] | str | None = None,
        teachers: tuple[str, ...] | str = (),
        **options: Any,
    ) -> None:
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "layers", _layers(layers))
        object.__setattr__(self, "teachers", (teachers,) if isinstance(teachers, str) else tuple(teachers))
        object.__setattr__(self, "options", dict(options))


@dataclass(frozen=True)
class Training:
    """How the student is trained. Fields left None come from `recipe`."""

    __pydantic_config__ = STRICT
    recipe: str = "crd"  # crd | imagenet | online | self_kd
    epochs: Count | None = None
    batch_size: Count | None = None  # global: over all workers
    optimizer: str | None = None  # torch.optim or timm by name: sgd, adamw, lamb, ...
    lr: Positive | None = None
    momentum: Share | None = None
    nesterov: bool | None = None
    weight_decay: NonNegative | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    decay_norms: bool | None = None  # False: no weight decay on norms and biases
    scheduler: str | None = None  # multistep | cosine | constant | linear | timm:<name>
    milestones: tuple[NonNegative, ...] | None = None  # epochs; for another number of epochs the recipe's are scaled
    gamma: Positive | None = None
    warmup_epochs: NonNegative | None = None
    clip_norm: Positive | None = None
    accumulate: Count = 1  # batches a step; the global batch is split, the result is the same but for batch norm
    ema: Share | None = None  # decay of an averaged copy, evaluated beside the student
    label_smoothing: Share = 0.0
    drop_last: bool = True
    max_steps: Count | None = None  # stop early, after this many steps
    eval_every: Count = 1  # epochs
    checkpoint_every: Natural = 0  # steps; 0: every epoch
    keep_checkpoints: Count = 2
    grad_norms_every: Natural = 50  # steps between measurements of each term's gradient norm; 0: first step only
    sync_batchnorm: bool = False
    evaluate: Literal["student", "ema"] = "student"


@dataclass(frozen=True)
class Launch:
    """Where the job runs."""

    __pydantic_config__ = STRICT
    backend: Literal["ray", "local"] = "ray"
    host: Literal["train", "actors"] = "train"  # Ray Train workers, or an actor group in a placement group
    workers: Count = 1  # data-parallel students
    cpus: NonNegative = 1.0  # CPUs each worker reserves
    gpus: NonNegative = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    address: str | None = None  # a running cluster; None: RAY_ADDRESS, else one is started here
    threads: Count = 1  # torch threads of every role, in every backend: part of the result
    loader_processes: Natural = 0  # decode processes beside the worker; 0: a thread
    prefetch: Count = 4  # batches ready ahead
    window: Count = 4  # teacher requests in flight
    in_flight_bytes: Count = 512 * 1024**2
    start_timeout_s: Positive = 300.0
    request_timeout_s: Positive = 120.0
    collective_timeout_s: Positive = 600.0  # longest wait of a worker for the others
    retries: Natural = 5  # of one request, each on another replica if there is one
    max_failures: int = 3  # restarts of the worker group from its last checkpoint; -1: always
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tf32: bool = False


def _to_loss(value: Any) -> Loss:
    if isinstance(value, Loss):
        return value
    if isinstance(value, str):
        return Loss(value)
    if not isinstance(value, Mapping) or "method" not in value:
        raise ValueError("expected Loss(...) or a mapping with the method's options")
    try:
        return Loss(**value)
    except TypeError as error:
        raise ValueError(f"expected Loss(...) or a mapping with the method's options ({error})") from None


@dataclass(frozen=True)
class Job:
    """All of a run. See `raykd.run`."""

    __pydantic_config__ = STRICT
    name: str = "job"
    seed: Natural = 0
    data: Data = Data()
    student: Student = Student()
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    losses: Mapping[str, Annotated[Loss, PlainValidator(_to_loss)]] = field(default_factory=dict)
    ce_weight: NonNegative | None = None  # weight of cross-entropy; None: what the losses agree on
    training: Training = Training()
    launch: Launch = Launch()
    stages: Mapping[str, Job] = field(default_factory=dict)  # jobs run before this one; `weights="stage:<name>"` reads theirs
    baseline: bool = False  # also train the student alone, same budget, and report it
    runs: str = "runs"  # folder of run folders, shared by all nodes

    def replace(self, **settings: Any) -> Job:
        """A copy with settings changed by path: `job.replace(**{"losses.kd.temperature": 2.0})`."""
        return set_paths(self, settings)


RECIPES: Mapping[str, Mapping[str, Any]] = {
    # CRD / RepDistiller protocol on CIFAR-100 (lr 0.01 for MobileNetV2 and ShuffleNets: set it in the job)
    "crd": {
        "epochs": 240, "batch_size": 64, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4,
        "decay_norms": True, "scheduler": "multistep", "milestones": (150, 180, 210), "gamma": 0.1, "warmup_epochs": 0.0,
    },
    # ImageNet, 100 epochs, ResNet-34 -> ResNet-18
    "imagenet": {
        "epochs": 100, "batch_size": 256, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4,
        "decay_norms": True, "scheduler": "multistep", "milestones": (30, 60, 90), "gamma": 0.1, "warmup_epochs": 0.0,
    },
    # OKDDip / ONE / PCL
    "online": {
        "epochs": 300, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4,
        "decay_norms": True, "scheduler": "multistep", "milestones": (150, 225), "gamma": 0.1, "warmup_epochs": 0.0,
    },
    # CS-KD and its kin
    "self_kd": {
        "epochs": 200, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4,
        "decay_norms": True, "scheduler": "multistep", "milestones": (100, 150), "gamma": 0.1, "warmup_epochs": 0.0,
    },
}  # fmt: skip

T = TypeVar("T")
N = TypeVar("N", bound=Network)


def to_dict(value: Any) -> Any:
    """A job (or a part of one) as plain, JSON-ready data; `from_dict` reads it back."""
    if isinstance(value, Loss):
        head: dict[str, Any] = {"method": value.method}
        head |= {"layers": to_dict(value.layers)} if value.layers is not None else {}
        head |= {"teachers": list(value.teachers)} if value.teachers else {}
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
    for teacher in loss.teachers:
        if teacher not in job.teachers:
            faults.append(f"{path}.teachers: no teacher {teacher!r} in this job. {near(teacher, job.teachers)}")
    return faults + _layer_faults(path, loss.layers)


def _layer_faults(path: str, layers: Any) -> list[str]:
    roles = layers if isinstance(layers, Mapping) else {"student": layers or ()}
    faults = [
        f"{path}.layers: no role {role!r}. {near(role, ('student', 'teacher'))}"
        for role in roles
        if role not in ("student", "teacher")
    ]
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
    job = validate(job)
    training = resolve_training(job.training)
    losses = {name: _resolve_loss(loss) for name, loss in job.losses.items()}
    ce_weights = {loss.options["ce_weight"] for loss in losses.values()}
    ce_weight = job.ce_weight
    if ce_weight is None and len(ce_weights) > 1:
        shown = ", ".join(f"{name} {loss.options['ce_weight']}" for name, loss in losses.items())
        raise JobFaults.of([f"ce_weight: the losses want different weights of cross-entropy ({shown}). Set ce_weight."])
    if ce_weight is None:
        ce_weight = ce_weights.pop() if ce_weights else 1.0
    return dataclasses.replace(
        job,
        data=_resolve_data(job.data),
        student=_resolve_weights(job.student, job.data),
        teachers={name: _resolve_weights(teacher, job.data) for name, teacher in job.teachers.items()},
        training=training,
        losses=losses,
        ce_weight=ce_weight,
        stages={name: resolve(stage) for name, stage in job.stages.items()},
    )


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
    options = {"weight": 1.0, "ce_weight": 1.0, "schedule": "constant"} | method.defaults() | dict(loss.options)
    return Loss(loss.method, layers=loss.layers or method.layers or None, teachers=loss.teachers, **options)


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
        fault = _set(data, path, _literal(value))
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
    free = parents[-1:] in (["options"], ["resources"], ["optimizer_options"]) or parents == [] or "losses" in parents[-2:-1]
    if last not in place and not (free and parents) and not (parents and parents[-1] in ("losses", "teachers", "stages")):
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


def _layers(layers: Any) -> tuple[str, ...] | dict[str, tuple[str, ...]] | None:
    if layers is None:
        return None
    if isinstance(layers, Mapping):
        return {role: (names,) if isinstance(names, str) else tuple(names) for role, names in layers.items()}
    return (layers,) if isinstance(layers, str) else tuple(layers)


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
    rooms = {"data": Data, "student": Student, "teachers": Teacher, "training": Training, "launch": Launch}
    parts = [p for p in path.split(".")[:-1] if p != "stages"]
    if "augmentation" in parts:
        return [f.name for f in dataclasses.fields(Augmentation)]
    room = next((rooms[p] for p in parts if p in rooms), Job)
    return [f.name for f in dataclasses.fields(room)]
