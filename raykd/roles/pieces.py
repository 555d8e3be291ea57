"""Parts of the networks themselves that a loss is built with, where the student trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from raykd import models
from raykd.roles.losses import Plan
from raykd.signals import BLOCKS, TAILS

Shape = tuple[int, int, int]


def pieces(
    plan: Plan, student: nn.Module, teacher: Callable[[], nn.Module], own_shape: Shape, their_shape: Shape
) -> dict[str, Any]:
    """The student's blocks and the teacher's tails at the loss's layers, where it asks for them.

    Args:
        plan: the loss.
        student: the one that trains.
        teacher: makes a copy of the loss's teacher.
        own_shape: (c, h, w) of the student's input.
        their_shape: of the teacher's.

    Raises:
        ModelError: a network cannot be cut there.
    """
    found: dict[str, Any] = {}
    if plan.reads(BLOCKS):
        found[BLOCKS] = models.blocks(student, plan.student_layers, own_shape)
    if plan.reads(TAILS):
        found[TAILS] = models.tails(teacher(), plan.teacher_layers, their_shape)
    return found
