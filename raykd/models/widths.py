"""The model itself at several widths; see raykd/models/branching.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raykd.errors import ModelError
from raykd.models.addresses import resolve
from raykd.models.replay import trace
from raykd.models.slimmable import check_slimmable, fits_by_rounding, grid, norms_at, slimmed, try_width
from raykd.models.structure import Branched, Make, Shape
from raykd.models.taps import logits_of


class Widths(Branched):
    """The model at several widths that share weights: branch 0 at all of it, 1 at the least, 2.. at widths drawn anew in each
    forward, multiples of 0.05 (MutualNet, Yang et al., arXiv:1909.12978; slimmable networks, arXiv:1812.08928).

    In training, branches above 0 see the images resized (bilinear) to a side of `resolutions`, one drawn for each. Draws are
    from torch's global generator. In evaluation nothing is resized, and branches 2.. have widths evenly between.

    Args:
        make, num_classes, shape: see `branched`.
        count: branches; MutualNet has 4.
        least: width of branch 1, in (0, 1).
        resolutions: sides in pixels, `()` for no resizing; 1, 7/8, 6/8 and 5/8 of the data's (MutualNet: 224, 192, 160, 128).
        views: "same" or "own".

    Raises:
        ModelError: the model does not run at such widths or resolutions.

    Note:
        Branches 0 and 1 have batch norms of their own, statistics and affine (switchable, arXiv:1812.08928). Drawn widths
        have the batch's statistics on this worker, in evaluation too, where papers recalibrate after the training, and the
        first of the full model's affine parameters. Channels are rounded to the nearest number, not to multiples of 8.
        Grouped convolutions keep the size of a group.
    """

    kind = "widths"

    def __init__(
        self,
        make: Make,
        num_classes: int,  # noqa: ARG002
        shape: Shape,
        *,
        count: int = 2,
        least: float = 0.25,
        resolutions: Sequence[int] | None = None,
        views: str = "same",
    ) -> None:
        super().__init__(make(), count, views)
        if not 0 < least < 1:
            raise ModelError(f"branching 'widths': expected least above 0 and below 1, got {least}.")
        sides = [shape[1] * k // 8 for k in (8, 7, 6, 5)] if resolutions is None else list(resolutions)
        if any(not isinstance(side, int) or side < 1 for side in sides):
            raise ModelError(f"branching 'widths': expected resolutions in pixels, got {resolutions!r}.")
        self.least, self.resolutions, self.grid = least, tuple(sides), tuple(grid(least))
        check_slimmable(self.plain)
        norms = norms_at(self.plain, least, shape)
        self._norm_paths = tuple(norms)
        self.norms = nn.ModuleList(norms.values())
        for width in self.grid if count > 2 and not fits_by_rounding(self.plain) else ():
            try_width(self.plain, width, shape)
        for side in self.resolutions:
            try_width(self.plain, least, (shape[0], *_resized(shape[1:], side)))
        self._trace = trace(self.plain, shape)

    def _answers(self, views: list[Tensor]) -> list[Tensor]:
        found = [logits_of(self.plain(views[0]))]
        for i, images in enumerate(views[1:], 1):
            width = self.least if i == 1 else self._width(i)
            with slimmed(self.plain, width, dict(zip(self._norm_paths, self.norms)) if i == 1 else None):  # type: ignore[arg-type]
                found.append(logits_of(self.plain(self._resize(images))))
        return found

    def _width(self, i: int) -> float:
        if self.training:
            return _pick(self.grid)
        return self.least + (1 - self.least) * (i - 1) / (self.count - 1)

    def _resize(self, images: Tensor) -> Tensor:
        if not self.training or not self.resolutions:
            return images
        size = _resized(images.shape[2:], _pick(self.resolutions))
        if tuple(images.shape[2:]) == size:
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def path(self, i: int, layer: str) -> str:
        """As of Branched; of branches above 0, `logits` alone."""
        self._check(i)
        found = resolve(self.plain, layer)
        if i == 0:
            each = self._trace.count((found.path, found.side))
            return self._plain(found, 0, each, self.count * each)
        if found.path:
            raise ModelError(f"branch {i} of 'widths': expected 'logits', got {layer!r}. Layers are those of branch 0.")
        return f"plain#{i + 1}"


def _pick(choices: Sequence[Any]) -> Any:
    return choices[int(torch.randint(len(choices), (), device="cpu"))]


def _resized(size: Sequence[int], side: int) -> tuple[int, int]:
    """(h, w) that is `side` high, of the same proportions."""
    return side, max(1, round(size[1] * side / size[0]))
