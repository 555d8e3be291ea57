"""Models by name: ours, timm's, torchvision's or a user's own factory."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from raykd.errors import ModelError, near
from raykd.models.addresses import classifier_path
from raykd.models.zoo import builder, names


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A freshly initialised model whose output is `[b num_classes]`; its weights follow from `torch.manual_seed`.

    Args:
        name: one of `names()`, `wrn_<depth>_<width>`, `timm:<name>`, `torchvision:<name>`, or `package.module:factory`
            of your own, called as `factory(num_classes=..., **options)`.
        num_classes: number of classes.
        options: passed on to the architecture. `in_channels` works for all of ours and for timm.

    Raises:
        ModelError: unknown name or option, a builder that fails, a model with another number of classes.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ModelError(f"{name}: expected num_classes to be a positive int, got {num_classes!r}.")
    source, colon, rest = name.partition(":")
    if not colon:
        model = _ours(name, num_classes, options)
    elif source == "timm":
        model = _timm(rest, {"num_classes": num_classes, **options})
    elif source == "torchvision":
        model = _torchvision(rest, {"num_classes": num_classes, **options})
    else:
        model = _user(source, rest, num_classes, options)
    _check_classes(name, model, num_classes)
    return model


# What torchvision sets by itself as soon as published weights are asked for.
_WITH_WEIGHTS: dict[str, dict[str, Any]] = {
    "inception_v3": {"transform_input": True},
    "googlenet": {"transform_input": True, "aux_logits": False},
}


def check_published(name: str) -> None:
    """Refuses a name that is not a `timm:` or `torchvision:` model."""
    source, _, rest = name.partition(":")
    if source == "timm":
        _need_timm(rest)
    elif source == "torchvision":
        _need_torchvision(rest)
    else:
        raise ModelError(f"pretrained {name!r}: expected timm:<name> or torchvision:<name>. Others need a file of weights.")


def build_default(name: str) -> nn.Module:
    """A timm or torchvision model as its library makes it, with the classes its published weights have."""
    source, _, rest = name.partition(":")
    return _timm(rest, {}) if source == "timm" else _torchvision(rest, dict(_WITH_WEIGHTS.get(rest, {})))


def _ours(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    make = builder(name)
    if make is None:
        raise ModelError(f"model {name!r}: expected a known architecture, got none of that name. {_hint(name)}")
    return _call(name, make, num_classes, options)


def _hint(name: str) -> str:
    """What to write instead of an unknown bare name."""
    elsewhere = [f"timm:{name}"] if _timm_has(name) else []
    elsewhere += [f"torchvision:{name}"] if name in _torchvision_names() else []
    if elsewhere:
        return f"Write {' or '.join(elsewhere)}."
    return f"{near(name, names())} Others: timm:<name>, torchvision:<name>, package.module:factory."


def _call(name: str, make: Callable[..., Any], num_classes: int, options: Mapping[str, Any]) -> Any:
    """`make(num_classes=..., **options)`, its signature checked beforehand."""
    try:
        parameters = inspect.signature(make).parameters
        inspect.signature(make).bind(num_classes=num_classes, **options)
    except TypeError as error:
        valid = [p for p in parameters if p != "num_classes" and parameters[p].kind != inspect.Parameter.VAR_KEYWORD]
        unknown = [option for option in options if option not in parameters]
        if not unknown:
            raise ModelError(f"{name}: expected a factory called as factory(num_classes=..., ...): {error}.") from None
        raise ModelError(_unknown_option(name, unknown[0], valid)) from None
    except ValueError:  # a builtin without a signature: the call itself will tell
        pass
    return make(num_classes=num_classes, **options)


def _unknown_option(name: str, option: str, valid: list[str]) -> str:
    return f"{name}: expected an option among {', '.join(valid) or '(none)'}, got {option!r}. {near(option, valid)}"


def _timm_has(name: str) -> bool:
    import timm

    return bool(name) and timm.is_model(name)


def _need_timm(name: str) -> None:
    import timm

    if not _timm_has(name):
        raise ModelError(f"timm:{name}: expected a timm model, got none of that name. {near(name, timm.list_models())}")


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    _need_timm(name)
    _refuse_pretrained(f"timm:{name}", options)
    if "in_channels" in options:
        options["in_chans"] = options.pop("in_channels")
    return _guarded(f"timm:{name}", lambda **given: timm.create_model(name, **given), options)


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _need_torchvision(name: str) -> None:
    if name not in _torchvision_names():
        hint = near(name, _torchvision_names())
        raise ModelError(f"torchvision:{name}: expected a torchvision classifier, got none of that name. {hint}")


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    _need_torchvision(name)
    _refuse_pretrained(f"torchvision:{name}", options)
    if (channels := options.pop("in_channels", 3)) != 3:
        raise ModelError(f"torchvision:{name}: expected in_channels=3, got {channels}. Use timm:<name> or ours.")
    return _guarded(f"torchvision:{name}", lambda **given: torchvision.models.get_model(name, **given), options)


def _refuse_pretrained(name: str, options: Mapping[str, Any]) -> None:
    if options.get("pretrained") or options.get("weights"):
        raise ModelError(
            f"{name}: expected no weights here, got pretrained ones asked for. "
            f"Use raykd.models.pretrained({name!r}), or load_weights with a file."
        )


def _guarded(name: str, make: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """`make(**options)` with a library's errors told as ours."""
    try:
        return make(**options)
    except Exception as error:
        valid = _constructor_options(make)
        unknown = [option for option in options if valid and option not in valid and option != "num_classes"]
        if isinstance(error, TypeError) and unknown:
            raise ModelError(_unknown_option(name, unknown[0], valid)) from error
        raise ModelError(f"{name}: could not be built with {dict(options)}: {type(error).__name__}: {error}.") from error


def _constructor_options(make: Callable[..., nn.Module]) -> list[str]:
    """Option names of the class behind a library's model; empty if that cannot be told."""
    try:
        with torch.device("meta"):
            kind = type(make())
    except Exception:
        return []
    parameters = inspect.signature(kind.__init__).parameters.values()
    named = (p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
    return [name for name in named if name not in ("self", "num_classes")]


def _user(module_name: str, attribute: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    name = f"{module_name}:{attribute}"
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ModelError(
            f"model {name!r}: expected an importable module {module_name!r}, got {type(error).__name__}: {error}. "
            f"Known prefixes: timm, torchvision; else package.module:factory, importable where the model is built."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"model {name!r}: expected a callable in {module_name}, got none. {near(attribute, known)}")
    try:
        model = _call(name, factory, num_classes, options)
    except ModelError:
        raise
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"model {name!r}: expected the factory to return a model, got {type(error).__name__}: {error} "
            f"({line.filename}:{line.lineno}). Mend the factory, or the model's options."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r}: expected the factory to return a torch.nn.Module, got {type(model).__name__}.")
    return model


def _check_classes(name: str, model: nn.Module, num_classes: int) -> None:
    """Refuses a model whose classifier has another number of outputs.

    A model with no linear layer at the end is passed if any of its layers has that many outputs.
    """
    path = classifier_path(model)
    head = None if path is None else model.get_submodule(path)
    if head is not None and _outputs(head) == num_classes:
        return
    widths = [_outputs(module) for module in model.modules()]
    if any(width is not None for width in widths) and num_classes not in widths:
        got = next((width for width in (head and _outputs(head), *reversed(widths)) if width), None)
        raise ModelError(
            f"{name}: expected an output of {num_classes} classes, got {got} ({path or 'last layer'}). "
            f"Let the factory use its num_classes argument."
        )


def _outputs(module: nn.Module) -> int | None:
    width = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
    return width if isinstance(width, int) else None
