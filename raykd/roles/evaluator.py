"""The evaluator: top-1 and top-5 of any model that answers with logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raykd.roles.optimisation import all_sum


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers over `count` images; `top5` is None below six classes."""

    top1: float
    top5: float | None
    count: int

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {100 * self.top5:.2f} %"
        return f"{100 * self.top1:.2f} %{top5} ({self.count} images)"


Counts = tuple[int, int, int, int]
"""Right at 1, right at 5, images, and 1 if right at 5 means something (above five classes)."""


def count_right(scores: Tensor, labels: Tensor, label_map: tuple[int, ...] | None = None) -> Counts:
    """Counts right answers.

    Args:
        scores: `[b c]`.
        labels: `[b]`.
        label_map: the label of each of the model's classes; images of other labels do not count. None: class = label.
    """
    classes = scores.shape[-1]
    top = scores.topk(min(5, classes), dim=-1).indices
    counted = torch.ones_like(labels, dtype=torch.bool)
    if label_map is not None:
        own = torch.tensor(label_map)
        top, counted = own[top], torch.isin(labels, own)
    right = (top == labels[:, None]) & counted[:, None]
    return int(right[:, 0].sum()), int(right.any(dim=1).sum()), int(counted.sum()), int(classes > 5)


@torch.no_grad()
def evaluate(logits: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Tensor]]) -> Accuracy:
    """Counts right answers over this worker's batches, summed over the workers.

    Args:
        logits: uint8 images `[b c h w]` -> `[b c]`; the model is in evaluation mode already.
        batches: with `images` and `labels` `[b]`.
    """
    counts = torch.zeros(3, dtype=torch.float64)
    ranked = 0
    for batch in batches:
        *right, ranked = count_right(logits(batch["images"]).float().cpu(), batch["labels"])
        counts += torch.tensor(right, dtype=torch.float64)
    top1, top5, count = all_sum(counts).tolist()
    if not count:
        return Accuracy(0.0, None, 0)
    return Accuracy(top1 / count, top5 / count if ranked else None, int(count))


@torch.no_grad()
def evaluate_branches(
    logits: Callable[[Tensor], list[Tensor]], batches: Iterable[Mapping[str, Tensor]], count: int
) -> list[Accuracy]:
    """As `evaluate`, of the first `count` branches of a model, and last of the mean of their probabilities."""
    counts = torch.zeros(count + 1, 4, dtype=torch.float64)
    for batch in batches:
        scores = [found.float().cpu() for found in logits(batch["images"])[:count]]
        scores.append(torch.stack([found.softmax(dim=-1) for found in scores]).mean(0))
        counts += torch.tensor([count_right(found, batch["labels"]) for found in scores], dtype=torch.float64)
    return [
        Accuracy(top1 / (images or 1), top5 / images if ranked else None, int(images))
        for top1, top5, images, ranked in all_sum(counts).tolist()
    ]
