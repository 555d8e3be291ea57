"""Signals: named tensors that models yield for a batch, and the grammar of their names.

A loss says what it needs by the names of its parameters: `<role>_<signal>[s][_<view|head>]`.

    student_logits            one tensor, of the student
    teacher_attentions        the derived signal `attention` at each of the loss's layers: a list in layer order
    teachers_logits           one tensor for each teacher: a list in the job's order
    student_logits_rot90      of an extra view, or of an auxiliary head

Legend of axis letters, the whole project over: b samples, c classes or channels, d embedding dimensions, h rows, w columns,
l tokens, p positions, n samples of the data set, k negatives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from raykd.errors import SignalError, near

ROLES = ("student", "teacher", "teachers", "peers", "ema", "previous")
LIST_ROLES = ("teachers", "peers")
BASE_KINDS = ("logits", "feature", "embedding", "input_grad")

# Values a loss may ask for beside signals: fields of the batch, keyed randomness, facts of the training set, time.
FIELDS = ("images", "labels", "sample_index", "mask")
FACTS = ("num_samples", "num_classes", "dataset_labels")
TIME = ("epoch", "step")
PLAIN_NAMES = (*FIELDS, "generator", *FACTS, *TIME)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a loss, parsed: whose signal, which kind, over all layers (`plural`), of which view or head."""

    name: str
    role: str
    kind: str
    plural: bool = False
    view: str | None = None


@dataclass(frozen=True)
class Signal:
    """What one model is asked for: a kind, at a layer (None for logits and embedding), with a derived signal's options."""

    kind: str
    layer: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    view: str | None = None
    key: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        text = self.kind + (f"@{self.layer}" if self.layer else "")
        if self.options:
            text += "(" + ",".join(f"{name}={value}" for name, value in self.options) + ")"
        object.__setattr__(self, "key", text + (f"|{self.view}" if self.view else ""))


Signals = dict[str, Any]
"""Answer of a source: Signal.key -> tensor with the batch axis first (per-batch signals: whatever they reduce to)."""


@dataclass(frozen=True)
class Derived:
    """A derived signal as parts/derived.py declares it: its parent kind and the names of its options."""

    parent: str
    options: tuple[str, ...] = ()
    per_batch: bool = False


def parse(name: str, derived: Collection[str] = ()) -> Parameter | None:
    """Parses a parameter name; None where it is no signal name at all (a field, a fact, or a mistake).

    Args:
        name: the parameter, for example `teacher_features`.
        derived: names of the derived signals.

    Raises:
        SignalError: the role is right and the signal is unknown.
    """
    role = next((r for r in sorted(ROLES, key=len, reverse=True) if name.startswith(r + "_")), None)
    if role is None:
        return None
    rest = name[len(role) + 1 :]
    kinds = (*BASE_KINDS, *derived)
    for kind in sorted(kinds, key=len, reverse=True):
        for plural in (True, False):
            stem = kind + "s" if plural else kind
            named, _, view = rest.partition(stem + "_")
            if (plural and kind == "logits") or not (rest == stem or (view and not named)):
                continue
            return Parameter(name, role, kind, plural, view or None)
    raise SignalError(f"Signal {rest!r} of parameter {name!r}: expected one of {', '.join(kinds)}. {near(rest, kinds)}")


def takes_layer(kind: str, derived: Mapping[str, Derived]) -> bool:
    """Whether a kind is tapped at a layer of the job's choice: `feature` and what derives from it."""
    while kind in derived:
        kind = derived[kind].parent
    return kind == "feature"


@dataclass(frozen=True)
class Wire:
    """One parameter of one loss, connected: the signals that feed it, in order (one unless the name is plural)."""

    parameter: Parameter
    signals: tuple[Signal, ...]

    def pick(self, signals: Signals) -> Any:
        """The value of this parameter out of one model's signals: a tensor, or a list over layers."""
        values = [signals[s.key] for s in self.signals]
        return values if self.parameter.plural else values[0]


def wires(
    parameters: Collection[str],
    layers: Mapping[str, tuple[str, ...]],
    options: Mapping[str, Any],
    derived: Mapping[str, Derived],
) -> tuple[Wire, ...]:
    """Connects a loss's parameters to signals.

    Args:
        parameters: the names before `*` in the loss's signature.
        layers: role -> the layers this loss reads of that role.
        options: the loss's hyper-parameters; those that a derived signal has too are bound to it.
        derived: the derived signals.

    Raises:
        SignalError: an unknown name, or a singular signal with more or fewer than one layer.
    """
    found = []
    for name in parameters:
        if name in PLAIN_NAMES:
            continue
        parameter = parse(name, derived)
        if parameter is None:
            raise SignalError(
                f"Parameter {name!r}: expected <role>_<signal> with a role of {', '.join(ROLES)}, or one of "
                f"{', '.join(PLAIN_NAMES)}. {near(name, PLAIN_NAMES)} Hyper-parameters stand after `*`."
            )
        found.append(Wire(parameter, _signals(parameter, layers, options, derived)))
    return tuple(found)


def _signals(
    parameter: Parameter,
    layers: Mapping[str, tuple[str, ...]],
    options: Mapping[str, Any],
    derived: Mapping[str, Derived],
) -> tuple[Signal, ...]:
    kind = parameter.kind
    bound: tuple[tuple[str, Any], ...] = ()
    if kind in derived:
        bound = tuple((o, options[o]) for o in derived[kind].options if o in options)
    if not takes_layer(kind, derived):
        return (Signal(kind, None, bound, parameter.view),)
    role = "teacher" if parameter.role == "teachers" else parameter.role
    names = layers.get(role, ())
    if not names or (not parameter.plural and len(names) != 1):
        wanted = "at least one layer" if parameter.plural else "exactly one layer"
        raise SignalError(
            f"{parameter.name}: expected {wanted} of the {role}, got {list(names)}. Set `layers` of this loss, for example "
            f"layers=('stage2',) or layers={{'student': ('stage2',), 'teacher': ('stage3',)}}."
        )
    return tuple(Signal(kind, layer, bound, parameter.view) for layer in names)
