"""Models as jobs describe them: built, loaded, normalised, tapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raykd import catalogue, models
from raykd.config import Branching, Network, Student
from raykd.data.keys import torch_generator
from raykd.data.normalise import Normalise
from raykd.errors import ModelError
from raykd.models.stochastic import check_options, skippable, stochastic, without
from raykd.parts.derived import derived_signals
from raykd.signals import ROTATIONS, VIEWS, Signal, Signals, entering

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Facts:
    """What models and losses may know of the training data."""

    num_samples: int
    num_classes: int
    shape: tuple[int, int, int]
    normalise: Any


def pick_device(wanted: str, gpus: float) -> torch.device:
    """`auto` is CUDA where the role reserved a GPU and there is one."""
    use_cuda = wanted == "cuda" or (wanted == "auto" and gpus > 0 and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def build(spec: Network, facts: Facts, device: torch.device | None = None) -> nn.Module:
    """Builds the model of a job's teacher or student, weights and all.

    Raises:
        ModelError: no such architecture, or the weights do not fit it.
    """
    if spec.weights == "pretrained":
        model, _ = models.pretrained(spec.model)
    else:
        model = structured(spec, facts)
        if spec.weights is not None:
            models.load_weights(plain(model), spec.weights, expect_sha256=spec.weights_sha256)
    if spec.dtype == "float64":
        model = model.double()
    model = model.to(device or "cpu")
    return model.to(memory_format=torch.channels_last) if spec.channels_last else model  # type: ignore[call-overload]


def own_dtype(spec: Network) -> torch.dtype:
    """Of what is trained beside a network: float64 where that computes so, else float32."""
    return torch.float64 if spec.dtype == "float64" else torch.float32


def structured(spec: Network, facts: Facts) -> nn.Module:
    """The model without weights from elsewhere, with its branches where it has several."""
    own = model_options(spec, facts)
    branching = branching_of(spec)
    if branching is None:
        return models.build(spec.model, facts.num_classes, **own)

    def make(**options: Any) -> nn.Module:
        return models.build(spec.model, facts.num_classes, **own | options)

    settings = {name: value for name, value in dataclasses.asdict(branching).items() if value is not None}
    return models.branched(make, settings, facts.num_classes, input_shape(spec, facts))


def branching_of(spec: Network) -> Branching | None:
    """How a model has several branches; None where it has one."""
    branching = spec.branching if isinstance(spec, Student) else None
    return None if branching is None or branching.kind in (None, "none") else branching


def plain(model: nn.Module) -> nn.Module:
    """The model that is deployed: branch 0 of one that has several."""
    return model.plain if isinstance(model, models.Branched) else model


def model_options(spec: Network, facts: Facts) -> dict[str, Any]:
    """Keyword arguments of the model's factory: the job's, and the number of input channels where it is not three."""
    options = dict(spec.options)
    if facts.shape[0] != 3:
        options.setdefault("in_chans" if spec.model.startswith("timm:") else "in_channels", facts.shape[0])
    return options


def input_shape(spec: Network, facts: Facts) -> tuple[int, int, int]:
    """(c, h, w) of the model's input."""
    return (facts.shape[0], *(spec.input_size or facts.shape[1:]))


class Tapped:
    """A model that answers with signals: tapped layers of its branches, and what is derived from them; a view is one more
    forward."""

    def __init__(self, spec: Network, model: nn.Module, signals: Iterable[Signal], facts: Facts, device: torch.device) -> None:
        self.model = model
        self.signals = tuple(dict.fromkeys(signals))
        self.device = device
        self.dtype = DTYPES[spec.dtype]
        self._known = catalogue.derived()
        self._functions = derived_signals()
        self._normalise = _normaliser(spec.normalise or facts.normalise, spec.input_size)
        self._channels_last = spec.channels_last
        self._addresses = {s: self._tap(s) for s in self.signals}
        layers = {layer for layer in self._addresses.values() if layer is not None}
        self._views = self._found_views(input_shape(spec, facts))
        self._taps = models.Taps(model, sorted(layers))
        self._taps.open()
        self._run = torch.compile(model) if spec.compile else model

    def __call__(
        self,
        images: Tensor,
        key: int | None = None,
        wanted: Iterable[Signal] | None = None,
        views: Iterable[Tensor] = (),
    ) -> Signals:
        """Signals of images `[b c h w]` by key; `logits` are there unless signals of views alone were asked for.

        Args:
            images: the batch; uint8, or floats in 0..1.
            key: of the batch: what a view draws follows from it; None leaves signals of views that draw out.
            wanted: some of the tapped signals; None: all.
            views: where each branch sees its own: the images of branches 1, 2, ...
        """
        asked = self.signals if wanted is None else tuple(wanted)
        inputs = self.inputs(images)
        found: Signals = {}
        turned = [s for s in asked if ROTATIONS in s.views]
        straight = [s for s in asked if s.view is None]
        drawn = {o: [s for s in every if s in asked] for o, every in self._views.items()} if key is not None else {}
        if straight or not (turned or any(drawn.values())):
            found = self._forward(self._run, inputs, straight, [self.inputs(view) for view in views])
        if turned:
            four = torch.cat([torch.rot90(inputs, quarter, (2, 3)) for quarter in range(4)])
            seen = self._forward(self._run, four, turned)
            found |= {s.key: seen[s.key].unflatten(0, (4, -1)).transpose(0, 1).contiguous() for s in turned}
        for options, signals in drawn.items():
            if not signals:
                continue
            blocks = stochastic(self._blocks, torch_generator(key or 0, "stochastic", str(options)), **dict(options))
            with without(self.model, blocks):
                seen = self._forward(self.model, inputs, signals)
            found |= {s.key: seen[s.key] for s in signals}
        return found

    def logits(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits `[b c]` of the plain model for images `[b c h w]`; `model`: of another of the same architecture."""
        whole = self._run if model is None and not isinstance(self.model, models.Branched) else None
        with self._precision():
            found: Tensor = (whole or plain(model or self.model))(self.inputs(images))
        return found

    def branches(self, images: Tensor, model: nn.Module | None = None) -> list[Tensor]:
        """Logits of every branch."""
        with self._precision():
            return list((model or self.model)(self.inputs(images)))

    def _forward(
        self, run: Callable[..., Any], inputs: Tensor, signals: Iterable[Signal], views: Sequence[Tensor] = ()
    ) -> Signals:
        with self._precision():
            if isinstance(self.model, models.Branched):
                logits = list(run(inputs, [inputs, *views]) if views else run(inputs))
            else:
                logits = [run(inputs)]
        tapped = self._taps.take()
        return {"logits": logits[0]} | {s.key: self._value(s.kind, s, logits, tapped) for s in signals}

    def _found_views(self, shape: tuple[int, int, int]) -> dict[tuple[tuple[str, Any], ...], list[Signal]]:
        """The options of each view that draws -> its signals; one forward answers them all."""
        found: dict[tuple[tuple[str, Any], ...], list[Signal]] = {}
        for signal in self.signals:
            for view in (v for v in signal.views if v in VIEWS):
                own = tuple((name, value) for name, value in signal.options if name in catalogue.views()[view])
                check_options(**dict(own))
                found.setdefault(own, []).append(signal)
        self._blocks = skippable(self.model, shape) if found else []
        return found

    def _precision(self) -> Any:
        if self.dtype != torch.bfloat16 or self.device.type == "meta":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def inputs(self, images: Tensor) -> Tensor:
        """Normalised input, in the model's size, dtype and memory format, of images `[b c h w]`.

        They are uint8, or floats in 0..1, to which gradients flow back.
        """
        dtype = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        inputs = self._normalise(images.to(self.device), dtype=dtype)
        return inputs.contiguous(memory_format=torch.channels_last) if self._channels_last else inputs

    def _tap(self, signal: Signal) -> str | None:
        kind = self._base(signal.kind)
        if not set(signal.views) <= {ROTATIONS, *VIEWS} or kind == "input_grad":
            raise ModelError(f"Signal {signal.key!r}: averaged copies, extra views and input gradients are not tapped here.")
        layer = {"feature": signal.layer, "embedding": "embedding", "norm": signal.layer and entering(signal.layer)}.get(kind)
        if layer is None or not isinstance(self.model, models.Branched):
            return layer
        return self.model.path(signal.branch, layer)

    def _base(self, kind: str) -> str:
        while kind in self._known:
            kind = self._known[kind].parent
        return kind

    def _value(self, kind: str, signal: Signal, logits: list[Tensor], tapped: Mapping[str, Tensor]) -> Tensor:
        if kind in self._known:
            parent = self._value(self._known[kind].parent, signal, logits, tapped)
            own = {name: value for name, value in signal.options if name in self._known[kind].options}
            return self._functions[kind](parent, **own)
        if kind == "logits":
            return logits[signal.branch]
        if kind == "classifier":
            return models.classifier(plain(self.model)).weight
        address = str(self._addresses[signal])
        found = tapped[address]
        if kind == "norm":
            return models.norm_statistics(self.model.get_submodule(models.resolve(self.model, address).path), found)
        return found.flatten(1) if kind == "embedding" else found

    def close(self) -> None:
        """Removes the hooks."""
        self._taps.close()


def _normaliser(stats: Any, size: tuple[int, int] | None) -> Normalise:
    """From a preset's name, or (mean, std)."""
    return Normalise.preset(stats, size) if isinstance(stats, str) else Normalise(stats[0], stats[1], size)
