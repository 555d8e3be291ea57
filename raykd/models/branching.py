"""Models with branches, made of any backbone: branch 0 is the plain model, the others share a part of it.

    split    a trunk, and tails of one's own from a stage on
    exits    auxiliary classifiers on the way
    heads    a projection beside the classifier
    widths   the model itself, at fractions of its width

branched(make, {"kind": "split", "count": 3}, num_classes=10, shape=(3, 32, 32))(images)  # [[b 10], [b 10], [b 10]]

Parameters of branch 0 keep their names below `plain`, and `plain` is what is deployed; `state_of(i)` deploys another branch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from raykd.errors import ModelError, near
from raykd.models.exits import Exits, Heads
from raykd.models.splitting import Split
from raykd.models.structure import Branched, Make, Shape
from raykd.models.widths import Widths

__all__ = ["Branched", "branched"]

KINDS: dict[str, type[Split] | type[Exits] | type[Heads] | type[Widths]] = {
    "split": Split,
    "exits": Exits,
    "heads": Heads,
    "widths": Widths,
}


def branched(make: Make, spec: Mapping[str, Any], num_classes: int, shape: Shape) -> Branched:
    """A model with branches; on the meta device where `make` builds there.

    Args:
        make: the backbone's factory; called once a branch of `split`, else once. Weights are drawn from the global generator,
            branch after branch.
        spec: `kind` ("split", "exits", "heads", "widths"), and options: the keyword-only parameters of Split, Exits, Heads or
            Widths. None is the default; an option of another kind may be there with its default.
        num_classes: of the backbone.
        shape: (c, h, w) of its input.

    Raises:
        ModelError: an unknown kind or option, or a backbone that cannot have such branches.
    """
    given = {name: value for name, value in spec.items() if value is not None}
    kind = given.pop("kind", "none")
    if kind not in KINDS:
        raise ModelError(f"branching: expected a kind of {', '.join(KINDS)}, got {kind!r}. {near(str(kind), KINDS)}")
    known, others = (
        _options(KINDS[kind]),
        {name: default for every in KINDS.values() for name, default in _options(every).items()},
    )
    for name, value in given.items():
        idle = name in others and (value == others[name] or not (value or others[name]))
        if name not in known and not idle:
            got = f"{name}={value!r}"
            raise ModelError(f"branching {kind!r}: expected options of {', '.join(known)}, got {got}. {near(name, known)}")
    return KINDS[kind](make, num_classes, (shape[0], shape[1], shape[2]), **{k: v for k, v in given.items() if k in known})


def _options(structure: type[Branched]) -> dict[str, Any]:
    """Option -> default."""
    return {p.name: p.default for p in inspect.signature(structure).parameters.values() if p.kind is p.KEYWORD_ONLY}
