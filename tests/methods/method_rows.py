"""What the battery needs to know of methods and rows, found by their files; no raykd.catalogue, which has its own tests."""

import importlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args, get_origin

import numpy as np
import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def files(folder: Path) -> dict[str, Path]:
    """slug -> file of every `<section>/<slug>.py`."""
    return {path.stem.replace("_", "-"): path for path in sorted(folder.glob("*/*.py")) if path.stem != "__init__"}


METHODS = files(REPOSITORY / "raykd" / "methods")
ROWS = files(HERE / "rows")


IMAGES = ":images"  # after a slug: what the images minimise that the method makes


def load_method(slug: str) -> ModuleType:
    path = METHODS[slug.removesuffix(IMAGES)]
    return importlib.import_module(f"raykd.methods.{path.parent.name}.{path.stem}")


def load_row(slug: str) -> Any:
    path = ROWS[slug.removesuffix(IMAGES)]
    spec = importlib.util.spec_from_file_location(f"row_{path.stem}", path)
    row = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(row)
    return of_images(row) if slug.endswith(IMAGES) else row


def of_images(row: ModuleType) -> SimpleNamespace:
    """The members of a row that are of `images_loss`, named as those of a loss."""
    found = {n.lower().removeprefix("images_"): v for n, v in vars(row).items() if n.lower().startswith("images_")}
    return SimpleNamespace(**found, OPTIONS=found.get("options", []))


def loss_of(slug: str):
    return getattr(load_method(slug), "images_loss" if slug.endswith(IMAGES) else f"{slug.replace('-', '_')}_loss")


class Draws:
    """What a row's reference gets for `generator`: the numbers that torch draws from a generator of the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, below: int, shape: tuple[int, ...]) -> np.ndarray:
        """torch.randint"""
        return torch.randint(below, shape, generator=self.generator).numpy()

    def choice(self, weights: list[float], count: int) -> list[int]:
        """torch.multinomial, with replacement"""
        weights = torch.tensor(weights, dtype=torch.float64)
        return torch.multinomial(weights, count, replacement=True, generator=self.generator).tolist()


def to_torch(value: Any) -> Any:
    """NumPy arrays as tensors of the same type, lists and lists of lists entry by entry; a seed as its generator."""
    if isinstance(value, dict):
        return {name: seeded(entry) if name == "generator" else to_torch(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [to_torch(entry) for entry in value]
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def seeded(seed: Any) -> torch.Generator:
    """A fresh generator of a seed, or of another generator's."""
    return torch.Generator().manual_seed(seed.initial_seed() if isinstance(seed, torch.Generator) else seed)


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a generator that nothing was drawn from."""
    return inputs | {"generator": seeded(inputs["generator"])} if "generator" in inputs else inputs


def for_reference(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as a row's reference takes them."""
    return inputs | {"generator": Draws(inputs["generator"])} if "generator" in inputs else inputs


def each(fn, value: Any) -> Any:
    """`fn` on a tensor or on every entry of a list, however deep; what is no tensor stays."""
    if isinstance(value, list):
        return [each(fn, entry) for entry in value]
    return fn(value) if isinstance(value, torch.Tensor) else value


def leaves_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a value, in order."""
    return [leaf for entry in value for leaf in leaves_of(entry)] if isinstance(value, list) else [value]


def with_leaves(value: Any, leaves: list[torch.Tensor]) -> Any:
    """A value of the same form made of the first of `leaves`, which are taken away."""
    return [with_leaves(entry, leaves) for entry in value] if isinstance(value, list) else leaves.pop(0)


def terms(value: Any) -> dict[str, Any]:
    """A loss's value as a dict of terms."""
    return value if isinstance(value, dict) else {"": value}


def total(value: Any) -> torch.Tensor:
    """One number, as the learner reduces it."""
    return sum(term.mean() for term in terms(value).values())


def axes_of(loss) -> dict[str, list[str]]:
    """Axes of each signal as its annotation names them; none for a number or a generator."""
    found = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            annotation = parameter.annotation
            while get_origin(annotation) is list:
                (annotation,) = get_args(annotation)
            assert not isinstance(annotation, str), f"{name}: annotations must not be strings"
            found[name] = annotation.dim_str.split() if hasattr(annotation, "dim_str") else []
    return found


def axis_numbers(axes: list[str], letter: str, ndim: int) -> list[int]:
    """Where a letter stands among the axes of a tensor; axes after a starred one count from the end."""
    starred = next((i for i, axis in enumerate(axes) if axis.startswith("*")), len(axes))
    return [i if i < starred else ndim - len(axes) + i for i, axis in enumerate(axes) if axis == letter]


def take(value: Any, axes: list[str], letter: str, index: torch.Tensor) -> Any:
    """Picks and orders entries along every axis called `letter`."""

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        for axis in axis_numbers(axes, letter, tensor.ndim):
            tensor = tensor.index_select(axis, index)
        return tensor

    return each(pick, value)
