"""Does the job fit the cluster? Needs against nodes, by first fit; pure, so it is tested without a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raykd.config import Job
from raykd.errors import ResourceError

WORKER_SETTINGS = "launch.workers, launch.cpus or launch.gpus"


@dataclass(frozen=True)
class Need:
    """`count` processes that each reserve the same; `setting` is the path that changes it, `strategy` Ray's placement."""

    what: str
    count: int
    resources: Mapping[str, float]
    setting: str
    strategy: str = "SPREAD"


@dataclass
class Verdict:
    """Whether all processes find a node, and where."""

    fits: bool
    text: str
    placed: dict[str, list[str]] = field(default_factory=dict)


def needs(job: Job) -> list[Need]:
    """What the job reserves: student workers and the replicas of teachers in pools."""
    launch = job.launch
    workers = _resources(launch.cpus, launch.gpus, launch.resources)
    found = [Need("student workers", launch.workers, workers, WORKER_SETTINGS, launch.placement_strategy)]
    if job.peers:
        found = _peers(job)
    if job.synthesis.mode == "bank":
        own, setting = job.synthesis, "synthesis.synthesizers, .cpus or .gpus"
        found.append(Need("synthesizers", own.synthesizers, _resources(own.cpus, own.gpus, own.resources), setting))
    shared: dict[str, list[str]] = {}
    for name, teacher in job.teachers.items():
        if teacher.placement == "pool" or (teacher.placement == "store" and teacher.fill == "pool"):
            shared.setdefault(teacher.actor or name, []).append(name)
    for names in shared.values():
        specs = [job.teachers[name] for name in names]
        asked = _resources(max(s.cpus for s in specs), max(s.gpus for s in specs), specs[0].resources)
        settings = f"teachers.{names[0]}.replicas, .cpus or .gpus"
        found.append(Need(f"teacher {' + '.join(names)}", specs[0].replicas, asked, settings))
    return found


def _peers(job: Job) -> list[Need]:
    """What the processes of the peers reserve; those that share one say the same."""
    launch, found = job.launch, {}
    for name, peer in job.peers.items():
        own = (
            launch.cpus if peer.cpus is None else peer.cpus,
            launch.gpus if peer.gpus is None else peer.gpus,
            launch.resources if peer.resources is None else peer.resources,
        )
        found[peer.actor or name] = Need(
            f"peer {peer.actor or name}",
            launch.workers,
            _resources(*own),
            f"peers.{name}.cpus or .actor",
            launch.placement_strategy,
        )
    return list(found.values())


def fit(wanted: Sequence[Need], nodes: Mapping[str, Mapping[str, float]]) -> Verdict:
    """Places every process on a node with room, the largest first.

    Args:
        wanted: of one job.
        nodes: node -> free resources.
    """
    free = {node: dict(resources) for node, resources in nodes.items()}
    placed: dict[str, list[str]] = {}
    for need in sorted(wanted, key=_rarest_first):
        packed = _packed(need, free) if need.strategy == "STRICT_PACK" else None
        for _ in range(need.count):
            taken = placed.setdefault(need.what, [])
            open_nodes = [n for n in free if packed in (None, n) and not (need.strategy == "STRICT_SPREAD" and n in taken)]
            node = next((n for n in open_nodes if _room(free[n], need.resources)), None)
            if node is None:
                return Verdict(False, _refusal(need, wanted, nodes), placed)
            for name, amount in need.resources.items():
                free[node][name] -= amount
            taken.append(node)
    return Verdict(True, _sum(wanted, nodes), placed)


def _rarest_first(need: Need) -> tuple[int, float, float]:
    custom = [name for name, amount in need.resources.items() if amount and name not in ("CPU", "GPU")]
    return -len(custom), -need.resources.get("GPU", 0.0), -need.resources.get("CPU", 0.0)


def _packed(need: Need, free: Mapping[str, Mapping[str, float]]) -> str:
    """The node with room for all of a need; an unknown name where there is none."""
    total = {name: amount * need.count for name, amount in need.resources.items()}
    return next((node for node, has in free.items() if _room(has, total)), "")


def require(job: Job, nodes: Mapping[str, Mapping[str, float]]) -> Verdict:
    """As `fit`.

    Raises:
        ResourceError: the job does not fit; the message holds the sum and the setting to change.
    """
    verdict = fit(needs(job), nodes)
    if not verdict.fits:
        raise ResourceError(verdict.text)
    return verdict


def _resources(cpus: float, gpus: float, custom: Mapping[str, float]) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {}) | dict(custom)


def _room(has: Mapping[str, float], wants: Mapping[str, float]) -> bool:
    return all(has.get(name, 0.0) + 1e-9 >= amount for name, amount in wants.items())


def _sum(wanted: Sequence[Need], nodes: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(n for need in wanted for n in need.resources))
    parts = []
    for name in names:
        asked = sum(need.count * need.resources.get(name, 0.0) for need in wanted)
        there = sum(has.get(name, 0.0) for has in nodes.values())
        parts.append(f"{name} {asked:g} of {there:g} free")
    return f"{', '.join(parts)} on {len(nodes)} node{'s' if len(nodes) != 1 else ''}"


def _refusal(failed: Need, wanted: Sequence[Need], nodes: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"  {need.what}: {need.count} x ({', '.join(f'{n} {a:g}' for n, a in need.resources.items())})" for need in wanted]
    return "\n".join(
        [
            f"Resources: the job does not fit the cluster ({_sum(wanted, nodes)}); no node has room for {failed.what}.",
            *lines,
            f"Change {failed.setting}, or add nodes.",
        ]
    )
