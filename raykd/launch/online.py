"""Running the peers of one job, in this process or on Ray; and what comes of it.

Each peer has a folder of its own in the run folder, `peers/<name>`: metrics, checkpoints, weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raykd.config import Exchange, Job
from raykd.data.splits import has_split, open_data
from raykd.errors import Interrupted
from raykd.exchange.mailbox import Mailbox
from raykd.exchange.remote import Far
from raykd.launch import assembly, hosts, measuring
from raykd.launch.cluster import NAMESPACE
from raykd.launch.peering import Part, together
from raykd.roles import checkpoints
from raykd.roles.evaluator import count_right
from raykd.roles.network import Facts, Tapped, build, pick_device
from raykd.roles.process import settle
from raykd.roles.recorder import read
from raykd.schemes.offline import Learning, Meeting, Setting, learning
from raykd.schemes.online import Copy, Near, Neighbour, PeerLink, learn_together, margin

ROOM = "peers"
STUDENT, DROPPED = "student.safetensors", "dropped.json"


@dataclass(frozen=True)
class Group:
    """What the peers of one run share.

    Attributes:
        job: of all peers.
        parts: what each does.
        facts: of the training data.
        folder: of the run.
        run: part of the actors' names.
        dropped: peers that the run goes on without.
        at: peer -> step of the checkpoint that it and all it exchanges with have, -1 where there is none; None: its newest.
        handles: of the teachers' replicas.
    """

    job: Job
    parts: Mapping[str, Part]
    facts: Facts
    folder: Path
    run: str = ""
    dropped: tuple[str, ...] = ()
    at: Mapping[str, int | None] = field(default_factory=dict)
    handles: Mapping[str, list[Any]] = field(default_factory=dict)

    def there(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the names that the run has not dropped."""
        return tuple(n for n in names if n not in self.dropped)

    def actor(self, process: str, rank: int) -> str:
        """Name of the actor of one worker of a process."""
        return f"{self.job.name}-{self.run}:peers:{process}:{rank}"


def members(
    group: Group,
    names: tuple[str, ...],
    rank: int,
    world: int,
    boxes: Mapping[str, Mailbox],
    rejoin: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[dict[str, Learning], dict[str, PeerLink]]:
    """The trainings of the peers of one process, ready to run, and their sides of the exchange."""
    job, exchange = group.job, group.job.exchange
    homes = {name: process for process, inside in together(job).items() for name in inside}
    trainings, links = {}, {}
    for name in names:
        part = group.parts[name]
        listens = group.there(part.listens)
        patience = exchange.timeout_s + job.launch.start_timeout_s
        neighbours: dict[str, Neighbour] = {}
        for other in listens:
            if other in names:
                neighbours[other] = Near(boxes[other], name, patience)
            else:
                restart = job.launch.start_timeout_s if exchange.on_loss == "respawn" else 0.0
                neighbours[other] = Far(other, group.actor(homes[other], rank), NAMESPACE, name, patience, restart)
        device = pick_device(part.job.launch.device, part.job.launch.gpus)
        copies: dict[str, Copy] = {}
        absent: dict[str, Copy] = {}
        for other in part.listens:
            if exchange.what == "weights" or other in group.dropped:
                asked = tuple(dict.fromkeys(s for plan in part.plans for s in plan.asks(other)))
                where = absent if other in group.dropped else copies
                where[other] = Copy(group.parts[other].job.student, asked, group.facts, device)
        link = PeerLink(name, exchange, boxes[name], neighbours, group.there(part.listeners), copies, absent)
        folder = group.folder / ROOM / name
        folder.mkdir(parents=True, exist_ok=True)
        at = rejoin if rejoin is not None else group.at.get(name)
        meeting = Meeting(link, part.published, margin(exchange, len(job.peers)), at, rejoin)
        stop = _alive(boxes[name], should_stop or hosts.Asked(group.folder))
        setting = Setting(part.plans, group.facts, folder, stop, meeting=meeting)
        if job.launch.backend == "local":
            sources = assembly.local_sources(part.job, part.plans, group.facts, pickled=True)
        else:
            sources = hosts.sources(part.job, part.plans, group.facts, group.handles, rank)
        trainings[name] = learning(rank, world, _keeping(part.job, job, group.facts), sources, setting)
        links[name] = link
    return trainings, links


def _alive(box: Mailbox, should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Asked before every step: the peer gets on, whether it exchanges anything or not."""

    def asked() -> bool:
        box.tick()
        return should_stop()

    return asked


def _keeping(own: Job, job: Job, known: Facts) -> Job:
    """The job of a peer, with as many more checkpoints as it may be ahead of others: all must have one of the same step."""
    apart = (len(job.peers) - 1) * ahead(job.exchange) * job.exchange.every
    between = job.training.checkpoint_every or max(1, known.num_samples // (job.training.batch_size or 1))
    keep = job.training.keep_checkpoints + math.ceil(apart / between)
    return dataclasses.replace(own, training=dataclasses.replace(own.training, keep_checkpoints=keep))


def ahead(exchange: Exchange) -> int:
    """Messages a peer may have out before it waits for one that listens: `exchange.ahead`, and what copies are late by; the
    one a listener has taken last counts until it asks for the next."""
    return exchange.ahead + 1 + 2 * math.ceil(exchange.late / exchange.every)


def boxes_of(group: Group, names: tuple[str, ...]) -> dict[str, Mailbox]:
    """A mailbox for each peer of a process."""
    exchange = group.job.exchange
    patience = exchange.timeout_s + group.job.launch.start_timeout_s
    most = ahead(exchange)
    return {name: Mailbox(name, group.there(group.parts[name].listeners), most, exchange.newest, patience) for name in names}


def gather(job: Job, parts: Mapping[str, Part], known: Facts, folder: Path, handles: Mapping[str, list[Any]]) -> Group:
    """The peers of a run that starts or goes on: without those it has dropped, from the step that all the others have."""
    room, exchange = folder / ROOM, job.exchange
    lost = dropped(folder, tuple(job.peers))
    names = tuple(n for n in job.peers if n not in lost)
    steps = {name: {step for step, _ in checkpoints.committed(room / name / "checkpoints")} for name in names}
    at: dict[str, int | None] = dict.fromkeys(names)
    for circle in circles({n: [o for o in parts[n].listens if o in names] for n in names}):
        if len(circle) > 1 and not exchange.newest:
            at |= dict.fromkeys(circle, max(set.intersection(*(steps[n] for n in circle)), default=-1))
    return Group(job, parts, known, folder, uuid.uuid4().hex[:8], tuple(lost), at, handles)


def circles(listens: Mapping[str, list[str]]) -> list[set[str]]:
    """Peers that exchange with each other, be it by way of others."""
    found: list[set[str]] = []
    for name, others in listens.items():
        own = {name, *others}
        joined = [circle for circle in found if circle & own]
        found = [circle for circle in found if circle not in joined] + [own.union(*joined)]
    return found


def drop(folder: Path, name: str) -> None:
    """Notes that the run goes on without a peer: for results, and for the next start."""
    room = folder / ROOM / name
    room.mkdir(parents=True, exist_ok=True)
    step = max((int(record["step"]) for record in read(room / "metrics.jsonl", "step")), default=0)
    (room / DROPPED).write_text(json.dumps({"step": step}) + "\n")


def dropped(folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Peers that the others go on without, and from which step on, as these have recorded it; where nobody listened, the last
    step it did itself."""
    found: dict[str, int] = {}
    for name in names:
        for record in read(folder / ROOM / name / "metrics.jsonl", "dropped"):
            for peer in record.get("peers", []):
                found[peer] = min(int(record["step"]), found.get(peer, int(record["step"])))
    for name in names:
        noted = folder / ROOM / name / DROPPED
        if name not in found and noted.exists():
            found[name] = int(json.loads(noted.read_text())["step"])
    return found


def here(group: Group, should_stop: Callable[[], bool]) -> None:
    """All peers in this process, one after the other up to their exchange."""
    names = group.there(tuple(group.job.peers))
    boxes = boxes_of(group, names)
    trainings, links = members(group, names, 0, 1, boxes, should_stop=should_stop)
    learn_together(trainings, links, lambda name, result: hosts.leave_result(group.folder / ROOM / name, result))


def results(group: Group, root: Path) -> dict[str, dict[str, Any]]:
    """Peer -> what it came to; of one that was dropped, the step and nothing else.

    Raises:
        Interrupted: a peer has not ended.
    """
    lost = dropped(group.folder, tuple(group.job.peers))
    found: dict[str, dict[str, Any]] = {}
    for name in group.job.peers:
        path = group.folder / ROOM / name / hosts.LEARNED
        if path.exists():
            found[name] = json.loads(path.read_text())
        elif name in lost:
            found[name] = {"dropped_at": lost[name]}
        else:
            raise Interrupted(f"The peers ended before the training did. Resume with --resume {root}.")
    return found


def measured(group: Group) -> dict[str, Any] | None:
    """The peers together: accuracy of the mean of their probabilities, and how much they differ; on the test split if there is
    one."""
    job = group.job
    split = next((s for s in ("test", "eval") if has_split(job.data, s)), None)
    names = [n for n in job.peers if (group.folder / ROOM / n / hosts.LEARNED).exists()]
    if split is None or len(names) < 2:
        return None
    settle(job.launch.threads)
    dataset = open_data(job.data, split, job.data_seed)
    device = pick_device(job.launch.device, job.launch.gpus)
    probabilities: list[NDArray[np.float64]] = []
    for name in names:
        file = str(group.folder / ROOM / name / STUDENT)
        spec = dataclasses.replace(job.peers[name], weights=file, weights_sha256=None)
        alone = dataclasses.replace(spec, branching=dataclasses.replace(spec.branching, kind="none"))
        tapped = Tapped(alone, build(alone, group.facts, device).eval(), (), group.facts, device)
        with torch.no_grad():
            logits = measuring.logits_of(tapped.logits, dataset, 0, 1)
        probabilities.append(torch.from_numpy(logits).double().softmax(-1).numpy())
    labels = torch.from_numpy(dataset.labels)
    top1, top5, count, ranked = count_right(torch.from_numpy(np.mean(probabilities, axis=0)), labels)
    pairs = list(combinations(probabilities, 2))
    return {
        "top1": top1 / count,
        "top5": top5 / count if ranked else None,
        "count": count,
        "split": split,
        "peers": names,
        "distance": float(np.mean([np.linalg.norm(a - b, axis=1).mean() for a, b in pairs])),
        "disagree": float(np.mean([(a.argmax(1) != b.argmax(1)).mean() for a, b in pairs])),
    }


def measured_there(group: Group) -> dict[str, Any] | None:
    """As `measured`, in a task on Ray."""
    import ray

    launch = group.job.launch
    task = ray.remote(measured).options(num_cpus=launch.cpus, num_gpus=launch.gpus, max_retries=3)
    found: dict[str, Any] | None = ray.get(
        task.remote(dataclasses.replace(group, handles={})), timeout=measuring.PATIENCE * launch.start_timeout_s
    )
    return found


def teacher_models(group: Group) -> dict[str, Any]:
    """The job's frozen teachers, in this process, to be measured."""
    teachers = assembly.make_committee(group.job, tuple(group.job.teachers), group.facts).teachers if group.job.teachers else {}
    return {name: teacher.logits for name, teacher in teachers.items()}
