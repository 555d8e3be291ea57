"""What `check` finds out about a job without starting anything."""

from __future__ import annotations

from dataclasses import dataclass, field

from raykd.config import Job


@dataclass(frozen=True)
class RoleLine:
    """One model of the job. MACs are multiply-adds of convolutions and linear layers, one image."""

    name: str
    role: str
    model: str
    weights: str | None
    parameters: int
    macs: int
    placement: str
    replicas: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class SignalLine:
    """One signal that will travel from a teacher to a student."""

    teacher: str
    key: str
    shape: tuple[int, ...]
    codec: str
    bytes_per_sample: float


@dataclass
class Inspection:
    """The job resolved, its models, what will travel, what it reserves, remarks, and all faults at once.

    `needs` holds (what, count, cpus each, gpus each). `connectors` maps a loss to its trainable extra parameters.
    """

    job: Job
    roles: list[RoleLine] = field(default_factory=list)
    signals: list[SignalLine] = field(default_factory=list)
    needs: list[tuple[str, int, float, float]] = field(default_factory=list)
    connectors: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    steps_per_epoch: int = 0
