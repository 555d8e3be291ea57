"""What models with branches have in common; see raykd/models/branching.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from raykd.errors import ModelError, SignalError
from raykd.models.addresses import Layer, aliases, resolve

Make = Callable[..., nn.Module]
Shape = tuple[int, int, int]


class Branched(nn.Module):
    """What models with branches have in common.

    Attributes:
        plain: branch 0, the backbone as `make` built it, but for in-place activations: they are off where branches share.
        count: of branches.
        kind: "split", "exits", "heads" or "widths".
    """

    kind: ClassVar[str]
    count: int
    plain: nn.Module

    def __init__(self, plain: nn.Module, count: int, views: str) -> None:
        super().__init__()
        if views not in ("same", "own"):
            raise ModelError(f"branching {self.kind!r}: expected views 'same' or 'own', got {views!r}.")
        if not isinstance(count, int) or count < 2:
            raise ModelError(f"branching {self.kind!r}: expected a count of at least 2 branches, got {count!r}.")
        self.plain, self.count, self.own = plain, count, views == "own"

    def forward(self, images: Tensor, views: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Logits of every branch.

        Args:
            images: `[b c h w]`.
            views: one input a branch where each sees its own; all see `images` without.

        Returns:
            `count` tensors, `[b classes]` each (exits of several `classes` and heads: their own number).
        """
        if views is not None and (not self.own or len(views) != self.count):
            wanted = f"{self.count} views" if self.own else "no views without 'views': 'own' in the branching"
            raise ModelError(f"branching {self.kind!r}: expected {wanted}, got {len(views)}.")
        return self._answers([images] * self.count if views is None else list(views))

    def _answers(self, views: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def path(self, i: int, layer: str) -> str:
        """Where taps of this model find a layer of branch i, named as in the plain model: a module path, with `:in` and `#k`.

        What branch i shares with branch 0 is found there. `embedding` is not flattened, but for branch 0.

        Raises:
            ModelError: branch i has no layer of its own by that name.
            SignalError: nor has the plain model.
        """
        raise NotImplementedError

    def state_of(self, i: int) -> dict[str, Tensor]:
        """State dict of the plain model (of branch i's factory) that answers like branch i.

        Raises:
            ModelError: branch i is not a model by itself.
        """
        if i == 0:
            return self.plain.state_dict()
        self._check(i)
        raise ModelError(
            f"branch {i} of {self.kind!r}: expected a branch that is deployed by itself, got one that is not. Use 0."
        )

    def layer_aliases(self) -> dict[str, str]:
        """Aliases of branch 0, as `raykd.models.addresses` reads them."""
        found = {name: address for name, address in aliases(self.plain).items() if name != "logits"}
        return {name: f"plain.{address}" if address else "plain" for name, address in found.items()}

    def _check(self, i: int) -> None:
        if not 0 <= i < self.count:
            raise ModelError(f"branch {i}: expected one of 0 to {self.count - 1}, got {i}.")

    def _plain(self, layer: Layer, before: int, firings: int, in_all: int) -> str:
        """Address of a layer of the plain model.

        Args:
            layer: as resolved in the plain model.
            before: firings of its side that come first, in runs for other branches.
            firings: in the run that is meant.
            in_all: in a whole forward.
        """
        if not layer.path:
            address = "plain"
        elif layer.flat:
            address = "embedding"
        else:
            address = f"plain.{layer.path}" + (":in" if layer.side == "in" else "")
        several = layer.call is None and firings > 1  # the tap will say so
        return address if several or (layer.call is None and in_all <= 1) else f"{address}#{before + (layer.call or 1)}"


def layer_of(model: nn.Module, name: str) -> Layer:
    """What a layer name means in a model; ModelError where it has none of that name."""
    try:
        return resolve(model, name)
    except SignalError as error:
        raise ModelError(f"branching of {type(model).__name__}: {error}") from None


def switch_off_inplace(model: nn.Module) -> None:
    """From now on activations leave their inputs as they are."""
    for module in model.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
