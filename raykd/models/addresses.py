"""Where a signal is tapped: layer names and what they mean in a given model.

    name      = (alias | module path) [":pre" | ":in"] ["#" call]
    alias     = "stem" | "stage1".. | "stage-1".. | "embedding" | "logits"

`stage-1` is the last stage; `embedding` is what the classifier receives, flattened to `[b d]`; `logits` is the
output of the model. A module path is that of `named_modules()` and means the module's output; `:in` its input.
Stages of our own models are post-activation and `stageN:pre` is the same before the last activation, where the
family has one (MobileNetV2 ends its stages linear; see each family's file). `#k` is the k-th firing (from 1) of a
module that runs more than once in a forward.

Aliases come from, first that applies: the model's own `layer_aliases()` (any model may have one: alias to address,
`"stage1": "layer1"`), timm's `feature_info`, submodules called layerN, stageN or blockN, the children of `stages`
or `blocks`, and for a `features` chain the last layer at each resolution. Else there are `embedding`, `logits` and
module paths only. An alias hides a submodule of the same name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from raykd.errors import ModelError, SignalError, near
from raykd.models.measure import trial_forward

_NUMBERED = re.compile(r"(layer|stage|block)(\d+)")
_STEMS = ("stem", "patch_embed", "conv_proj")


@dataclass(frozen=True)
class Layer:
    """A resolved layer name: which side of which module, which firing (None: the only one), flattened or not."""

    name: str
    path: str
    side: Literal["in", "out"]
    call: int | None
    flat: bool


def aliases(model: nn.Module) -> dict[str, str]:
    """Alias to address (`path` or `path:in`) in this model: stem, stage1.., embedding, logits."""
    if callable(own := getattr(model, "layer_aliases", None)):
        found = dict(own())
    else:
        stem, paths = _outline(model)
        found = {"stem": stem} if stem else {}
        found |= {f"stage{k}": path for k, path in enumerate(paths, 1)}
    if "embedding" not in found and (path := classifier_path(model)) is not None:
        found["embedding"] = f"{path}:in"
    return {**found, "logits": ""}


def stages(model: nn.Module) -> list[str]:
    """The stage aliases of a model, first to last: `["stage1", "stage2", ...]`; empty if it shows none."""
    found = (re.fullmatch(r"stage(\d+)", alias) for alias in aliases(model))
    return [f"stage{k}" for k in sorted(int(match[1]) for match in found if match)]


def layers(model: nn.Module) -> list[str]:
    """Every plain layer name of a model: its aliases, then all module paths that can fire."""
    known = list(aliases(model))
    return known + [path for path, module in model.named_modules() if path and path not in known and _fires(module)]


def resolve(model: nn.Module, layer: str) -> Layer:
    """What a layer name means in this model.

    Raises:
        SignalError: no such alias or module path.
    """
    return resolve_all(model, [layer])[0]


def resolve_all(model: nn.Module, names: list[str]) -> list[Layer]:
    """`resolve` for several names at once (finds the aliases once)."""
    known = aliases(model)
    modules = dict(model.named_modules())
    return [_resolve(name, known, modules, model) for name in names]


def _resolve(name: str, known: Mapping[str, str], modules: Mapping[str, nn.Module], model: nn.Module) -> Layer:
    text, _, number = name.partition("#")
    if "#" in name and not (number.isdigit() and int(number) >= 1):
        raise SignalError(f"layer {name!r}: expected a firing counted from 1 after '#', got {number!r}.")
    text = _from_the_end(text, known)
    if text in known:
        address = known[text]
    elif text.removesuffix(":in") in known:
        address = known[text.removesuffix(":in")].removesuffix(":in") + ":in"
    else:
        address = text
    path = address.removesuffix(":in")
    if path not in modules or not text:
        raise SignalError(
            f"layer {name!r}: expected an alias or module path of {_kind(model)}, found neither. {near(text, layers(model))}"
        )
    if not _fires(modules[path]):
        raise SignalError(
            f"layer {name!r}: expected a module that is called, got {_kind(modules[path])}, a container that never "
            f"fires. Name one of its children: {', '.join(f'{path}.{k}' for k, _ in modules[path].named_children())}."
        )
    side: Literal["in", "out"] = "in" if address.endswith(":in") else "out"
    return Layer(name, path, side, int(number) if number else None, text == "embedding")


def _from_the_end(text: str, known: Mapping[str, str]) -> str:
    """`stage-1` as the last stage's name, suffix kept; anything else as it is."""
    match = re.fullmatch(r"stage-(\d+)(:.*)?", text)
    if not match:
        return text
    count = sum(re.fullmatch(r"stage\d+", alias) is not None for alias in known)
    k = count + 1 - int(match[1])
    return f"stage{k}{match[2] or ''}" if 1 <= k <= count else text


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that makes the logits.

    Raises:
        ModelError: the model has none (a convolutional classifier, a feature extractor).
    """
    path = classifier_path(model)
    module = None if path is None else model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        got = "none" if module is None else f"{_kind(module)} ({path})"
        raise ModelError(f"classifier of {_kind(model)}: expected a linear layer, got {got}.")
    return module


def classifier_path(model: nn.Module) -> str | None:
    """Module path of the classifier: the model's word for it (`layer_aliases`, timm's `get_classifier`) or its
    last linear layer in order of registration; None if there is none."""
    if callable(own := getattr(model, "layer_aliases", None)) and (address := own().get("embedding")):
        return str(address).removesuffix(":in")
    named = list(model.named_modules())
    if callable(get := getattr(model, "get_classifier", None)):
        head = get()
        head = head[0] if isinstance(head, (tuple, list)) else head
        if found := [path for path, module in named if module is head and not isinstance(module, nn.Identity)]:
            return found[0]
        parts = [] if not isinstance(head, nn.Module) else list(head.modules())
        named = [(path, module) for path, module in named if any(module is part for part in parts)] or named
    linear = [path for path, module in named if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def _outline(model: nn.Module) -> tuple[str | None, list[str]]:
    """Module paths of the stem (or None) and of the stages of a model that does not name them itself."""
    children = dict(model.named_children())
    stem = next((name for name in _STEMS if name in children and _fires(children[name])), None)
    if "feature_info" in vars(model):
        return _timm_outline(model, stem)
    numbered = [name for name in children if _NUMBERED.fullmatch(name)]
    if len(numbered) >= 2:
        return stem or _torchvision_stem(children), numbered
    for container in ("stages", "blocks"):
        if isinstance(inside := children.get(container), (nn.Sequential, nn.ModuleList)):
            return stem, [f"{container}.{name}" for name, _ in inside.named_children()]
    if isinstance(features := children.get("features"), nn.Sequential):
        return stem, [f"features.{name}" for name in _ends_of_resolutions(model, features)]
    return stem, []


def _timm_outline(model: nn.Module, stem: str | None) -> tuple[str | None, list[str]]:
    """timm lists its features by module path; a first one that is named unlike the next is the stem's."""
    info: Any = model.feature_info
    modules = dict(model.named_modules())
    paths = [str(entry["module"]) for entry in list(info) if entry.get("module") in modules]
    if len(paths) >= 2 and re.sub(r"\d", "", paths[0]) != re.sub(r"\d", "", paths[1]):
        return paths[0], paths[1:]
    return stem or ("bn1" if "bn1" in modules else None), paths


def _torchvision_stem(children: Mapping[str, nn.Module]) -> str | None:
    return next((name for name in ("relu", "act1", "bn1") if name in children), None)


def _ends_of_resolutions(model: nn.Module, features: nn.Sequential) -> list[str]:
    """Names in a chain after which the image size changes; layers that only pool or normalise are passed over."""
    sizes: dict[str, int] = {}
    handles = []
    for name, module in features.named_children():
        if not re.search(r"Pool|Dropout|(Batch|Layer|Group)Norm", type(module).__name__):
            handles.append(module.register_forward_hook(_note_size(sizes, name)))
    try:
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        trial_forward(model, (first.in_channels if first else 3, 224, 224), "meta")
    except Exception:  # the model does not take such images; it shows no stages
        return []
    finally:
        for handle in handles:
            handle.remove()
    last_of_size = {size: name for name, size in sizes.items()}
    return list(last_of_size.values())


def _note_size(sizes: dict[str, int], name: str) -> Any:
    def note(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            sizes[name] = output.shape[2]

    return note


def _fires(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _kind(module: nn.Module) -> str:
    return type(module).__name__
