"""Taps: the tensors a model makes on its way from input to output, by layer name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raykd.errors import SignalError, near
from raykd.models.addresses import Layer, layers, resolve_all


class _Forward:
    """The latest forward of the tapped model. Submodules called outside of it (a method that borrows the classifier,
    recomputation in the backward) do not fire."""

    def __init__(self) -> None:
        self.running = False
        self.ran = False
        self.probes: dict[tuple[str, str], _Probe] = {}

    def clear(self) -> None:
        self.ran = False
        for probe in self.probes.values():
            probe.clear()

    def on_start(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        self.clear()
        self.running = self.ran = True

    def on_end(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self.running = False


class _Probe:
    """Keeps what passes one side of one module, by firing. Copies of a tapped model get one that keeps nothing."""

    def __init__(self, forward: _Forward, root: bool, copy: bool) -> None:
        self.forward = forward
        self.root = root
        self.copy = copy
        self.wanted: set[int] = set()
        self.clear()

    def clear(self) -> None:
        self.seen = 0
        self.kept: dict[int, tuple[Any, int | None]] = {}

    def on_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else next(iter(kwargs.values()), None))

    def on_output(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._keep(logits_of(output) if self.root else output)

    def _keep(self, value: Any) -> None:
        if not self.forward.running:
            return
        self.seen += 1
        if self.seen not in self.wanted:
            return
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        if self.copy and isinstance(value, Tensor):
            value = value.clone()
        self.kept[self.seen] = (value, _version(value))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "seen": 0, "kept": {}, "wanted": set()}


class Taps:
    """Captures named layers of a model while it runs.

    Example:
        >>> import torch
        >>> from raykd.models import Taps, build
        >>> model = build("cifar_resnet8", 10)
        >>> with Taps(model, ["stage-1", "embedding"]) as taps:
        ...     _ = model(torch.zeros(2, 3, 32, 32))
        ...     taps["stage-1"].shape, taps["embedding"].shape
        (torch.Size([2, 64, 8, 8]), torch.Size([2, 64]))

    Or without `with`: `open()`, forwards, `take()` after each, `close()`. What is held is of the latest forward:
    each call of the model itself starts afresh, `take()` lets go. Tensors are the model's own, graph included;
    nothing is detached. Only what fires within a call of the model counts. Names are explained in `raykd.models.addresses`.

    In-place activations would overwrite what was tapped. So unless `logits` alone is tapped, every module flag
    `inplace=True` in the model is switched off when Taps are made, and stays off: same values, a little more memory.
    In-place operations written in a `forward` (`out += x`) cannot be switched off; a tapped tensor changed by one is
    an error when read (not under `inference_mode`, where torch keeps no record). `copy=True` keeps copies instead.

    Args:
        model: the model itself, not a wrapper around it (DDP calls the model inside, so taps of that one work).
        names: layer names; repeats and several names of one module cost nothing.
        copy: keep copies of tapped tensors (gradients flow through them).

    Raises:
        SignalError: a name is neither alias nor module path of this model (at construction); a tap did not fire, fired
            several times, was changed in place or is no tensor (when read).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, copy: bool = False) -> None:
        self.model = model
        self._layers = {layer.name: layer for layer in resolve_all(model, list(dict.fromkeys(names)))}
        self._handles: list[RemovableHandle] = []
        self._forward = _Forward()
        probes = self._forward.probes
        for layer in self._layers.values():
            probe = probes.setdefault((layer.path, layer.side), _Probe(self._forward, not layer.path, copy))
            probe.wanted.add(layer.call or 1)
        if any(key != ("", "out") for key in probes):
            _switch_off_inplace(model)

    @property
    def names(self) -> list[str]:
        """The tapped names, in order."""
        return list(self._layers)

    def open(self) -> Taps:
        """Starts to listen. Opening twice is the same as once."""
        if self._handles:
            return self
        self._handles.append(self.model.register_forward_pre_hook(self._forward.on_start, prepend=True))
        for (path, side), probe in self._forward.probes.items():
            module = self.model.get_submodule(path)
            if side == "in":
                self._handles.append(module.register_forward_pre_hook(probe.on_input, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(probe.on_output))
        self._handles.append(self.model.register_forward_hook(self._forward.on_end, always_call=True))
        return self

    def close(self) -> None:
        """Stops listening and lets go of what is held."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forward.clear()

    def __enter__(self) -> Taps:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor at a tapped layer in the latest forward."""
        if name not in self._layers:
            raise SignalError(f"layer {name!r}: expected a tapped layer, got another. {near(name, self._layers)}")
        return self._read(self._layers[name])

    def take(self) -> dict[str, Tensor]:
        """All tapped tensors of the latest forward by name; lets go of them."""
        taken = {name: self._read(layer) for name, layer in self._layers.items()}
        self._forward.clear()
        return taken

    def _read(self, layer: Layer) -> Tensor:
        probe = self._forward.probes[layer.path, layer.side]
        if layer.call is None and probe.seen > 1:
            base, count = layer.name, probe.seen
            raise SignalError(
                f"layer {base!r}: expected one firing in a forward, got {count}. Choose one of {base}#1 ... {base}#{count}."
            )
        if (layer.call or 1) not in probe.kept:
            raise SignalError(self._silence(layer, probe.seen))
        value, version = probe.kept[layer.call or 1]
        if not isinstance(value, Tensor):
            raise SignalError(
                f"layer {layer.name!r}: expected a tensor, got {type(value).__name__}. Tap a module inside or after it."
            )
        if _version(value) != version:
            raise SignalError(
                f"layer {layer.name!r}: expected the values it had when it fired, but an in-place operation in the "
                f"model's forward changed them since. Tap another layer, or make the operation out of place."
            )
        return value.flatten(1) if layer.flat else value

    def _silence(self, layer: Layer, seen: int) -> str:
        head = f"layer {layer.name!r}: expected it to fire in the latest forward, "
        if not self._handles:
            return head + "but the taps are closed. Open them before the forward."
        if not self._forward.ran:
            return head + "but no forward has run since the taps were opened or taken. Call the model itself."
        if seen:
            return head + f"got {seen} firing(s). Choose one of {layer.name.partition('#')[0]}#1 ... #{seen}."
        return head + f"it never fired. Choose a layer that runs. {near(layer.name, layers(self.model))}"


def replace_output(model: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """From now on the model goes on with `change(output)` where layer `name` yields output, until the handle's `remove()`.

    Raises:
        SignalError: no such layer, or it names an input or one firing of several.
    """
    layer = resolve_all(model, [name])[0]
    if layer.side != "out" or layer.call is not None or not layer.path:
        raise SignalError(f"layer {name!r}: expected a layer whose output can be replaced. Name a stage or a module.")
    return model.get_submodule(layer.path).register_forward_hook(lambda _module, _args, output: change(output))


def _switch_off_inplace(model: nn.Module) -> None:
    for module in model.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]


def _version(value: Any) -> int | None:
    """A tensor's count of in-place changes; None where torch does not count."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def logits_of(output: Any) -> Any:
    """The logits in a model's output: the output, its entry or its field `logits`."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)
