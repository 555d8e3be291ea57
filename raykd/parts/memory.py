"""Memory over the training set: banks with one row a sample, and negatives drawn from them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import DataError
from raykd.parts.parallel import gather


def uniform_bank(rows: int, width: int) -> Float[Tensor, "n d"]:
    """Rows drawn uniformly from +-sqrt(3 / width): of length about 1."""
    bound = (3.0 / width) ** 0.5
    return torch.empty(rows, width).uniform_(-bound, bound)


def bank_scores(anchor: Float[Tensor, "b d"], bank: Float[Tensor, "n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Inner products of each anchor with its own rows of the bank.

    Works on a copy of the rows, because a memory is updated before the backward pass; of the whole bank where that is
    the smaller copy.
    """
    if len(bank) <= index.numel():
        return (anchor @ bank.clone().T).gather(1, index)
    return torch.einsum("bd,bkd->bk", anchor, bank[index])


@torch.no_grad()
def blend_rows(bank: Float[Tensor, "n d"], index: Int[Tensor, "b"], rows: Float[Tensor, "b d"], momentum: float) -> None:
    """Moves the rows at `index` towards `rows`, back on the unit sphere, in place and alike on all ranks.

    A row becomes normalised(momentum * old + (1 - momentum) * new). If a sample occurs twice, its last occurrence counts.
    """
    index, rows = gather(index), gather(rows)
    unique, owner = index.unique(return_inverse=True)
    last = torch.zeros_like(unique).scatter_reduce(0, owner, torch.arange(len(index), device=index.device), "amax")
    bank[unique] = F.normalize(momentum * bank[unique] + (1 - momentum) * rows[last].to(bank.dtype), dim=1)


class OtherClasses(nn.Module):
    """Draws samples of any class but one's own, uniformly and with replacement, from an index sorted by class.

    Buffers: `order` [n] sample indices sorted by class, `start` and `count` [num_classes]: where a class lies in it.
    """

    order: Tensor
    start: Tensor
    count: Tensor

    def __init__(self, num_samples: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("start", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    def fit(self, dataset_labels: Int[Tensor, "n"]) -> None:
        """Builds the index.

        Raises:
            DataError: All samples are of one class.
        """
        count = torch.bincount(dataset_labels, minlength=len(self.count))
        if len(dataset_labels) != len(self.order) or len(count) != len(self.count):
            raise DataError(
                f"dataset_labels: expected {len(self.order)} labels below {len(self.count)}, got {len(dataset_labels)} "
                f"below {len(count)} (negatives). Check num_samples and num_classes."
            )
        if int(count.max()) == len(dataset_labels):
            raise DataError("dataset_labels: expected at least 2 classes, got 1 (negatives). Negatives are of other classes.")
        self.order.copy_(dataset_labels.argsort(stable=True))
        self.count.copy_(count)
        self.start.copy_(count.cumsum(0) - count)

    def draw(self, labels: Int[Tensor, "b"], num: int, generator: torch.Generator) -> Int[Tensor, "b k"]:
        """`num` sample indices for each label, none of its class; the same on every device."""
        uniform = torch.rand(len(labels), num, generator=generator, dtype=torch.float64).to(self.order.device)
        start, count = self.start[labels, None], self.count[labels, None]
        place = (uniform * (len(self.order) - count)).long()  # a place among the others ...
        return self.order[place + count * (place >= start)]  # ... that steps over the own class
