"""How good the teachers are, each alone and together, measured here before the training.

Replicas compute logits of whole batches; a task without a model compares them with the labels. The driver sees counts only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raykd.config import Job
from raykd.data.batches import evaluation_batches
from raykd.data.sets import DataSet
from raykd.data.splits import open_data
from raykd.parts.aggregators import aggregate, needs
from raykd.roles.evaluator import Counts, count_right

BATCH = 128
PATIENCE = 12  # times launch.start_timeout_s: how long measuring may take
ENSEMBLE = "mean_probs"  # of teachers that no loss aggregates
LogitsOf = Callable[[str, int, int], Any]  # teacher, part, parts -> logits [n c], or a reference to them


@dataclass(frozen=True)
class Ballot:
    """Who is measured: label map of each teacher, and the ensemble's members with their weights."""

    label_maps: Mapping[str, tuple[int, ...] | None]
    ensemble: tuple[str, ...]
    how: str
    weights: tuple[float, ...]


def ballot(job: Job) -> Ballot:
    """The teachers of a job; those that know all classes form the ensemble, as the job's losses aggregate them."""
    maps = {name: spec.label_map for name, spec in job.teachers.items()}
    whole = tuple(name for name, label_map in maps.items() if label_map is None)
    chosen = [loss.aggregate for loss in job.losses.values() if loss.aggregate is not None]
    how = next((name for name in chosen if not {"labels", "generator"} & set(needs(name))), ENSEMBLE)
    weights = tuple(job.teachers[name].weight for name in whole)
    together = len(whole) > 1 and any(weights)
    return Ballot(maps, whole if together else (), how, weights if together else ())


def logits_of(model: Callable[[Tensor], Tensor], dataset: DataSet, part: int, parts: int) -> np.ndarray:
    """Logits [n c] of a model on every `parts`-th batch of a data set."""
    batches = evaluation_batches(dataset, BATCH, world=parts, rank=part)
    found = [model(batch["images"]).float().cpu().numpy() for batch in batches]
    return np.concatenate(found) if found else np.zeros((0, 1), np.float32)


def num_parts(dataset: DataSet, most: int) -> int:
    """Parts of at least one batch each."""
    return max(1, min(most, math.ceil(len(dataset) / BATCH)))


def score(who: Ballot, dataset: DataSet, logits: Mapping[str, np.ndarray], part: int, parts: int) -> dict[str, Counts]:
    """Right answers of each teacher, and of the ensemble under the name "", on one part of a data set."""
    rows = [np.arange(s, min(s + BATCH, len(dataset))) for s in range(part * BATCH, len(dataset), parts * BATCH)]
    labels = torch.from_numpy(dataset.labels[np.concatenate(rows)])
    scores = {name: torch.from_numpy(np.array(z)) for name, z in logits.items()}
    found = {name: count_right(z, labels, who.label_maps[name]) for name, z in scores.items()}
    alike = len({scores[name].shape[-1] for name in who.ensemble}) == 1  # published weights come with classes of their own
    if who.ensemble and alike:
        given = {"weights": torch.tensor(who.weights), "temperature": 1.0}
        found[""] = count_right(aggregate(who.how, [scores[name] for name in who.ensemble], given), labels)
    return found


def here(job: Job, split: str, models: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, dict[str, Any]]:
    """Accuracy of each teacher and of the ensemble (""), with all models in this process."""
    dataset, who = open_data(job.data, split, job.data_seed), ballot(job)
    logits = {name: logits_of(model, dataset, 0, 1) for name, model in models.items()}
    return accuracies([score(who, dataset, logits, 0, 1)], split)


def accuracies(parts: list[dict[str, Counts]], split: str) -> dict[str, dict[str, Any]]:
    """Sums the counts of all parts: name -> {"top1", "top5", "count", "split"}."""
    found = {}
    for name in parts[0]:
        top1, top5, count, ranked = (sum(p[name][i] for p in parts) for i in range(4))
        share5 = top5 / count if count and ranked else None
        found[name] = {"top1": top1 / count if count else 0.0, "top5": share5, "count": int(count), "split": split}
    return found
