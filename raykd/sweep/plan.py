"""What a sweep does, as plain data: which trials, how they are chosen and stopped, what their teachers are shared by."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from raykd.config import STRICT, Job
from raykd.errors import ConfigError, JobFaults
from raykd.resolve import resolve_training
from raykd.sweep import space as spaces
from raykd.sweep.space import Settings, Space

PLAN = "plan.json"
METRIC, TIME = "top1", "epoch"
CHECKPOINTING = ("pbt", "hyperband")  # schedulers that move or pause trials through Tune's checkpoints
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Plan:
    """Settings of a sweep.

    Attributes:
        search: random and grid draw all trials beforehand; optuna (TPE) chooses each after what came before.
        scheduler: who stops trials early. asha, hyperband, median; pbt copies good trials over bad ones and perturbs settings.
        samples: trials to draw (with random search, for each combination of the space's grids).
        seeds: of the winner's runs on the whole training set.
        share: one store of outputs for all trials, one pool of live replicas, or teachers in every trial.
        holdout: share of the training images, of each class alike, on which trials are judged.
        grace: epochs before a trial may be stopped; None: a ninth of all.
        reduction: asha and hyperband keep one trial of so many at each rung.
        perturb_every: epochs between pbt's exploits; None: a fifth of all.
        max_concurrent: trials at a time; None: as many as fit the cluster.
    """

    __pydantic_config__ = STRICT
    search: Literal["random", "grid", "optuna"] = "random"
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "asha"
    samples: Count = 16
    seeds: Annotated[int, Field(ge=3)] = 3
    share: Literal["store", "pool", "none"] = "store"
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    grace: Count | None = None
    reduction: Annotated[int, Field(ge=2)] = 3
    perturb_every: Count | None = None
    max_concurrent: Count | None = None

    @property
    def needs_checkpoints(self) -> bool:
        """Whether reports carry a checkpoint."""
        return self.scheduler in CHECKPOINTING


def make(**settings: Any) -> Plan:
    """A plan with its types checked.

    Raises:
        JobFaults: everything that is wrong with the settings.
    """
    try:
        return TypeAdapter(Plan).validate_python(settings)
    except ValidationError as error:
        raise JobFaults.of(_explain(e) for e in error.errors()) from None


def _explain(error: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else "sweep"
    message = error["msg"][0].lower() + error["msg"][1:]
    what = message.replace("input should be ", "expected ").replace("expected greater", "expected a number greater")
    return f"sweep.{name}: {what}, got {error['input']!r}. Change it."


def epochs_of(job: Job, settings: Mapping[str, Any]) -> int:
    """Epochs of a trial with these settings."""
    changed = job.replace(**{p: v for p, v in settings.items() if p.startswith("training.")})
    return resolve_training(changed.training).epochs or 1


def grace_of(plan: Plan, epochs: int) -> int:
    """Epochs before a trial may be stopped."""
    return min(plan.grace or max(1, round(epochs / 9)), epochs)


def interval_of(plan: Plan, epochs: int) -> int:
    """Epochs between exploits."""
    return min(plan.perturb_every or max(1, math.ceil(epochs / 5)), epochs)


@dataclass(frozen=True)
class Trial:
    """One planned trial."""

    name: str
    settings: Settings


def trials(plan: Plan, space: Space, seed: int) -> list[Trial]:
    """All trials of a random or grid search; none where they are chosen as the sweep goes."""
    if plan.search == "optuna":
        return []
    found = spaces.grid(space) if plan.search == "grid" else spaces.draws(space, plan.samples, seed)
    digits = max(3, len(str(len(found) - 1)))
    return [Trial(f"{i:0{digits}d}", settings) for i, settings in enumerate(found)]


def write(folder: Path, plan: Plan, space: Space, planned: list[Trial]) -> None:
    """Keeps the plan in the sweep's folder."""
    content = dataclasses.asdict(plan) | {
        "space": {path: spaces.describe(domain) for path, domain in space.items()},
        "trials": [{"trial": t.name, "settings": t.settings} for t in planned],
    }
    (folder / PLAN).write_text(json.dumps(content, indent=2) + "\n")


def read(folder: Path) -> tuple[Plan, dict[str, Any], list[Trial]]:
    """(plan, the space as `describe` tells it, planned trials) of a sweep's folder.

    Raises:
        ConfigError: the folder holds no sweep.
    """
    try:
        content = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Folder {folder}: expected a sweep with its {PLAN}, got {type(error).__name__}. Name the folder of a sweep."
        ) from None
    space = content.pop("space")
    planned = [Trial(t["trial"], t["settings"]) for t in content.pop("trials")]
    return make(**content), space, planned
