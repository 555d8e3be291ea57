"""Signals: named tensors that models yield for a batch, and the grammar of their names.

A loss says what it needs by the names of its parameters: `<role>_<signal>[s][_<view|head>]`.

    student_logits            one tensor, of the student
    teacher_attentions        the derived signal `attention` at each of the loss's layers: a list in layer order
    teachers_logits           one tensor for each teacher: a list in the job's order
    peer_logits_ema           of a neighbouring peer's averaged copy
    student_logits_branches   one tensor for each branch of the model: a list

Legend of axis letters, the whole project over: b samples, c classes or channels, d embedding dimensions, h rows, w columns,
l tokens, p positions, n samples of the data set, k negatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from raykd.errors import SignalError, near

ROLES = ("student", "teacher", "teachers", "peer", "peers", "ema", "previous")
LIST_ROLES = ("teachers", "peers")
SOURCES = {"teacher": "teachers", "teachers": "teachers", "peer": "peers", "peers": "peers"}  # role -> the job's room of it
BASE_KINDS = ("logits", "feature", "embedding", "input_grad", "norm")

REAL = ("real_images", "real_labels")  # beside images that are made: as many training images, floats in 0..1, their classes
MADE = ("targets", "normalised_images", *REAL)  # of images that are made: what the method drew for each; as data are normalised

# Values a loss may ask for beside signals: fields of the batch, keyed randomness, facts of the training set, time.
FIELDS = ("images", "labels", "sample_index", "mask", "latents", *MADE)
FACTS = ("num_samples", "num_classes", "dataset_labels")
CLASSES = "teachers_classes"  # a list: the student's class of each class of each teacher, [c] int64
CLASSIFIER = "teacher_classifier"  # [c d], weights of the teacher's last linear layer; where images are made, asked for once
BLOCKS, TAILS = "student_blocks", "teacher_tails"  # parts of the networks at the loss's layers; a Module is built with them
TIME = ("epoch", "step")
PLAIN_NAMES = (*FIELDS, "generator", *FACTS, CLASSES, CLASSIFIER, BLOCKS, TAILS, *TIME)

# Views of a teacher's forward; raykd/models/<view>.py declares each, in a function of its name.
VIEWS = ("stochastic",)
ROTATIONS, EMA, BRANCHES = "rotations", "ema", "branches"  # of any model: turned inputs, its averaged copy, all its branches
LOCAL = "local"  # of images that are made: a part of each, enlarged; what images minimise may read it
SUFFIXES = (BRANCHES, ROTATIONS, *VIEWS, EMA, LOCAL)  # in the order in which a name has them


@dataclass(frozen=True)
class Parameter:
    """One parameter of a loss, parsed: whose signal, which kind, over all layers (`plural`), of all branches, of which view."""

    name: str
    role: str
    kind: str
    plural: bool = False
    view: str | None = None
    branches: bool = False


@dataclass(frozen=True)
class Signal:
    """What one model is asked for: a kind, at a layer (None for logits and embedding), with a derived signal's options."""

    kind: str
    layer: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    view: str | None = None
    branch: int = 0
    key: str = field(init=False, compare=False)

    @property
    def views(self) -> tuple[str, ...]:
        """The parts of its view."""
        return tuple(self.view.split("_")) if self.view else ()

    def without(self, view: str) -> Signal:
        """The same signal without this part of its view."""
        return dataclasses.replace(self, view="_".join(v for v in self.views if v != view) or None)

    def __post_init__(self) -> None:
        text = self.kind + (f"@{self.layer}" if self.layer else "")
        if self.options:
            text += "(" + ",".join(f"{name}={value}" for name, value in self.options) + ")"
        text += f"|{self.view}" if self.view else ""
        object.__setattr__(self, "key", text + (f"#{self.branch}" if self.branch else ""))


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
            named, _, tail = rest.partition(stem + "_")
            if (plural and kind == "logits") or not (rest == stem or (tail and not named)):
                continue
            views = tail.split("_") if tail else []
            if list(views) != [suffix for suffix in SUFFIXES if suffix in views]:
                raise SignalError(
                    f"Parameter {name!r}: expected a view of {', '.join(SUFFIXES)} (several in this order), got {tail!r}. "
                    f"{near(tail, SUFFIXES)}"
                )
            seen = [view for view in views if view != BRANCHES]
            return Parameter(name, role, kind, plural, "_".join(seen) or None, BRANCHES in views)
    raise SignalError(f"Signal {rest!r} of parameter {name!r}: expected one of {', '.join(kinds)}. {near(rest, kinds)}")


def takes_layer(kind: str, derived: Mapping[str, Derived]) -> bool:
    """Whether a kind is tapped at a layer of the job's choice: `feature` and what derives from it."""
    while kind in derived:
        kind = derived[kind].parent
    return kind == "feature"


def is_norm(kind: str, derived: Mapping[str, Derived]) -> bool:
    """Whether a kind is tapped at batch norms: statistics `[4 c]` of the batch and of the model, at all of them in turn."""
    while kind in derived:
        kind = derived[kind].parent
    return kind == "norm"


def entering(layer: str) -> str:
    """The input side of a layer, by name: `bn1` to `bn1:in`, `bn1#2` to `bn1:in#2`."""
    path, mark, call = layer.partition("#")
    return f"{path}:in{mark}{call}"


@dataclass(frozen=True)
class Wire:
    """One parameter of one loss, connected: for each model that feeds it, the signals of each branch in layer order (one branch
    unless it asks for all, one signal unless plural).

    A parameter of a list role (`teachers_...`) is fed by several models, any other by one.
    """

    parameter: Parameter
    models: tuple[tuple[tuple[Signal, ...], ...], ...]

    @property
    def signals(self) -> tuple[Signal, ...]:
        """All signals, each once."""
        return tuple(dict.fromkeys(s for place in range(len(self.models)) for s in self.of(place)))

    def of(self, place: int) -> tuple[Signal, ...]:
        """The signals of one model."""
        return tuple(s for signals in self.models[place] for s in signals)

    def pick(self, answers: Any, of: Collection[int] | None = None) -> Any:
        """The value of this parameter: a tensor, a list over layers, a list of either over branches, and a list of any of these
        over models for a list role.

        Args:
            answers: the model's Signals; for a list role one of each model.
            of: places of the models that `answers` holds, where some have gone.
        """
        if self.parameter.role not in LIST_ROLES:
            return self._value(self.models[0], answers)
        models = self.models if of is None else [self.models[i] for i in of]
        return [self._value(branches, own) for branches, own in zip(models, answers)]

    def _value(self, branches: tuple[tuple[Signal, ...], ...], answers: Signals) -> Any:
        found = []
        for signals in branches:
            values = [answers[s.key] for s in signals]
            found.append(values if self.parameter.plural else values[0])
        return found if self.parameter.branches else found[0]


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
    branches: Mapping[str, Any] | None = None,
    norms: Mapping[str, tuple[Any, ...]] | None = None,
) -> tuple[Wire, ...]:
    """Connects a loss's parameters to signals.

    Args:
        parameters: the names before `*` in the loss's signature.
        layers: role -> the layers this loss reads of it; for a list role one such tuple a model.
        options: the loss's hyper-parameters; those that a derived signal or a view has too are bound to it.
        derived: the derived signals.
        views: the views of a teacher's forward, and the names of their options.
        branches: role -> how many branches its model has; for a list role one number a model; one where it is not said.
        norms: role -> all batch norms of its model, as `layers`; what a loss that reads `norm` gets.

    Raises:
        SignalError: an unknown name, a singular signal with more or fewer than one layer, or a model without batch norm.
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
        layered = (norms or {}) if is_norm(parameter.kind, derived) else layers
        models, counts = layered.get(parameter.role, ()), (branches or {}).get(parameter.role, 1)
        if parameter.role not in LIST_ROLES:
            models, counts = (models,), (counts,)
        elif isinstance(counts, int):
            counts = (counts,) * len(models)
        asked = (_signals(parameter, names, options, derived, views or {}) for names in models)
        wired = tuple(_of_branches(signals, count, parameter) for signals, count in zip(asked, counts))
        found.append(Wire(parameter, wired))
    return tuple(found)


def _of_branches(signals: tuple[Signal, ...], count: int, parameter: Parameter) -> tuple[tuple[Signal, ...], ...]:
    if not parameter.branches:
        return (signals,)
    return tuple(tuple(dataclasses.replace(s, branch=i) for s in signals) for i in range(count))


def _signals(
    parameter: Parameter,
    names: tuple[str, ...],
    options: Mapping[str, Any],
    derived: Mapping[str, Derived],
    views: Mapping[str, tuple[str, ...]],
) -> tuple[Signal, ...]:
    kind, seen = parameter.kind, (parameter.view or "").split("_")
    for view, roles in ((v, ("teacher", "teachers")) for v in VIEWS if v in seen):
        if parameter.role not in roles:
            raise SignalError(f"{parameter.name}: expected the view {view} of a teacher, got it of {parameter.role}.")
    if EMA in seen and parameter.role not in ("peer", "peers"):
        raise SignalError(f"{parameter.name}: expected the view {EMA} of peers; the student's own copy is the role `ema`.")
    binding = [*(derived[kind].options if kind in derived else ()), *(o for v in seen for o in views.get(v, ()))]
    bound = tuple((o, options[o]) for o in binding if o in options)
    role = parameter.role.rstrip("s")
    if is_norm(kind, derived):
        if not names or (not parameter.plural and len(names) != 1):
            wanted = "at least one batch norm" if parameter.plural else "exactly one batch norm"
            raise SignalError(
                f"{parameter.name}: expected a {role} with {wanted} that keeps running statistics, got {len(names)}. "
                "Choose another model, or a loss that does not read them."
            )
    elif not takes_layer(kind, derived):
        return (Signal(kind, None, bound, parameter.view),)
    elif not names or (not parameter.plural and len(names) != 1):
        wanted = "at least one layer" if parameter.plural else "exactly one layer"
        raise SignalError(
            f"{parameter.name}: expected {wanted} of the {role}, got {list(names)}. Set `layers` of this loss, for example "
            f"layers=('stage2',) or layers={{'student': ('stage2',), 'teacher': ('stage3',)}}."
        )
    return tuple(Signal(kind, layer, bound, parameter.view) for layer in names)
