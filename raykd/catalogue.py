"""The catalogue of methods is the file system: `raykd/methods/<section>/<slug>.py`.

Files are read with `ast`: names, signals and options of every method are known without importing torch, so `raykd list` is
instant. There is no registry and importing a method has no side effect. A user's `package.module:my_loss` is read the same way.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from raykd.errors import ConfigError, near
from raykd.signals import BASE_KINDS, PLAIN_NAMES, REAL, SOURCES, VIEWS, Derived, Parameter, parse, takes_layer

PACKAGE = Path(__file__).parent
RESERVED = ("weight", "ce_weight", "schedule")
IMAGES_LOSS, IMAGES_CLASS = "images_loss", "Images"  # of a method that makes the images it learns from
HOOKS = ("prepare", "before_forward", "after_forward", "step", "on_epoch", "targets", "critics", "views", "stages")


class REQUIRED:  # a class, so that it is the same object after a pickle's journey
    """Default of an option that has none."""


@dataclass(frozen=True)
class Option:
    """A hyper-parameter: its name, annotation as written, and default (REQUIRED if it has none)."""

    name: str
    annotation: str
    default: Any


@dataclass(frozen=True)
class Method:
    """One method as its file declares it; nothing is imported until `loss()` or `module_class()` is called."""

    slug: str
    name: str
    paper: str
    section: str
    scheme: str
    layers: tuple[str, ...]
    sparse: bool
    branching: Mapping[str, Any]
    synthesis: Mapping[str, Any]
    parameters: tuple[str, ...]
    options: Mapping[str, Option]
    build_parameters: tuple[str, ...]
    hooks: tuple[str, ...]
    trains: bool
    path: Path
    module: str
    attribute: str
    accepts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    images: Method | None = None  # what made images minimise: `images_loss`, or class Images, of the same file
    judged: tuple[str, ...] = ()  # what the hook `critics` of made images is called with

    @property
    def teacher_role(self) -> str | None:
        """`teacher` (`peer`) if the loss is of one of them, `teachers` (`peers`) if it takes lists of several, None if it
        listens to nobody.

        Raises:
            ConfigError: it names several.
        """
        roles = sorted(self.roles & set(SOURCES))
        if len(roles) > 1:
            raise ConfigError(f"Method {self.slug!r}: expected signals of one of {', '.join(SOURCES)}, got {', '.join(roles)}.")
        return roles[0] if roles else None

    @property
    def roles(self) -> set[str]:
        """The roles whose signals the loss reads."""
        return {p.role for p in self.signals}

    @property
    def signals(self) -> tuple[Parameter, ...]:
        """The parameters that are signals."""
        found = (parse(name, derived()) for name in self.parameters if name not in PLAIN_NAMES)
        return tuple(p for p in found if p is not None)

    @property
    def reads_real(self) -> bool:
        """Whether the images it makes are made beside training images."""
        return self.images is not None and any(name in REAL for name in (*self.images.parameters, *self.images.judged))

    def defaults(self) -> dict[str, Any]:
        """The options' defaults."""
        return {o.name: o.default for o in self.options.values() if o.default is not REQUIRED}

    def imported(self) -> ModuleType:
        """The method's Python module, imported now."""
        return importlib.import_module(self.module)

    def call(self) -> Callable[..., Any]:
        """The loss function, or the Module class where the method has one."""
        return getattr(self.imported(), self.trained if self.trains else self.attribute)

    @property
    def trained(self) -> str:
        """Name of the class of a method that trains or remembers something."""
        if ":" in self.slug:
            return self.attribute
        return IMAGES_CLASS if self.attribute == IMAGES_LOSS else "Module"


def methods() -> dict[str, Method]:
    """All methods, slug -> Method, in the order of the survey's sections."""
    found = [_read(slug, path) for slug, path in _files().items()]
    return {m.slug: m for m in sorted(found, key=lambda m: (m.section, m.slug))}


def method(name: str) -> Method:
    """Finds a method by slug (`kd-mse` and `kd_mse` are the same) or a user's `package.module:my_loss`.

    Raises:
        ConfigError: there is no such method, module or function.
    """
    if ":" in name:
        return _user_method(name)
    files = _files()
    slug = name.replace("_", "-")
    if slug not in files:
        raise ConfigError(f"Method {name!r}: no such method. {near(slug, files)} A loss of your own: 'package.module:my_loss'.")
    return _read(slug, files[slug])


@cache
def derived() -> dict[str, Derived]:
    """The derived signals of parts/derived.py: name -> parent and options."""
    found = {}
    for node in _derived_nodes():
        marks = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
        options = tuple(a.arg for a in node.args.kwonlyargs)
        found[node.name] = Derived(node.args.args[0].arg, options, "per_batch" in marks)
    return found


@cache
def _derived_nodes() -> list[ast.FunctionDef]:
    """Functions of parts/derived.py whose first parameter is a signal."""
    functions = [n for n in _syntax(PACKAGE / "parts" / "derived.py").body if isinstance(n, ast.FunctionDef)]
    return [n for n in functions if n.args.args and n.args.args[0].arg in BASE_KINDS and not n.name.startswith("_")]


@cache
def views() -> dict[str, tuple[str, ...]]:
    """The views of a teacher's forward: name -> names of their options."""
    return {name: tuple(a.arg for a in node.args.kwonlyargs) for name, node in _view_nodes().items()}


@cache
def _view_nodes() -> dict[str, ast.FunctionDef]:
    """The functions that declare views: `raykd/models/<view>.py` holds one of its name."""
    bodies = {view: _syntax(PACKAGE / "models" / f"{view}.py").body for view in VIEWS}
    return {v: n for v, body in bodies.items() for n in body if isinstance(n, ast.FunctionDef) and n.name == v}


def _files() -> dict[str, Path]:
    paths = sorted((PACKAGE / "methods").glob("*/*.py"))
    return {p.stem.replace("_", "-"): p for p in paths if not p.stem.startswith("_")}


@cache
def _read(slug: str, path: Path) -> Method:
    module = ".".join(("raykd", *path.relative_to(PACKAGE).with_suffix("").parts))
    return _parse(slug, path, module, slug.replace("-", "_") + "_loss")


def _user_method(name: str) -> Method:
    module, _, attribute = name.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"Method {name!r}: cannot import {module!r} ({error}). Is its folder on PYTHONPATH?") from None
    if spec is None or spec.origin is None:
        raise ConfigError(f"Method {name!r}: no Python module {module!r}. Is its folder on PYTHONPATH?")
    return _parse(name, Path(spec.origin), module, attribute)


def _parse(slug: str, path: Path, module: str, attribute: str, class_name: str = "Module") -> Method:
    tree = _syntax(path)
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    if attribute not in functions and attribute not in classes:
        raise ConfigError(f"Method {slug!r}: {path} has no {attribute!r}. {near(attribute, [*functions, *classes])}")
    constants = _constants(tree)
    module_class = classes.get(attribute) or (classes.get(class_name) if ":" not in slug else None)
    parts = {"loss": functions.get(attribute)}
    if module_class is not None:
        parts |= {n.name: n for n in module_class.body if isinstance(n, ast.FunctionDef) and n.name in ("__init__", "forward")}
    called = parts.get("forward") if module_class is not None else parts["loss"]
    if called is None:
        raise ConfigError(f"Method {slug!r}: class {module_class and module_class.name} in {path} has no forward().")
    images = None
    if attribute != IMAGES_LOSS and IMAGES_LOSS in functions and ":" not in slug:
        images = _parse(slug, path, module, IMAGES_LOSS, IMAGES_CLASS)
    layers = constants.get("LAYERS", ()) if _reads_layers(_positional(called)) else ()  # a file may hold several losses
    return Method(
        slug=slug,
        name=constants.get("NAME", attribute),
        paper=constants.get("PAPER", ""),
        section=str(constants.get("SECTION", "")),
        scheme=constants.get("SCHEME", "offline"),
        layers=(layers,) if isinstance(layers, str) else tuple(layers),
        sparse=bool(constants.get("SPARSE", False)),
        branching=constants.get("BRANCHING", {}),
        synthesis=constants.get("SYNTHESIS", {}),
        parameters=_positional(called),
        options=_merged_options(slug, [p for p in parts.values() if p is not None] + _derived_from(_positional(called)))
        | (dict(images.options) if images is not None else {}),
        build_parameters=_positional(init) if (init := parts.get("__init__")) is not None else (),
        hooks=tuple(h for h in HOOKS if h in functions),
        trains=module_class is not None,
        path=path,
        module=module,
        attribute=attribute,
        accepts={name: tuple(a.arg for a in node.args.kwonlyargs) for name, node in parts.items() if node is not None},
        images=images,
        judged=_positional(functions["critics"])[1:] if attribute == IMAGES_LOSS and "critics" in functions else (),
    )


def _derived_from(parameters: tuple[str, ...]) -> list[ast.FunctionDef]:
    """The derived signals and views among a loss's parameters: their options are options of the loss."""
    nodes = {node.name: node for node in _derived_nodes()}
    found = [parsed for p in parameters if p not in PLAIN_NAMES and (parsed := parse(p, nodes)) is not None]
    kinds = [nodes[kind] for kind in dict.fromkeys(p.kind for p in found) if kind in nodes]
    seen = dict.fromkeys(view for p in found for view in (p.view or "").split("_"))
    return kinds + [_view_nodes()[view] for view in seen if view in VIEWS]


def _reads_layers(parameters: tuple[str, ...]) -> bool:
    parsed = [parse(p, derived()) for p in parameters if p not in PLAIN_NAMES]
    return any(takes_layer(p.kind, derived()) for p in parsed if p is not None)


def _syntax(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"Method file {path}: cannot be read ({error}).") from None


def _constants(tree: ast.Module) -> dict[str, Any]:
    found = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper() and node.value is not None:  # type: ignore[attr-defined]
                with contextlib.suppress(ValueError):
                    found[target.id] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return found


def _positional(node: ast.FunctionDef) -> tuple[str, ...]:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    return tuple(n for n in names if n != "self")


def _merged_options(slug: str, nodes: list[ast.FunctionDef]) -> dict[str, Option]:
    options: dict[str, Option] = {}
    for node in nodes:
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults):
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            value = REQUIRED if default is None else _literal(slug, argument.arg, default)
            known = options.get(argument.arg)
            if known is None or (known.default is REQUIRED and value is not REQUIRED):
                options[argument.arg] = Option(argument.arg, annotation, value)
    return options


def _literal(slug: str, name: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ConfigError(f"Method {slug!r}, option {name!r}: expected a literal default, got {ast.unparse(node)}.") from None
