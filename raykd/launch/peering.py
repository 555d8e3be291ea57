"""From an online job to one job for each peer, and to who hears what of whom.

A peer is an ordinary learner: its job has the peer as its student, the losses by which it learns, and data of the run's seed.
What it hears of its neighbours it gets at each exchange (raykd/schemes/online.py), where it publishes what they ask of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from raykd.config import Edge, Job, Student
from raykd.data.keys import derive
from raykd.errors import ConfigError, near
from raykd.launch import assembly
from raykd.roles.losses import Neighbour, Plan, plans
from raykd.roles.network import Facts
from raykd.signals import Signal

GRAPHS = ("all", "ring", "leader:<peer>", "star:<peer>")


@dataclass(frozen=True)
class Part:
    """What one peer does in the run.

    Attributes:
        job: its own.
        plans: its losses, connected; they listen to its neighbours by name.
        published: what its neighbours ask of it.
        listens: neighbours it listens to.
        listeners: neighbours that listen to it.
    """

    job: Job
    plans: list[Plan]
    published: tuple[Signal, ...]
    listens: tuple[str, ...]
    listeners: tuple[str, ...]


def edges(job: Job) -> dict[str, dict[str, Edge]]:
    """Peer -> the peers it learns from, with what is said of each edge.

    Raises:
        ConfigError: the graph or an edge names something that is not there.
    """
    names, exchange = list(job.peers), job.exchange
    found: dict[str, dict[str, Edge]] = {name: {} for name in names}
    if exchange.edges:
        for text, edge in exchange.edges.items():
            source, arrow, target = (part.strip() for part in text.partition(">"))
            for name in (source, target):
                if name not in names or not arrow:
                    raise ConfigError(f"exchange.edges.{text}: expected 'a>b' of two peers. {near(name, names)}")
            if source == target:
                raise ConfigError(f"exchange.edges.{text}: expected two different peers. Leave it out.")
            found[target][source] = edge
        return {target: {s: own[s] for s in names if s in own} for target, own in found.items()}
    kind, _, leader = exchange.graph.partition(":")
    if kind not in ("all", "ring", "leader", "star") or (kind in ("leader", "star")) != bool(leader):
        raise ConfigError(f"exchange.graph: expected one of {', '.join(GRAPHS)}, got {exchange.graph!r}.")
    if leader and leader not in names:
        raise ConfigError(f"exchange.graph: no peer {leader!r} in this job. {near(leader, names)}")
    for place, target in enumerate(names):
        others = [s for s in names if s != target]
        if kind == "ring":
            others = [names[place - 1]] if len(names) > 1 else []
        elif kind == "leader":
            others = [leader] if target != leader else []
        elif kind == "star":
            others = [leader] if target != leader else others
        found[target] = {source: Edge() for source in others}
    return found


def peer_job(job: Job, name: str) -> Job:
    """The job of one peer, by itself."""
    peer = job.peers[name]
    place, count = list(job.peers).index(name), len(job.peers)
    data = dataclasses.replace(job.data, seed=job.data_seed)
    if job.exchange.shards == "disjoint":
        data = dataclasses.replace(data, shard=(place, count))
    if job.exchange.views == "own":
        data = dataclasses.replace(data, view=place)
    launch = dataclasses.replace(
        job.launch,
        cpus=job.launch.cpus if peer.cpus is None else peer.cpus,
        gpus=job.launch.gpus if peer.gpus is None else peer.gpus,
        resources=job.launch.resources if peer.resources is None else peer.resources,
    )
    student = Student(**{f.name: getattr(peer, f.name) for f in dataclasses.fields(Student)})
    return dataclasses.replace(
        job,
        name=f"{job.name}-{name}",
        seed=derive(job.seed, "peer", name) >> 8,
        data=data,
        student=student,
        peers={},
        training=dataclasses.replace(job.training, **peer.training),
        launch=launch,
        stages={},
        baseline=False,
    )


def parts(job: Job, known: Facts) -> dict[str, Part]:
    """What each peer does: its losses connected to its neighbours, and what is asked of it.

    Raises:
        SignalError, ConfigError: a loss cannot be connected; the message names it.
    """
    graph, jobs = edges(job), {name: peer_job(job, name) for name in job.peers}
    layers = {name: assembly.stages_of(spec, known) for name, spec in {**job.peers, **job.teachers}.items()}
    branches = {name: assembly.branches(spec, known) for name, spec in job.peers.items()}
    found: dict[str, list[Plan]] = {}
    for name, own in jobs.items():
        beside = {s: Neighbour(edge.weight, tuple(edge.losses), branches[s]) for s, edge in graph[name].items()}
        found[name] = plans(own, {**layers, "student": layers[name]}, beside, branches[name])
    heard = {name: heard_of(job, planned) for name, planned in found.items()}
    result = {}
    for name, planned in found.items():
        asked = dict.fromkeys(s for other in job.peers for plan in found[other] if other != name for s in plan.asks(name))
        result[name] = Part(
            jobs[name],
            planned,
            tuple(asked),
            tuple(n for n in job.peers if n in heard[name]),
            tuple(other for other in job.peers if name in heard[other]),
        )
    return result


def heard_of(job: Job, planned: list[Plan]) -> set[str]:
    """The peers that a learner's losses listen to."""
    return {t for plan in planned for t in plan.teachers if t in job.peers}


def together(job: Job) -> dict[str, tuple[str, ...]]:
    """Process -> the peers that share it."""
    found: dict[str, tuple[str, ...]] = {}
    for name, peer in job.peers.items():
        found[peer.actor or name] = (*found.get(peer.actor or name, ()), name)
    return found
