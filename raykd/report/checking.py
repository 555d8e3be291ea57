"""What `raykd check` prints: models, signals that travel, connectors, needs, notes, and all faults at once."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from raykd import catalogue
from raykd.config import Job, Loss
from raykd.errors import RaykdError
from raykd.launch import peering
from raykd.launch.inspection import Inspection, RoleLine
from raykd.report.catalogues import branching_words
from raykd.report.console import print_table
from raykd.report.peer_tables import MOST
from raykd.report.words import quantity, size
from raykd.resolve import to_dict
from raykd.signals import SOURCES

ROLES = ("name", "role", "model", "weights", "parameters", "MACs", "placement", "reserves")
SIGNALS = ("from", "signal", "shape", "codec", "bytes a sample", "bytes a step")
EDGES = ("edge", "weight", "losses", "bytes a step")


def print_inspection(console: Console, found: Inspection) -> None:
    """Prints an inspection."""
    job, training = found.job, found.job.training
    head = f"{job.name}: seed {job.seed}, {training.epochs} epochs, batch {training.batch_size}"
    steps = f", {found.steps_per_epoch:,} steps an epoch" if found.steps_per_epoch else ""
    console.print(Text(head + steps, style="bold"))
    if found.roles:
        print_table(console, ROLES, [_role(line, found.job) for line in found.roles], "Models")
    if found.signals:
        print_table(console, SIGNALS, signal_rows(found), "Signals that travel")
    taught = edges(found)
    if taught:
        print_table(console, EDGES, edge_rows(taught), "Who teaches whom")
        console.print(Text(exchange(found)))
    for name, parameters in found.connectors.items():
        console.print(
            Text(f"Connector of {name}: {quantity(parameters)} trainable parameters beside the student, not exported.")
        )
    if found.needs:
        console.print(Text(needs(found)))
    for note in found.notes:
        console.print(Text(f"Note: {note}", style="cyan"))
    print_faults(console, found.faults)


def print_faults(console: Console, faults: list[str]) -> None:
    """Prints faults, numbered, or that there are none."""
    if not faults:
        console.print(Text("No faults.", style="green"))
        return
    console.print(Text(f"{len(faults)} fault{'s' if len(faults) > 1 else ''}:", style="bold red"))
    for number, fault in enumerate(faults, 1):
        console.print(Text(f"  {number}. {fault}", style="red"), soft_wrap=True)


def needs(found: Inspection) -> str:
    """What the job reserves, and the sum."""
    parts = [f"{count} x {what} ({_reserve(cpus, gpus)})" for what, count, cpus, gpus in found.needs]
    cpus = sum(count * each for _, count, each, _ in found.needs)
    gpus = sum(count * each for _, count, _, each in found.needs)
    return f"Needs {cpus:g} CPU and {gpus:g} GPU in all: {', '.join(parts)}."


def signal_rows(found: Inspection) -> list[tuple[str, ...]]:
    """One row a signal, and their sum where there are several from teachers; what peers send goes to each that listens."""
    batch = found.job.training.batch_size or 1
    body: list[tuple[str, ...]] = [
        (
            s.teacher,
            s.key,
            " x ".join(map(str, s.shape)) or "scalar",
            s.codec,
            f"{s.bytes_per_sample:,.6g}",
            size(s.bytes_per_sample * batch),
        )
        for s in found.signals
    ]
    if len(body) > 1 and not found.job.peers:
        total = sum(s.bytes_per_sample for s in found.signals)
        body.append(("all", "", "", "", f"{total:,.6g}", size(total * batch)))
    return body


def edges(found: Inspection) -> list[dict[str, Any]]:
    """Every edge of the peers' graph that a loss uses: `{"from", "to", "weight", "losses", "bytes_a_step"}`.

    `weight` is the edge's share among those that the first of its losses hears; bytes are the mean over steps.
    """
    job = found.job
    try:
        graph = peering.edges(job) if job.peers else {}
        heard = {name: _hears(job, loss) for name, loss in job.losses.items()}
    except RaykdError:
        return []
    sizes = _sent(found)
    result: list[dict[str, Any]] = []
    for target, own in graph.items():
        by = {
            name: [s for s, edge in own.items() if s in who and name in (edge.losses or heard)] for name, who in heard.items()
        }
        for source, edge in own.items():
            losses = [name for name, sources in by.items() if source in sources]
            if losses:
                total = sum(own[s].weight for s in by[losses[0]]) or 1.0
                line = {"from": source, "to": target, "weight": edge.weight / total, "losses": losses}
                result.append(line | {"bytes_a_step": sizes.get(source)})
    return result


def edge_rows(taught: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row an edge; of very many one row a learner."""
    if len(taught) <= MOST:
        return [_edge(f"{edge['from']} > {edge['to']}", [edge]) for edge in taught]
    into: dict[str, list[dict[str, Any]]] = {}
    for edge in taught:
        into.setdefault(edge["to"], []).append(edge)
    return [_edge(f"{target} from {len(own)} peers", own) for target, own in into.items()]


def exchange(found: Inspection) -> str:
    """When peers exchange what, in a sentence."""
    asked = found.job.exchange
    when = "at each step" if asked.every == 1 else f"every {asked.every} steps"
    if asked.what == "signals":
        alone = "; losses that hear peers count at these steps alone" if asked.every > 1 else ""
        return f"Exchange: signals of the same step, {when}{alone}."
    late = "the newest there is" if asked.staleness == "newest" else f"{asked.staleness} steps older than due"
    copies = f"each peer asks frozen copies of those it learns from ({late})"
    return f"Exchange: weights, {when}; {copies}. Bytes are those of the parameters."


def _hears(job: Job, loss: Loss) -> set[str]:
    """The peers that a loss listens to, where they are its neighbours."""
    role = catalogue.method(loss.method).teacher_role
    if role is None:
        return set()
    if loss.teachers:
        return {name for name in loss.teachers if name in job.peers}
    return set(job.peers) if SOURCES[role] == "peers" or not job.teachers else set()


def _sent(found: Inspection) -> dict[str, float]:
    """Bytes that a peer sends to each that listens, the mean over steps."""
    job = found.job
    if job.exchange.what == "weights":
        return {line.name: 4.0 * line.parameters / job.exchange.every for line in found.roles if line.role == "peer"}
    sizes: dict[str, float] = {}
    for line in found.signals:
        a_step = line.bytes_per_sample * (job.training.batch_size or 1) / job.exchange.every
        sizes[line.teacher] = sizes.get(line.teacher, 0.0) + a_step
    return sizes


def _edge(who: str, own: list[dict[str, Any]]) -> tuple[str, ...]:
    weights = [f"{edge['weight']:.4g}" for edge in sorted(own, key=lambda e: float(e["weight"]))]
    weight = weights[0] if weights[0] == weights[-1] else f"{weights[0]} to {weights[-1]}"
    losses = dict.fromkeys(loss for edge in own for loss in edge["losses"])
    sizes = [edge["bytes_a_step"] for edge in own if edge["bytes_a_step"] is not None]
    return (who, weight + (" each" if len(own) > 1 else ""), ", ".join(losses), size(sum(sizes)) if sizes else "-")


def as_json(found: Inspection) -> dict[str, Any]:
    """The inspection as plain data."""
    return {
        "job": to_dict(found.job),
        "roles": [vars(line) for line in found.roles],
        "signals": [vars(line) for line in found.signals],
        "needs": [dict(zip(("what", "count", "cpus", "gpus"), need)) for need in found.needs],
        "connectors": found.connectors,
        "edges": edges(found),
        "notes": found.notes,
        "faults": found.faults,
        "steps_per_epoch": found.steps_per_epoch,
    }


def _model(line: RoleLine, job: Job) -> str:
    """The model, and its branches where it has several."""
    spec = job.student if line.role == "student" else job.peers.get(line.name)
    words = branching_words(to_dict(spec.branching)) if spec is not None else ""
    return f"{line.model}, {words}" if words else line.model


def _role(line: RoleLine, job: Job) -> tuple[str, ...]:
    unit = "replica" if line.role == "teacher" else "worker"
    alone = {"inline": "in the student's process", "store": "from its store"}.get(line.placement)
    shared = f"{line.placement}, {line.replicas} {unit}" + ("s" if line.replicas > 1 else "")
    started = line.placement != "inline" and line.replicas > 0
    reserves = f"{line.replicas} x ({_reserve(line.cpus, line.gpus)})" if started else "-"
    numbers = (quantity(line.parameters), quantity(line.macs))
    return (line.name, line.role, _model(line, job), line.weights or "none", *numbers, alone or shared, reserves)


def _reserve(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f", {gpus:g} GPU" if gpus else "")
