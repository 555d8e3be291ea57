"""Static faults of job, space and plan, all of them at once, before anything starts."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from raykd import catalogue
from raykd.config import Job
from raykd.errors import JobFaults, RaykdError
from raykd.launch import preflight
from raykd.launch.checks import inspect
from raykd.sweep import sharing
from raykd.sweep import space as spaces
from raykd.sweep.plan import Plan, Trial
from raykd.sweep.space import Settings, Space

PBT_MAY_CHANGE = re.compile(
    r"ce_weight|losses\.[^.]+\.(?!method$|layers$|teachers$|aggregate$)[^.]+|teachers\.[^.]+\.weight|"
    r"training\.(lr|momentum|weight_decay|clip_norm|label_smoothing)"
)
NOT_SEARCHED = {
    r"(.*\.)?seed": "the seed is not searched: the winner is run with several. Take it out, and set `seeds`",
    r"(name|runs|baseline)": "it does not change what a trial learns. Take it out",
    r"launch\..*": "it says where a trial runs, not what it learns. Take it out",
    r"stages(\..*)?": "stages are run once, before all trials. Take it out, or run a sweep of that stage's job",
    r"data\.(kind|root|train|eval|test|holdout|limit|per_class|eval_limit|num_classes|noisy_labels)": (
        "all trials are judged on the same held-out images. Take it out, and change it in the job"
    ),
    r"training\.(max_steps|eval_every|checkpoint_every|keep_checkpoints)": "trials are compared epoch by epoch. Take it out",
}


def found(job: Job, space: Space, plan: Plan, planned: list[Trial], nodes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Everything that is wrong, each fault once.

    Args:
        job: as the user wrote it, types not yet checked.
        space: as `as_space` gives it.
        plan: of the sweep.
        planned: its trials, as far as they are known.
        nodes: node -> what it has; empty where no cluster is known yet.
    """
    base = inspect(job).faults
    told = list(base)
    if job.peers:
        told.append("peers: a sweep searches jobs of one student, this one has several. Search with one, then run the peers.")
    told += [fault for path, domain in space.items() for fault in _path(job, path, domain, plan, not base)]
    told += _plan(job, space, plan)
    if not told:
        told += _trials(job, space, plan, planned)
    if not told or not base:
        told += _room(job, plan, nodes)
    return list(dict.fromkeys(told))


def _path(job: Job, path: str, domain: Any, plan: Plan, sound: bool) -> list[str]:
    """Faults of one path: one that is not searched, one that does not exist, values it does not take."""
    for pattern, why in NOT_SEARCHED.items():
        if re.fullmatch(pattern, path):
            return [f"space: {path}: {why}."]
    refused = sharing.refused(job, path, plan.share)
    if refused:
        return [f"space: {path}: {refused}"]
    if plan.scheduler == "pbt" and not PBT_MAY_CHANGE.fullmatch(path):
        return [
            f"space: {path}: expected weights, options of losses or training's lr, momentum, weight_decay, clip_norm and "
            "label_smoothing with scheduler='pbt', which changes them while a model is trained. Take it out, or use asha."
        ]
    if not sound:
        return []
    return _values(job, ({path: value} for value in spaces.probes(domain)))


def _values(job: Job, candidates: Iterable[Settings]) -> list[str]:
    """Faults of single settings, at the values given."""
    told: list[str] = []
    for settings in candidates:
        try:
            job.replace(**settings)
        except JobFaults as error:
            told += [f"space: {line.removeprefix('--set ')}" for line in each(error)]
        except RaykdError as error:
            told.append(f"space: {', '.join(settings)}: {error}")
    return told


def each(error: JobFaults) -> list[str]:
    """The faults of a JobFaults, one by one."""
    return [line.strip().partition(". ")[2] for line in str(error).splitlines()[1:]]


def _plan(job: Job, space: Space, plan: Plan) -> list[str]:
    told = []
    if plan.search == "grid":
        told += [
            f"space: {path}: expected tune.grid_search or tune.choice for search='grid', got a distribution without an end. "
            "List its values, or use search='random'."
            for path, domain in space.items()
            if spaces.finite(domain) is None
        ]
    if plan.search == "optuna":
        told += _optuna(space, plan)
    if plan.scheduler == "pbt":
        fixed = [path for path, domain in space.items() if len(spaces.finite(domain) or (0, 0)) < 2]
        told += [f"space: {path}: expected something to perturb with scheduler='pbt', got one value." for path in fixed]
        functions = [path for path, domain in space.items() if spaces.describe(domain)["kind"] == "function"]
        told += [f"space: {path}: pbt cannot perturb tune.sample_from. Use a distribution." for path in functions]
        if plan.search != "grid" and plan.samples < 4 and not any(map(spaces.is_grid, space.values())):
            told.append(f"sweep.samples: expected at least 4 trials for scheduler='pbt', got {plan.samples}. Raise it.")
    if plan.needs_checkpoints and plan.max_concurrent is not None:
        told.append(
            f"sweep.max_concurrent: {plan.scheduler} moves between trials by itself and runs as many as fit. Leave it out; "
            "launch.cpus says what one trial takes."
        )
    if job.launch.backend == "local":
        told.append("launch.backend: a sweep runs on Ray, got 'local'. Set launch.backend='ray'.")
    if job.training.max_steps is not None:
        told.append("training.max_steps: trials are compared epoch by epoch. Leave it out, and set training.epochs.")
    if job.training.eval_every != 1:
        told.append(f"training.eval_every: expected 1 in a sweep, got {job.training.eval_every}: each epoch is judged.")
    return told + sharing.faults(job)


def _optuna(space: Space, plan: Plan) -> list[str]:
    told = []
    if not optuna_is_installed():
        told.append("sweep.search: 'optuna' needs the package optuna. Install it: pip install 'raykd[optuna]'.")
    if plan.scheduler == "pbt":
        told.append("sweep.search: pbt perturbs settings itself and takes search='random' or 'grid', got 'optuna'.")
    for path, domain in space.items():
        if spaces.is_grid(domain):
            told.append(f"space: {path}: expected tune.choice instead of tune.grid_search with search='optuna'.")
        elif spaces.describe(domain)["kind"] == "function":
            told.append(f"space: {path}: optuna cannot search tune.sample_from. Use a distribution.")
    return told


def optuna_is_installed() -> bool:
    """Whether the extra is there."""
    try:
        return importlib.util.find_spec("optuna") is not None
    except ValueError:
        return False


def _trials(job: Job, space: Space, plan: Plan, planned: list[Trial]) -> list[str]:
    """What `raykd check` finds in jobs that stand for all trials, as far as the job itself has no such fault."""
    told = []
    for settings in representatives(space, planned):
        try:
            changed = job.replace(**settings)
        except JobFaults as error:
            told += each(error)
            continue
        told += inspect(changed).faults
    told += _chains(job, space)
    told += sharing.trial_faults(job, space, plan) if not told else []
    return [f"space: {fault}" for fault in dict.fromkeys(told)]


def _chains(job: Job, space: Space) -> list[str]:
    """Methods that train stages of their own: trials cannot."""
    methods = {name: {loss.method for loss in sharing.variants(job, space, name)} for name in job.losses}
    return [
        f"losses.{name}: {method} trains stages of its own, and trials have none. Run its stages first, and sweep the last job."
        for name, slugs in methods.items()
        for method in sorted(slugs)
        if "stages" in catalogue.method(method).hooks
    ]


def representatives(space: Space, planned: list[Trial]) -> list[Settings]:
    """Few settings in which every extreme value of every path occurs; planned trials only where a path has none of its own."""
    values = {path: spaces.extremes(domain) for path, domain in space.items()}
    if not all(values.values()):
        return [trial.settings for trial in planned]
    count = max(len(v) for v in values.values())
    return [{path: v[min(i, len(v) - 1)] for path, v in values.items()} for i in range(count)]


def _room(job: Job, plan: Plan, nodes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Whether one trial and the shared teachers fit the cluster, or this machine where none is named."""
    if not nodes and (job.launch.address or os.environ.get("RAY_ADDRESS")):
        return []
    verdict = preflight.fit(sharing.needs(job, plan.share, 1), nodes or {"here": _this_machine()})
    return [] if verdict.fits else [f"launch.cpus: one trial does not fit. {verdict.text}"]


def _this_machine() -> dict[str, float]:
    import ray._private.utils as machine

    count = getattr(machine, "get_num_cpus", os.cpu_count)
    return {"CPU": float(count() or 1), "GPU": float(_gpus())}


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
