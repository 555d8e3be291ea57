"""The job: a frozen dataclass that says all of a run.

Jobs are Python: a function in `jobs/*.py` returns one. Every setting has a path (`losses.kd.temperature`,
`teachers.resnet56.replicas`), used by `--set`, by sweeps and by error messages. Fields that are None where a recipe or a method
has a default are filled by `raykd.resolve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NO_DATA = "none"  # `data.train` of a job that makes its own images
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
    holdout: Share = 0.0  # share of the training images, of each class alike, that is not learnt from: the split `holdout`
    eval_limit: Count | None = None
    noisy_labels: bool = False  # replace training labels by uniform noise (a control: does the teacher teach?)
    download: bool = False
    normalise: str | Stats | None = None  # preset name, or (mean, std) a channel in [0, 1]
    augmentation: Augmentation = Augmentation()
    seed: Natural | None = None  # of order and augmentation; None: the job's
    view: Natural = 0  # another number, another augmentation of the same samples
    shard: tuple[Natural, Count] | None = None  # (i, n): every n-th training image from the i-th on
    augmentation_epochs: Count | None = None  # epoch e sees the views of epoch e modulo this; None: new views in every epoch


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
    placement: Literal["pool", "inline", "store"] = "pool"
    replicas: Count = 1
    cpus: NonNegative = 0.5  # CPUs each replica reserves
    gpus: NonNegative = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)  # custom Ray resources each replica reserves
    codec: str = "dense"  # dense | fp16 | int8 | topk:<k> (logits only; other signals stay dense)
    inputs: Literal["pixels", "recipe"] = "pixels"
    weight: NonNegative = 1.0  # share in losses that listen to several teachers
    max_restarts: int = 3  # Ray restarts a dead replica this often; -1 is always
    actor: str | None = None  # pooled teachers of one actor name share its replicas; what they aggregate travels as one tensor
    on_loss: Literal["stop", "drop"] = "stop"  # when no replica is left: end resumable, or go on with the other teachers
    label_map: tuple[Natural, ...] | None = None  # the student's class of each of this teacher's classes; None: the same
    store: str | None = None  # folder of kept outputs that placement="store" reads
    fill: Literal["none", "pool", "inline"] = "none"  # who answers for rows the store has not: nobody, or the live teacher


@dataclass(frozen=True)
class Branching:
    """How one model answers with several branches; branch 0 is the plain model, and what is exported.

    `split`: the others are further copies of its tail, after the stage `at`. `exits`: an auxiliary classifier after each stage
    of `at`. `heads`: one projection head on the embedding. `widths`: the same weights at smaller widths and resolutions.
    """

    __pydantic_config__ = STRICT
    kind: Literal["none", "split", "exits", "heads", "widths"] | None = None  # None: all of this as the losses ask for
    count: Count | None = None  # branches of split and widths; None: 2
    at: tuple[str, ...] | str | None = None  # None: split after the second to last stage, exits after all but the last
    classes: Count = 1  # exits: outputs for each class
    outputs: Count = 128  # heads: axes of the projection
    options: tuple[Mapping[str, Any], ...] = ()  # split: options of the factory for the tails of branches 1, 2, ...
    rescale: bool = False  # split: the gradient that reaches the shared part is divided by the number of branches
    least: Share = 0.25  # widths: share of the channels of the narrowest
    resolutions: tuple[Count, ...] | None = None  # widths: sides, px, one drawn a step; None: 1, 7/8, 6/8, 5/8 of the image's
    views: Literal["same", "own"] = "same"  # own: each branch sees its own augmentation of the same samples


@dataclass(frozen=True)
class Student(Network):
    """The model that learns."""

    __pydantic_config__ = STRICT
    branching: Branching = Branching()


@dataclass(frozen=True)
class Peer(Student):
    """One of several models that learn together and teach each other."""

    __pydantic_config__ = STRICT
    training: Mapping[str, Any] = field(default_factory=dict)  # settings of `training` that are this peer's own
    actor: str | None = None  # peers of one actor name share a process; the result is the same
    cpus: NonNegative | None = None  # CPUs each of its workers reserves; None: as launch
    gpus: NonNegative | None = None
    resources: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Edge:
    """One peer teaches another: `exchange.edges["a>b"]`, a teaches b."""

    __pydantic_config__ = STRICT
    weight: NonNegative = 1.0  # share among the peers that b listens to
    losses: tuple[str, ...] = ()  # names of the losses by which b learns from a; empty: all


@dataclass(frozen=True)
class Exchange:
    """Who teaches whom among the peers, and when."""

    __pydantic_config__ = STRICT
    graph: str = "all"  # all | ring (each teaches the next) | leader:<peer> (teaches all others) | star:<peer> (both ways)
    edges: Mapping[str, Edge] = field(default_factory=dict)  # "a>b": a teaches b; these alone, where any are named
    what: Literal["signals", "weights"] = "signals"  # weights: each peer keeps frozen copies of its teachers, and asks these
    every: Count = 1  # steps between exchanges; signals are learnt from at these steps alone
    staleness: Natural | Literal["newest"] = 0  # weights: how many steps older than due a copy is; newest: whatever is there
    shards: Literal["same", "disjoint"] = "same"  # disjoint: every peer learns from its own part of the training set
    views: Literal["same", "own"] = "same"  # own: every peer sees its own augmentation of the same samples
    codec: str = "dense"  # of signals
    ahead: Count = 4  # messages that a peer publishes before one that listens has taken the first of them
    on_loss: Literal["stop", "drop", "respawn"] = "stop"  # a peer dies or hangs: end resumable, go on without, start it again
    respawns: Natural = 3  # of each peer
    timeout_s: Positive = 300.0  # a peer that waits for nobody and gets nowhere for so long is taken for dead

    @property
    def newest(self) -> bool:
        """Whether copies are of whatever weights are there, so that nobody waits for anybody."""
        return self.what == "weights" and self.staleness == "newest"

    @property
    def late(self) -> int:
        """Steps by which what is heard may be older than due; 0 of signals, and where no step is due."""
        return int(self.staleness) if self.what == "weights" and self.staleness != "newest" else 0


@dataclass(frozen=True, init=False)
class Loss:
    """One method at work in a job: `Loss("at", layers=("stage1", "stage2"), weight=500)`.

    Attributes:
        method: slug of the catalogue, or `package.module:my_loss`.
        layers: layers it reads, the same names for both models, or {"student": (...), "teacher": (...)}; None: the method's.
        teachers: names of the teachers, or peers, it listens to; empty: all.
        aggregate: how a loss of one teacher's logits hears several at once (see `raykd list aggregators`); None: one loss a
            teacher, shared out by their weights.
        options: the method's hyper-parameters, `weight`, `ce_weight` and `schedule` among them; unset ones are the paper's.
    """

    method: str
    layers: tuple[str, ...] | Mapping[str, tuple[str, ...]] | None = None
    teachers: tuple[str, ...] = ()
    aggregate: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        method: str,
        *,
        layers: tuple[str, ...] | Mapping[str, tuple[str, ...]] | str | None = None,
        teachers: tuple[str, ...] | str = (),
        aggregate: str | None = None,
        **options: Any,
    ) -> None:
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "layers", _layers(layers))
        object.__setattr__(self, "teachers", (teachers,) if isinstance(teachers, str) else tuple(teachers))
        object.__setattr__(self, "aggregate", aggregate)
        object.__setattr__(self, "options", dict(options))


@dataclass(frozen=True)
class Synthesis:
    """How images are made where there are none to learn from. Fields left None come from the method that asks for them."""

    __pydantic_config__ = STRICT
    generator: str | None = None  # dcgan | conditional | pixels
    options: Mapping[str, Any] = field(default_factory=dict)  # of the generator
    latent: Count | None = None  # axes of the noise
    before: Natural | None = None  # updates of the generator before the first round (mode="lockstep")
    generator_steps: Natural | None = None  # updates of the generator in each round; 0: what it learnt before is all
    student_steps: Count | None = None  # steps of the student in each round
    noise: Literal["step", "round"] | None = None  # round: one draw for all steps of generator and student in it (lockstep)
    optimizer: str | None = None  # of the generator: torch.optim or timm by name
    lr: Positive | None = None
    betas: tuple[Share, Share] | None = None
    weight_decay: NonNegative = 0.0
    scheduler: Literal["constant", "cosine", "multistep"] | None = None  # as the training's, over its epochs (lockstep)
    milestones: tuple[NonNegative, ...] | None = None  # epochs
    steps_per_epoch: Count = 50  # student's steps between two evaluations
    student_mode: Literal["eval", "train"] | None = None  # of its batch norm while the generator learns (lockstep; else eval)
    show: Natural = 64  # images kept for the eye at each evaluation
    real: Share | None = None  # of each batch, what is read from training images (mode="lockstep"); 0: nothing
    mode: Literal["lockstep", "bank"] | None = None  # generator and student in turn; or synthesizers beside the student
    # What follows is of mode="bank".
    steps: Count | None = None  # updates of the generator (and of the noise, or of free pixels) for each batch
    reset: Literal["never", "batch", "meta"] | None = (
        None  # batch: each begins with a fresh generator; meta: with one that learns
    )
    meta: Literal["fomaml", "reptile"] | None = (
        None  # how the generator with which batches begin learns from each (reset="meta")
    )
    latents_lr: NonNegative | None = None  # rate at which the noise of a batch is learnt too; 0: it stays
    keep: Literal["last", "best"] | None = None  # the images of the last step, or of the least loss
    jitter: Natural | None = None  # px by which images are rolled, at random, before teachers see them (free pixels)
    flip: bool | None = None  # mirror them at random too
    clip: bool | None = None  # free pixels: move those beyond black and white to these after each update
    synthesizers: Count = 1  # actors that make batches, side by side
    cpus: NonNegative = 1.0  # CPUs each synthesizer reserves
    gpus: NonNegative = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    max_restarts: int | None = None  # Ray restarts a dead synthesizer this often; 3 where the method names no number
    ahead: Count = 2  # batches asked of a synthesizer before the first of them has come
    capacity: Count | None = None  # batches in the bank
    memory_bytes: Count = 1024**3  # of images in memory; the others are on disk
    grow: Literal["once", "always"] | None = None  # once: synthesis ends when the bank is full
    start: Count | None = None  # batches in the bank before the student begins
    pace: Natural = 0  # the student's steps for each new batch; 0: as fast as they come
    snapshot_every: Count = 50  # the student's steps between the snapshots that synthesizers get
    staleness: Count | None = None  # most steps by which a batch's snapshot is behind when it comes; snapshots are as frequent
    priority: Literal["uniform", "recent", "hard"] = "uniform"  # which images are drawn more often


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
    ema_warmup: bool = False  # the decay is at most 1 - 1 / (steps + 1)
    label_smoothing: Share = 0.0
    drop_last: bool = True
    max_steps: Count | None = None  # stop early, after this many steps
    eval_every: Count = 1  # epochs
    checkpoint_every: Natural = 0  # steps; 0: every epoch
    keep_checkpoints: Count = 2
    grad_norms_every: Natural = 200  # steps between measurements of each term's gradient norm; 0: first step only
    sync_batchnorm: bool = False
    evaluate: Literal["student", "ema"] = "student"

    def steps(self, per_epoch: int) -> int:
        """Steps of the whole training."""
        every = per_epoch * (self.epochs or 1)
        return every if self.max_steps is None else min(every, self.max_steps)


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
    window: Count = 4  # requests in flight to each teacher; more where it takes two a replica to keep a pool busy
    in_flight_bytes: Count = 512 * 1024**2
    start_timeout_s: Positive = 300.0
    request_timeout_s: Positive = 120.0
    collective_timeout_s: Positive = 600.0  # longest wait of a worker for the others
    retries: Natural = 5  # of one request, each on another replica if there is one
    max_failures: int = 3  # restarts of the worker group from its last checkpoint; -1: always
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tf32: bool = False


def _layers(layers: Any) -> tuple[str, ...] | dict[str, tuple[str, ...]] | None:
    if layers is None:
        return None
    if isinstance(layers, Mapping):
        return {role: (names,) if isinstance(names, str) else tuple(names) for role, names in layers.items()}
    return (layers,) if isinstance(layers, str) else tuple(layers)


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
    peers: Mapping[str, Peer] = field(default_factory=dict)  # in place of `student`: several that learn together
    exchange: Exchange = Exchange()
    synthesis: Synthesis = Synthesis()
    losses: Mapping[str, Annotated[Loss, PlainValidator(_to_loss)]] = field(default_factory=dict)
    ce_weight: NonNegative | None = None  # weight of cross-entropy; None: what the losses agree on
    training: Training = Training()
    launch: Launch = Launch()
    stages: Mapping[str, Job] = field(default_factory=dict)  # jobs run before this one; `weights="stage:<name>"` reads theirs
    baseline: bool = False  # also train the student alone, same budget, and report it
    runs: str = "runs"  # folder of run folders, shared by all nodes

    @property
    def data_seed(self) -> int:
        """What keys the order and the augmentation of the data, and the teachers' answers."""
        return self.seed if self.data.seed is None else self.data.seed

    def replace(self, **settings: Any) -> Job:
        """A copy with settings changed by path: `job.replace(**{"losses.kd.temperature": 2.0})`."""
        from raykd.resolve import set_paths

        return set_paths(self, settings)
