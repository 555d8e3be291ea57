"""What `raykd check` prints: models, signals that travel, connectors, needs, notes, and all faults at once."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from raykd.launch.inspection import Inspection, RoleLine
from raykd.report.console import print_table
from raykd.report.tables import quantity, size
from raykd.resolve import to_dict

ROLES = ("name", "role", "model", "weights", "parameters", "MACs", "placement", "reserves")
SIGNALS = ("teacher", "signal", "shape", "codec", "bytes a sample", "bytes a step")


def print_inspection(console: Console, found: Inspection) -> None:
    """Prints an inspection."""
    job, training = found.job, found.job.training
    head = f"{job.name}: seed {job.seed}, {training.epochs} epochs, batch {training.batch_size}"
    steps = f", {found.steps_per_epoch:,} steps an epoch" if found.steps_per_epoch else ""
    console.print(Text(head + steps, style="bold"))
    if found.roles:
        print_table(console, ROLES, [_role(line) for line in found.roles], "Models")
    if found.signals:
        print_table(console, SIGNALS, signal_rows(found), "Signals that travel")
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
    """One row a signal, and their sum where there are several."""
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
    if len(body) > 1:
        total = sum(s.bytes_per_sample for s in found.signals)
        body.append(("all", "", "", "", f"{total:,.6g}", size(total * batch)))
    return body


def as_json(found: Inspection) -> dict[str, Any]:
    """The inspection as plain data."""
    return {
        "job": to_dict(found.job),
        "roles": [vars(line) for line in found.roles],
        "signals": [vars(line) for line in found.signals],
        "needs": [dict(zip(("what", "count", "cpus", "gpus"), need)) for need in found.needs],
        "connectors": found.connectors,
        "notes": found.notes,
        "faults": found.faults,
        "steps_per_epoch": found.steps_per_epoch,
    }


def _role(line: RoleLine) -> tuple[str, ...]:
    unit = "worker" if line.role == "student" else "replica"
    alone = {"inline": "in the student's process", "store": "from its store"}.get(line.placement)
    shared = f"{line.placement}, {line.replicas} {unit}" + ("s" if line.replicas > 1 else "")
    started = line.placement != "inline" and line.replicas > 0
    reserves = f"{line.replicas} x ({_reserve(line.cpus, line.gpus)})" if started else "-"
    numbers = (quantity(line.parameters), quantity(line.macs))
    return (line.name, line.role, line.model, line.weights or "none", *numbers, alone or shared, reserves)


def _reserve(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f", {gpus:g} GPU" if gpus else "")
