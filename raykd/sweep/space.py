"""A search space: job path -> one of Ray Tune's distributions, a `tune.grid_search`, or a plain value.

    {"losses.kd.temperature": tune.loguniform(1, 16), "losses.kd.method": tune.choice(["kd", "dkd"])}

Trials of a random or grid search are drawn here, before anything starts, from draws keyed by the job's seed: a sweep that was
killed and resumed has the same trials, whatever it had written by then.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer

from raykd.data.keys import derive
from raykd.errors import ConfigError
from raykd.resolve import to_dict

GRID = "grid_search"
DRAWS = 64  # from a distribution without bounds, to see how far it goes
Space = Mapping[str, Any]
Settings = dict[str, Any]


def as_space(found: Any, where: str) -> dict[str, Any]:
    """A space as plain data: whole losses become mappings; outer paths come before the paths inside them.

    Raises:
        ConfigError: not a mapping of paths, or an empty one.
    """
    if not isinstance(found, Mapping) or not all(isinstance(path, str) for path in found):
        raise ConfigError(
            f"{where}: expected a mapping from job paths to distributions, got {type(found).__name__}. "
            'End it with `return {"losses.kd.temperature": tune.loguniform(1, 16)}`.'
        )
    if not found:
        raise ConfigError(f"{where}: expected at least one path, got none. Add one, for example 'losses.kd.weight'.")
    return {path: _plain(found[path]) for path in sorted(found, key=lambda path: path.count("."))}


def _plain(domain: Any) -> Any:
    if is_grid(domain):
        return {GRID: [to_dict(value) for value in domain[GRID]]}
    if isinstance(domain, Categorical):
        domain.categories = [to_dict(value) for value in domain.categories]
        return domain
    return domain if isinstance(domain, Domain) else to_dict(domain)


def is_grid(domain: Any) -> bool:
    """Whether this is a `tune.grid_search([...])`."""
    return isinstance(domain, Mapping) and set(domain) == {GRID}


def finite(domain: Any) -> list[Any] | None:
    """All values of a domain that has few: a grid, a choice, a plain value; else None."""
    if is_grid(domain):
        return list(domain[GRID])
    if isinstance(domain, Categorical):
        return list(domain.categories)
    return None if isinstance(domain, Domain) else [domain]


def extremes(domain: Any) -> list[Any]:
    """Values that stand for all of a domain: every one of a finite one, else the least and the greatest."""
    values = finite(domain)
    if values is not None:
        return values
    if _ends(domain):
        high = domain.upper - 1 if isinstance(domain, Integer) else domain.upper
        return [domain.cast(domain.lower), domain.cast(high)]
    if isinstance(domain, Function):
        return []  # rests on other settings: the drawn trials are looked at instead
    drawn = sorted(float(v) for v in domain.sample(size=DRAWS, random_state=np.random.default_rng(0)))
    return [drawn[0], drawn[-1]]


def probes(domain: Any) -> list[Any]:
    """`extremes`, and for a distribution of fractions one between them: 1.0 and 4.0 pass for whole numbers, 2.146 does not."""
    found = extremes(domain)
    fractions = isinstance(domain, Float) and len(found) == 2
    return [*found, domain.cast(found[0] + 0.382 * (found[1] - found[0]))] if fractions else found


def bounds(domain: Any) -> tuple[Any, Any] | None:
    """(least, greatest) of a number domain with bounds, else None."""
    if not _ends(domain):
        return None
    low, high = extremes(domain)
    return low, high


def _ends(domain: Any) -> bool:
    """Whether a domain is of numbers and goes from one to another."""
    numbers = isinstance(domain, (Float, Integer)) and None not in (domain.lower, domain.upper)
    return numbers and math.isfinite(domain.lower) and math.isfinite(domain.upper)


def is_log(domain: Any) -> bool:
    """Whether a domain is sampled on a logarithmic scale."""
    sampler = getattr(domain, "sampler", None)
    return "LogUniform" in type(getattr(sampler, "sampler", sampler)).__name__


def describe(domain: Any) -> dict[str, Any]:
    """A domain as plain data, for sweep.json and its plot."""
    values = finite(domain)
    if values is not None:
        return {"kind": "values", "values": values}
    ends = bounds(domain)
    kind = "integer" if isinstance(domain, Integer) else "float" if isinstance(domain, Float) else "function"
    return {"kind": kind, "low": ends and ends[0], "high": ends and ends[1], "log": is_log(domain)}


def grid(space: Space) -> list[Settings]:
    """Every combination of a space whose domains are all finite."""
    values = [finite(domain) or [] for domain in space.values()]
    return [dict(zip(space, chosen)) for chosen in itertools.product(*values)]


def draws(space: Space, samples: int, seed: int) -> list[Settings]:
    """`samples` random draws, each crossed with the grids of the space, keyed by the job's seed."""
    random = np.random.default_rng(derive(seed, "sweep"))
    crossed = {path: domain[GRID] for path, domain in space.items() if is_grid(domain)}
    found = []
    for _ in range(samples):
        for chosen in itertools.product(*crossed.values()):
            given = dict(zip(crossed, chosen))
            settings: Settings = {}
            for path, domain in space.items():
                settings[path] = given[path] if path in given else _draw(domain, settings, random)
            found.append(settings)
    return found


def _draw(domain: Any, before: Settings, random: np.random.Generator) -> Any:
    if isinstance(domain, Function):
        takes = inspect.signature(domain.func).parameters
        return to_dict(domain.func(SimpleNamespace(config=dict(before))) if takes else domain.func())
    if not isinstance(domain, Domain):
        return domain
    if isinstance(domain, Categorical):
        return domain.categories[int(random.integers(len(domain.categories)))]
    value = domain.sample(random_state=random)
    return value.item() if isinstance(value, np.generic) else value


def inside(settings: Settings, space: Space) -> Settings:
    """`settings` with numbers moved into the bounds of their domains: a perturbed temperature stays one that was asked for."""
    found = dict(settings)
    for path, domain in space.items():
        ends = bounds(domain)
        if path in found and ends is not None:
            value = min(max(found[path], ends[0]), ends[1])
            found[path] = round(value) if isinstance(domain, Integer) else value
    return found


def names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> the shortest tail of it that no other path ends with: heads of columns."""
    found = {}
    for path in paths:
        parts = path.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        alone = [t for t in tails if sum(other == t or other.endswith(f".{t}") for other in paths) == 1]
        found[path] = alone[0] if alone else path
    return found
