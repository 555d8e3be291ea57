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


@torch.no_grad()
def evaluate(logits: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Tensor]]) -> Accuracy:
    """Counts right answers over this worker's batches, summed over the workers.

    Args:
        logits: uint8 images `[b c h w]` -> `[b c]`; the model is in evaluation mode already.
        batches: with `images` and `labels` `[b]`.
    """
    counts = torch.zeros(3, dtype=torch.float64)
    classes = 0
    for batch in batches:
        scores = logits(batch["images"]).float().cpu()
        classes = scores.shape[-1]
        labels = batch["labels"]
        top = scores.topk(min(5, classes), dim=-1).indices
        right = top == labels[:, None]
        counts += torch.tensor([right[:, 0].sum(), right.any(dim=1).sum(), len(labels)], dtype=torch.float64)
    top1, top5, count = all_sum(counts).tolist()
    if not count:
        return Accuracy(0.0, None, 0)
    return Accuracy(top1 / count, top5 / count if classes > 5 else None, int(count))
