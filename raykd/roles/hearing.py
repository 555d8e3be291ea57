"""What a loss hears of its teachers: one, several as a list, or their aggregate; and what is left when a teacher has gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raykd.data.keys import batch_key
from raykd.errors import SourceError
from raykd.parts.aggregators import aggregate
from raykd.roles.losses import Plan
from raykd.signals import Aggregate, Signals

Answers = Mapping[str, Signals]
"""Teacher's name, or Aggregate.key -> its signals."""


@dataclass(frozen=True)
class Heard:
    """What one loss gets: role -> Signals (a list of them for `teachers` and `peers`), which of its teachers answered, and by
    what factor its weight grows because others of the same loss have gone."""

    roles: dict[str, Any] = field(default_factory=dict)
    of: tuple[int, ...] = ()
    factor: float = 1.0


def hear(plan: Plan, plans: Sequence[Plan], answers: Answers) -> Heard | None:
    """What a loss gets out of the answers of a batch; None where its only teacher has gone and others stand in.

    Raises:
        SourceError: no teacher of this loss is left.
    """
    if not plan.teachers:
        return Heard()
    role = plan.role or "teacher"
    if plan.aggregate is not None and plan.aggregate.key in answers:
        return Heard({role: answers[plan.aggregate.key]})
    there = tuple(i for i, name in enumerate(plan.teachers) if name in answers)
    if plan.lists:
        _require(plan, there)
        return Heard({role: [answers[plan.teachers[i]] for i in there]}, there)
    siblings = [p for p in plans if p.name == plan.name]
    left = sum(p.share for p in siblings if p.teachers[0] in answers)
    if left == 0:
        raise _nobody(plan.name, [p.teachers[0] for p in siblings])
    if not there:
        return None
    return Heard({role: answers[plan.teachers[0]]}, there, sum(p.share for p in siblings) / left)


def with_aggregates(plans: Sequence[Plan], answers: Answers, fields: Mapping[str, Tensor], seed: int) -> dict[str, Signals]:
    """The answers and, where a loss wants one that no source has made, the aggregates of those that are there."""
    found = dict(answers)
    for plan in plans:
        wanted = plan.aggregate
        if wanted is not None and wanted.key not in found:
            there = [i for i, name in enumerate(wanted.teachers) if name in answers]
            _require(plan, tuple(there))
            logits = [answers[wanted.teachers[i]]["logits"] for i in there]
            found[wanted.key] = {"logits": combine(wanted, logits, fields, seed, there)}
    return found


def combine(
    wanted: Aggregate, logits: list[Tensor], fields: Mapping[str, Tensor], seed: int, of: Sequence[int] | None = None
) -> Tensor:
    """The aggregate of a batch's logits; a function of them and of the batch's keys, so the same wherever it is made.

    Args:
        wanted: how, and whose.
        logits: of each teacher that answered, `[b c]`.
        fields: `labels`, `sample_index`, `augmentation_seed` of the batch, as far as the aggregator asks for them.
        seed: of the run.
        of: places in `wanted.teachers` of those that answered; None: all.
    """
    weights = [wanted.weights[i] for i in (range(len(wanted.teachers)) if of is None else of)]
    given: dict[str, Any] = {"weights": torch.tensor(weights), "temperature": wanted.temperature}
    if "labels" in fields:
        given["labels"] = fields["labels"]
    if "sample_index" in fields:
        key = batch_key(seed, wanted.key, fields["sample_index"].numpy(), fields["augmentation_seed"].numpy())
        given["generator"] = torch.Generator().manual_seed(key)
    return aggregate(wanted.how, logits, given)


def _require(plan: Plan, there: tuple[int, ...]) -> None:
    if not there:
        raise _nobody(plan.name, plan.teachers)


def _nobody(name: str, teachers: Sequence[str]) -> SourceError:
    return SourceError(f"losses.{name}: none of its teachers is left ({', '.join(teachers)}). Resume the run.")
