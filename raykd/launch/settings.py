"""Settings that are wrong by themselves or contradict each other; no data is read and no model is built here.

Each function lists the faults of one resolved job, each with its path.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch

from raykd import catalogue, models
from raykd.config import Job, Loss, Network, Student
from raykd.data.splits import has_split
from raykd.errors import RaykdError, near
from raykd.exchange import codec as codecs
from raykd.launch import assembly, peering
from raykd.resolve import reads_images
from raykd.roles.losses import heard, schedule
from raykd.roles.optimisation import optimizer, rate
from raykd.signals import BLOCKS, EMA, SOURCES, VIEWS

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]*")
HEARD = ("prepare", "on_epoch", "stages", "targets", "critics", "before_forward", "after_forward", "step")  # of a scheme
SCHEMES = ("offline", "online", "data_free")
SHARED = ("replicas", "inputs", "resources", "max_restarts", "on_loss", "codec")  # settings of an actor, not of a teacher


def names(job: Job) -> list[str]:
    """Names become parts of paths, of actors' names and of metrics."""
    named = [("name", job.name)] + [(room, n) for room in ("teachers", "peers", "losses", "stages") for n in getattr(job, room)]
    taken = {"teachers": ("student",), "peers": ("student",), "losses": ("ce",)}
    found = [
        f"{room}: expected a name of letters, digits, '_', '+' and '-', got {name!r}. Rename it."
        for room, name in named
        if not NAME.fullmatch(name)
    ]
    found += [f"{room}.{name}: this name is raykd's own. Rename it." for room, name in named if name in taken.get(room, ())]
    found += [f"peers.{name}: a teacher has this name. Rename one." for name in job.peers if name in job.teachers]
    return found


def settings(job: Job) -> list[str]:
    """Settings that contradict each other."""
    launch, training, data = job.launch, job.training, job.data
    found = []
    if data.shard is not None and not data.shard[0] < data.shard[1]:
        found.append(f"data.shard: expected (i, n) with i below n, got {tuple(data.shard)}.")
    if launch.backend == "local" and launch.workers > 1:
        found.append("launch.workers: the local backend has one worker. Set launch.backend='ray', or launch.workers=1.")
    size = training.batch_size or 1
    if size % launch.workers:
        found.append(f"training.batch_size: {size} is not divisible by launch.workers={launch.workers}. Change one of them.")
    elif (size // launch.workers) % training.accumulate:
        found.append(
            f"training.accumulate: {training.accumulate} does not divide a worker's batch of {size // launch.workers}."
        )
    if launch.device == "cuda" and (launch.gpus == 0 if launch.backend == "ray" else not torch.cuda.is_available()):
        have = "launch.gpus is 0" if launch.backend == "ray" else "this machine has none that torch can use"
        found.append(f"launch.device: 'cuda' needs a GPU, and {have}. Set launch.gpus, or launch.device='auto'.")
    if training.evaluate == "ema" and training.ema is None:
        found.append("training.evaluate: 'ema' needs training.ema, the decay of the averaged copy (for example 0.999).")
    if data.limit is not None and data.per_class is not None:
        found.append("data.limit: expected either limit or per_class, got both. Set one of them.")
    patience = sum(
        (job.teachers[names[0]].replicas + 1) * launch.request_timeout_s + launch.start_timeout_s
        for names in assembly.groups(job).values()
        if job.teachers[names[0]].on_loss == "drop"
    )
    if launch.workers > 1 and patience >= launch.collective_timeout_s:
        found.append(
            f"launch.collective_timeout_s: expected above {patience:g} s, the longest that one worker may wait for teachers "
            f"that are dropped (on_loss) while the others wait for it, got {launch.collective_timeout_s:g}. Raise it."
        )
    patience = launch.request_timeout_s + launch.start_timeout_s
    if launch.workers > 1 and job.synthesis.mode == "bank" and patience >= launch.collective_timeout_s:
        found.append(
            f"launch.collective_timeout_s: expected above {patience:g} s, the longest that one worker may wait for a batch of "
            f"images while the others wait for it, got {launch.collective_timeout_s:g}. Raise it."
        )
    if data.eval == "holdout" and not data.holdout:
        found.append("data.eval: 'holdout' needs data.holdout, the share of the training images to hold out (for example 0.1).")
    elif job.teachers and not (has_split(data, "eval") or has_split(data, "test")):
        found.append("data.eval: the teachers are measured before the training, there is no split for it. Set it.")
    if "://" in job.runs:
        found.append(
            f"runs: expected a path that all nodes share, got the URI {job.runs!r}. Mount it, or use a shared file system."
        )
    return found


def losses(job: Job) -> list[str]:
    """What is said of losses and teachers, without looking at models."""
    found = []
    listened: set[str] = set()
    for name, loss in job.losses.items():
        method = catalogue.method(loss.method)
        role = method.teacher_role
        listens = role is not None
        mutual = role is not None and SOURCES[role] == "peers"
        teachers = [t for t in heard(loss, method, job.teachers, job.peers) if t in job.teachers]
        listened |= set(teachers)
        if loss.teachers and not listens:
            found.append(f"losses.{name}.teachers: {method.slug} listens to no teacher. Leave `teachers` out.")
        if mutual and not job.peers:
            found.append(f"losses.{name}: {method.slug} listens to peers and the job has none. Add two or more to `peers`.")
        elif listens and not job.teachers and not job.peers:
            found.append(f"losses.{name}: {method.slug} listens to a teacher and the job has none. Add one to `teachers`.")
        if teachers and not any(job.teachers[t].weight for t in teachers):
            found.append(f"losses.{name}: all teachers it listens to have weight 0. Set teachers.{teachers[0]}.weight.")
        try:
            schedule(str(loss.options.get("schedule", "constant")))
        except RaykdError as error:
            found.append(f"losses.{name}.{error}")
        found += _hooks(name, method)
        found += _together(name, loss, method, job)
        found += _in_turn(name, loss, method, job) if BLOCKS in method.build_parameters else []
    if not job.losses and job.teachers:
        found.append("losses: the job has teachers and no loss that listens to them. Add one, for example losses={'kd': {}}.")
    elif deaf := [t for t in job.teachers if t not in listened]:
        found += [f"teachers.{t}: no loss listens to this teacher. Name it in a loss's `teachers`, or remove it." for t in deaf]
    if not job.losses and not job.ce_weight:
        found.append("ce_weight: 0 without any other loss leaves nothing to learn from.")
    return found


def _together(name: str, loss: Loss, method: catalogue.Method, job: Job) -> list[str]:
    """What a loss cannot do with the teachers it listens to together."""
    found = []
    teachers = {t: job.teachers[t] for t in heard(loss, method, job.teachers, job.peers) if t in job.teachers}
    maps = [t for t, spec in teachers.items() if spec.label_map is not None]
    if loss.aggregate is not None and maps:
        found.append(
            f"losses.{name}.aggregate: expected teachers of the same classes, got a label_map of {', '.join(maps)}. "
            "Leave `aggregate` out: the loss is then applied to each teacher, on its classes."
        )
    if maps and method.teacher_role == "teacher" and "labels" in method.parameters:
        found.append(
            f"losses.{name}: {method.slug} reads labels, which {', '.join(maps)} knows only in part (label_map). "
            f"Use a loss of logits alone, or name other teachers in losses.{name}.teachers."
        )
    hooks = {"step", "before_forward", "after_forward"} & set(method.hooks)
    if hooks and job.training.accumulate > 1:
        found.append(f"training.accumulate: {method.slug} needs the whole batch of a step at once. Set it to 1.")
    doubled = sorted({t for t in loss.teachers if loss.teachers.count(t) > 1})
    if doubled:
        found.append(f"losses.{name}.teachers: expected each teacher once, got {', '.join(doubled)} twice. Leave one out.")
    droppable = [t for t, spec in teachers.items() if spec.on_loss == "drop"]
    if not droppable or method.teacher_role is None:
        return found
    where = f"teachers.{droppable[0]}.on_loss"
    if method.teacher_role == "teachers" and (method.trains or hooks):
        found.append(
            f"{where}: {method.slug} trains parts for each of its teachers and cannot go on without one. Set on_loss='stop'."
        )
    if loss.options.get("teacher_weights"):
        found.append(
            f"{where}: losses.{name}.teacher_weights gives each teacher a number and cannot go on without one. "
            "Set on_loss='stop', or use teachers.*.weight."
        )
    for gone in assembly.groups(job).values():
        left = [t for t, spec in teachers.items() if t not in gone and spec.weight > 0]
        if not left and set(gone) & set(droppable):
            found.append(f"{where}: losses.{name} listens to nobody else with a weight above 0. Set on_loss='stop'.")
    return found


def _in_turn(name: str, loss: Loss, method: catalogue.Method, job: Job) -> list[str]:
    """What a job cannot have whose loss trains the student's blocks in turn."""
    found, where = [], f"losses.{name}: {method.slug} trains the student's blocks in turn"
    if len(job.losses) > 1 or job.ce_weight:
        more = ", ".join([*(other for other in job.losses if other != name), *(["cross-entropy"] if job.ce_weight else [])])
        found.append(f"{where} and is all that they learn from, got {more} too. Leave it out, and set ce_weight=0.")
    if len(teachers := heard(loss, method, job.teachers, job.peers)) > 1:
        found.append(f"{where}, in the place of those of one teacher, got {', '.join(teachers)}. Name one in its `teachers`.")
    if job.peers:
        found.append(f"{where}, not those of peers. Make one of them the `student`.")
    if job.student.branching.kind not in (None, "none"):
        found.append(f"{where}: expected a student without branches, got {job.student.branching.kind!r}. Leave branching out.")
    if job.training.ema is not None:
        found.append(
            f"training.ema: {method.slug} trains blocks in turn, an average would mix them with untrained ones. Leave it out."
        )
    return found


def peers(job: Job) -> list[str]:
    """What is said of peers and of their exchange."""
    exchange, found = job.exchange, []
    if not job.peers:
        plain = dataclasses.replace(exchange) == type(exchange)()
        return [] if plain else ["exchange: expected peers that exchange something, got none. Add two or more to `peers`."]
    if len(job.peers) < 2:
        found.append("peers: expected two or more, got one. Add another, or make it the `student`.")
    if (job.student.model, job.student.weights, dict(job.student.options)) != (Student().model, None, {}):
        found.append("student: a job with peers has no student beside them. Make it a peer, or leave it out.")
    try:
        edges = peering.edges(job)
    except RaykdError as error:
        return [*found, str(error)]
    used = {name for own in edges.values() for edge in own.values() for name in edge.losses}
    found += [
        f"exchange.edges: no loss {name!r} in this job. {near(name, job.losses)}" for name in used if name not in job.losses
    ]
    for target, own in edges.items():
        if own and not any(edge.weight for edge in own.values()):
            found.append(f"exchange.edges: all peers that {target!r} listens to have weight 0. Raise one, or leave them out.")
    methods = {name: catalogue.method(loss.method) for name, loss in job.losses.items()}
    listens = [
        name for name, m in methods.items() if m.teacher_role and (SOURCES[m.teacher_role] == "peers" or not job.teachers)
    ]
    if (exchange.edges or exchange.graph != "all") and not listens:
        found.append("exchange: no loss listens to a peer. Add one, for example losses={'dml': {}}, or leave it out.")
    found += _modes(job, methods)
    if job.launch.workers > 1:
        shared = [peer.actor for peer in job.peers.values() if peer.actor is not None]
        if shared:
            found.append(f"peers.*.actor: peers that share an actor ({shared[0]}) have one worker each. Set launch.workers=1.")
    for name, peer in job.peers.items():
        if peer.actor in job.peers and job.peers[str(peer.actor)].actor != peer.actor:
            found.append(f"peers.{name}.actor: {peer.actor!r} is the name of a peer with actors of its own. Rename it.")
        others = [o for o in job.peers.values() if o.actor is not None and o.actor == peer.actor]
        first = (others[0].cpus, others[0].gpus, others[0].resources) if others else None
        if others and others[0] is peer and any((o.cpus, o.gpus, o.resources) != first for o in others):
            found.append(
                f"peers.{name}.actor: peers that share an actor reserve the same. Make cpus, gpus and resources equal."
            )
    for name, teacher in job.teachers.items():
        if teacher.placement == "store":
            found.append(f"teachers.{name}.placement: peers are taught by live teachers. Use pool or inline.")
        if teacher.inputs == "recipe" and (exchange.views == "own" or exchange.shards == "disjoint"):
            found.append(f"teachers.{name}.inputs: a recipe does not say which peer's images are meant. Set inputs='pixels'.")
    return found


def synthesis(job: Job) -> list[str]:
    """What a job that makes its own images cannot have."""
    making = [name for name, loss in job.losses.items() if catalogue.method(loss.method).images is not None]
    if not making:
        plain = job.synthesis == type(job.synthesis)()
        return [] if plain else ["synthesis: no loss of this job makes images. Leave it out, or add one, such as dfad."]
    found = []
    if len(making) > 1:
        found.append(f"losses: expected one that makes images, got {', '.join(making)}. Leave all but one out.")
    if job.peers:
        found.append("peers: images are made for one student. Use a job of one student.")
    if job.baseline:
        found.append("baseline: without images to learn from there is no student alone. Leave it out.")
    if not (has_split(job.data, "eval") or has_split(job.data, "test")):
        found.append(
            "data.test: expected images to measure on, which say how large the made ones are. Set data.test or data.eval."
        )
    spec, launch = job.synthesis, job.launch
    reads = reads_images(job)
    augmentation, banked = job.data.augmentation, spec.mode == "bank"
    if augmentation != type(augmentation)() and not (spec.real or banked):
        found.append("data.augmentation: these images are made anew for each step, not augmented. Leave it out, or use a bank.")
    if augmentation.mixes and (spec.real or banked):
        found.append("data.augmentation: images of a bank, or beside made ones, are not mixed. Leave mixup and cutmix out.")
    for setting in ("limit", "per_class", "shard", "augmentation_epochs"):
        if getattr(job.data, setting) is not None and not reads:
            found.append(f"data.{setting}: it is of training images, and this job makes its own. Leave it out.")
    if (job.data.holdout or job.data.noisy_labels) and not reads:
        found.append(
            "data.holdout, data.noisy_labels: they are of training images, and this job makes its own. Leave them out."
        )
    for name, teacher in job.teachers.items():
        wanted = {"inputs": "pixels", "codec": "dense", "on_loss": "stop"}
        found += [
            f"teachers.{name}.{setting}: images that are made need {value!r}. Set it."
            for setting, value in wanted.items()
            if getattr(teacher, setting) != value
        ]
        if teacher.placement == "store":
            found.append(f"teachers.{name}.placement: nothing is kept of images that are made. Use pool or inline.")
        if teacher.label_map is not None:
            found.append(f"teachers.{name}.label_map: images are made for teachers of all classes. Leave it out.")
    for name, loss in job.losses.items():
        method = catalogue.method(loss.method)
        of_data = {"num_samples", "dataset_labels"} & {*method.parameters, *method.build_parameters}
        if of_data:
            found.append(
                f"losses.{name}: {method.slug} keeps something of each training image, and there are none. Use another."
            )
    if reads:
        if spec.mode == "bank":
            found.append("synthesis.mode: training images are read where images are made in turn. Set it to 'lockstep'.")
        if spec.generator == "pixels" and launch.workers > 1:
            found.append("launch.workers: pseudo examples are the batch of one worker. Set it to 1, or use a generator.")
        if not has_split(job.data, "train"):
            found.append("data.train: expected images to read beside made ones, got none. Name some.")
    if spec.mode == "bank":
        if spec.before:
            found.append("synthesis.before: a bank has no rounds before which to learn. Set it to 0, or mode='lockstep'.")
        if spec.synthesizers < launch.workers:
            found.append(f"synthesis.synthesizers: expected one for each of {launch.workers} workers. Raise it.")
        if (spec.start or 1) > (spec.capacity or 1):
            found.append(f"synthesis.start: expected at most synthesis.capacity, {spec.capacity} batches, got {spec.start}.")
        if spec.reset in ("never", "meta") and (spec.synthesizers > 1 or spec.max_restarts):
            found.append("synthesis.reset: a generator that goes on cannot be moved. Set synthesizers=1 and max_restarts=0.")
    if spec.generator == "pixels" and spec.mode != "bank" and not spec.real:
        found.append("synthesis.mode: free pixels are made a batch at a time, for classes that stay. Set it to 'bank'.")
    if spec.clip and spec.generator != "pixels":
        found.append("synthesis.clip: it is of free pixels; a generator bounds its images itself. Leave it out.")
    known = models.generators()
    if job.synthesis.generator not in known:
        found.append(
            f"synthesis.generator: no generator {job.synthesis.generator!r}. {near(str(job.synthesis.generator), known)}"
        )
    return found


def _modes(job: Job, methods: Mapping[str, catalogue.Method]) -> list[str]:
    """Ways of exchange that contradict each other."""
    exchange, found = job.exchange, []
    if exchange.what == "signals":
        if exchange.staleness != 0:
            found.append(
                "exchange.staleness: signals are of the same step. Set exchange.what='weights' for copies that are older."
            )
        if exchange.shards == "disjoint":
            found.append(
                "exchange.shards: peers that see different images cannot compare signals. Set exchange.what='weights'."
            )
    try:
        if codecs.parse(exchange.codec).kind == "topk":
            found.append("exchange.codec: expected dense, fp16 or int8 among peers, got a topk codec.")
    except RaykdError as error:
        found.append(f"exchange.codec: {error}")
    if exchange.what == "weights":
        copied = [name for name, m in methods.items() if any(EMA in (p.view or "") for p in m.signals)]
        found += [f"losses.{n}: it reads averaged copies, which do not travel. Set exchange.what='signals'." for n in copied]
        if exchange.codec != "dense":
            found.append("exchange.codec: weights travel as they are. Leave it at 'dense'.")
    if exchange.views == "own" and job.data.augmentation.mixes:
        found.append("exchange.views: 'own' mixes other images at each peer. Set data.augmentation.mixup and .cutmix to 0.")
    if job.training.accumulate > 1:
        found.append("training.accumulate: peers exchange whole batches. Set it to 1.")
    for name, m in methods.items():
        if not set(heard(job.losses[name], m, job.teachers, job.peers)) & set(job.peers):
            continue
        if {"before_forward", "step"} & set(m.hooks):
            found.append(f"losses.{name}: {m.slug} needs its teachers before the student's forward; peers answer after it.")
        drawn = [p.name for p in m.signals if p.role in SOURCES and set((p.view or "").split("_")) & set(VIEWS)]
        if drawn:
            found.append(
                f"losses.{name}: {m.slug} reads {drawn[0]}, which only a frozen teacher answers. Add one to `teachers`."
            )
    return found


def actors(job: Job) -> list[str]:
    """Teachers that share an actor, or a label map, and cannot."""
    found = []
    for actor, names in assembly.groups(job).items():
        first = job.teachers[names[0]]
        for name in names[1:]:
            differ = [s for s in SHARED if getattr(job.teachers[name], s) != getattr(first, s)]
            found += [
                f"teachers.{name}.{setting}: expected that of {names[0]!r}, with which it shares the actor {actor!r}. "
                "Make them equal."
                for setting in differ
            ]
    for name, spec in job.teachers.items():
        if spec.actor is not None and spec.actor in job.teachers and job.teachers[spec.actor].actor != spec.actor:
            found.append(f"teachers.{name}.actor: {spec.actor!r} is the name of a teacher with actors of its own. Rename it.")
        if spec.actor is not None and spec.placement != "pool":
            found.append(f"teachers.{name}.actor: only teachers in a pool share actors, got placement={spec.placement!r}.")
        over = [c for c in spec.label_map or () if c >= job.data.num_classes]
        if over:
            found.append(
                f"teachers.{name}.label_map: expected classes 0..{job.data.num_classes - 1} (data.num_classes), got {over[0]}."
            )
        if spec.label_map is not None and not spec.label_map:
            found.append(f"teachers.{name}.label_map: expected the student's class of each of its classes, got none.")
    return found


def _hooks(name: str, method: catalogue.Method) -> list[str]:
    found = []
    if method.scheme not in SCHEMES:
        found.append(f"losses.{name}: {method.slug} is a method of the {method.scheme} scheme, which no job runs yet.")
    unheard = [h for h in method.hooks if h not in HEARD]
    if unheard:
        found.append(f"losses.{name}: {method.slug} defines {', '.join(unheard)}, which no scheme calls yet.")
    try:
        method.call()
    except Exception as error:
        found.append(f"losses.{name}: expected {method.module} to be importable, got {type(error).__name__}: {error}.")
    return found


def optimisation(job: Job) -> list[str]:
    """Optimizer and scheduler, by two steps of a small layer."""

    def step() -> None:
        layer = torch.nn.Linear(2, 2)
        made = optimizer(job.training, [layer])
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.step()
        made.step()  # some options count from the second step on

    found = []
    attempts = (("training.scheduler", lambda: rate(job.training)), ("training.optimizer_options", step))
    for where, attempt in attempts:
        try:
            attempt()
        except RaykdError as error:
            found.append(str(error))
        except Exception as error:
            found.append(f"{where}: {job.training.optimizer}: {type(error).__name__}: {error}.".replace("..", "."))
    return found


def weights(job: Job, beside: tuple[str, ...] = ()) -> list[str]:
    """Where weights come from, as far as it is said; `beside`: stages that run before this job."""
    found = []
    stages = (*beside, *job.stages)
    specs: dict[str, Network] = {"student": job.student, **{f"teachers.{n}": t for n, t in job.teachers.items()}}
    specs |= {f"peers.{n}": p for n, p in job.peers.items()}
    for path, spec in specs.items():
        if "num_classes" in spec.options:
            found.append(f"{path}.options.num_classes: the number of classes comes from data.num_classes. Leave it out here.")
        if spec.weights is None and path.startswith("teachers."):
            found.append(f"{path}.weights: a teacher needs weights: a file, 'pretrained' or 'stage:<name>'.")
        if spec.weights_sha256 is not None and spec.weights in (None, "pretrained"):
            found.append(f"{path}.weights_sha256: expected a file of weights to compare with, got weights={spec.weights!r}.")
        if spec.weights == "pretrained" and spec.options:
            found.append(f"{path}.options: published weights come with the model as published. Leave options out.")
        stage, _ = assembly.stage_of(spec.weights)
        if stage is not None and stage not in stages:
            found.append(f"{path}.weights: no stage {stage!r} in this job, or before it. {near(stage, stages)}")
    return found
