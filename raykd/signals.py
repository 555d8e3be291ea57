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
CLASSES = "teachers_classes"  # a list: the student's class of each class of each teacher, [c] int64
TIME = ("epoch", "step")
PLAIN_NAMES = (*FIELDS, "generator", *FACTS, CLASSES, *TIME)

# Views of a teacher's forward; raykd/models/<view>.py declares each, in a function of its name.
VIEWS = ("stochastic",)


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
    if role is None or name in PLAIN_NAMES:
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
    """One parameter of one loss, connected: for each model that feeds it, the signals in layer order (one unless plural).

    A parameter of a list role (`teachers_...`) is fed by several models, any other by one.
    """

    parameter: Parameter
    models: tuple[tuple[Signal, ...], ...]

    @property
    def signals(self) -> tuple[Signal, ...]:
        """All signals, each once."""
        return tuple(dict.fromkeys(s for signals in self.models for s in signals))

    def pick(self, answers: Any, of: Collection[int] | None = None) -> Any:
        """The value of this parameter: a tensor, a list over layers, and a list of either over models for a list role.

        Args:
            answers: the model's Signals; for a list role one of each model.
            of: places of the models that `answers` holds, where some have gone.
        """
        if self.parameter.role not in LIST_ROLES:
            return self._of(self.models[0], answers)
        models = self.models if of is None else [self.models[i] for i in of]
        return [self._of(signals, own) for signals, own in zip(models, answers)]

    def _of(self, signals: tuple[Signal, ...], answers: Signals) -> Any:
        values = [answers[s.key] for s in signals]
        return values if self.parameter.plural else values[0]


@dataclass(frozen=True)
class Aggregate:
    """Logits of several teachers as one: `parts/aggregators.py` says how.

    Attributes:
        how: name of the aggregator.
        teachers: whose, in order.
        weights: of each, not normalised.
        temperature: at which probabilities are combined.
        key: its name among the answers of a source.
    """

    how: str
    teachers: tuple[str, ...]
    weights: tuple[float, ...]
    temperature: float = 1.0

    @property
    def key(self) -> str:
        """`mean_probs(a,b|T=4.0)`."""
        shares = "" if len(set(self.weights)) == 1 else "|" + ",".join(f"{w:g}" for w in self.weights)
        return f"{self.how}({','.join(self.teachers)}|T={self.temperature}{shares})"


def wires(
    parameters: Collection[str],
    layers: Mapping[str, tuple[Any, ...]],
    options: Mapping[str, Any],
    derived: Mapping[str, Derived],
    views: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[Wire, ...]:
    """Connects a loss's parameters to signals.

    Args:
        parameters: the names before `*` in the loss's signature.
        layers: role -> the layers this loss reads of it; for a list role one such tuple a model.
        options: the loss's hyper-parameters; those that a derived signal or a view has too are bound to it.
        derived: the derived signals.
        views: the views of a teacher's forward, and the names of their options.

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
        models = layers.get(parameter.role, ())
        models = models if parameter.role in LIST_ROLES else (models,)
        found.append(Wire(parameter, tuple(_signals(parameter, names, options, derived, views or {}) for names in models)))
    return tuple(found)


def _signals(
    parameter: Parameter,
    names: tuple[str, ...],
    options: Mapping[str, Any],
    derived: Mapping[str, Derived],
    views: Mapping[str, tuple[str, ...]],
) -> tuple[Signal, ...]:
    kind = parameter.kind
    if parameter.view in VIEWS and parameter.role not in ("teacher", "teachers"):
        raise SignalError(f"{parameter.name}: expected the view {parameter.view} of a teacher, got it of {parameter.role}.")
    binding = [*(derived[kind].options if kind in derived else ()), *views.get(parameter.view or "", ())]
    bound = tuple((o, options[o]) for o in binding if o in options)
    if not takes_layer(kind, derived):
        return (Signal(kind, None, bound, parameter.view),)
    role = "teacher" if parameter.role == "teachers" else parameter.role
    if not names or (not parameter.plural and len(names) != 1):
        wanted = "at least one layer" if parameter.plural else "exactly one layer"
        raise SignalError(
            f"{parameter.name}: expected {wanted} of the {role}, got {list(names)}. Set `layers` of this loss, for example "
            f"layers=('stage2',) or layers={{'student': ('stage2',), 'teacher': ('stage3',)}}."
        )
    return tuple(Signal(kind, layer, bound, parameter.view) for layer in names)
