"""Ray Tune: the searcher, the scheduler, the loop, and how it goes on after a crash. Its own output is off; ours follows it."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator

from raykd.config import Launch
from raykd.data.keys import derive
from raykd.sweep import space as spaces
from raykd.sweep.plan import METRIC, TIME, Plan, Trial, grace_of, interval_of
from raykd.sweep.space import Space
from raykd.sweep.trial import PLANNED, Given, name_of, settings_of, trial

NAME = "tune"  # Tune's folder inside the sweep's
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics are in the trials' own folders
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # between snapshots, from which a killed sweep goes on
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours turns Ctrl-C and SIGTERM into Tune's SIGUSR1
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "20",
    "RAY_AIR_NEW_OUTPUT": "0",
}
STATES = {
    TuneTrial.PENDING: "pending",
    TuneTrial.RUNNING: "running",
    TuneTrial.PAUSED: "paused",
    TuneTrial.TERMINATED: "ended",
    TuneTrial.ERROR: "failed",
}
RETRIES = 2  # of a trial whose process died or whose teacher was lost
KEPT = 6  # Tune's checkpoints a trial; pbt copies from the newer ones


@contextmanager
def quiet() -> Iterator[None]:
    """Tune's settings in the environment, its log to errors, both as before afterwards."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray")]
    levels = [logger.level for logger in loggers]
    os.environ |= ENVIRONMENT
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def scheduler(plan: Plan, epochs: int, space: Space) -> TrialScheduler:
    """Who stops trials early, or copies one over another."""
    if plan.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr=TIME, max_t=epochs, grace_period=grace_of(plan, epochs), reduction_factor=plan.reduction
        )
    if plan.scheduler == "hyperband":
        return HyperBandScheduler(time_attr=TIME, max_t=epochs, reduction_factor=plan.reduction)
    if plan.scheduler == "median":
        return MedianStoppingRule(time_attr=TIME, grace_period=grace_of(plan, epochs))
    if plan.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr=TIME,
            perturbation_interval=interval_of(plan, epochs),
            hyperparam_mutations={PLANNED: {path: _mutation(domain) for path, domain in space.items()}},
            custom_explore_fn=functools.partial(_inside, space=dict(space)),
            log_config=False,
        )
    return FIFOScheduler()


def _mutation(domain: Any) -> Any:
    """Few values are moved along, numbers are perturbed or drawn again."""
    values = spaces.finite(domain)
    return domain if values is None else values


def _inside(config: dict[str, Any], space: Space) -> dict[str, Any]:
    return config | {PLANNED: spaces.inside(config[PLANNED], space)}


def resources(launch: Launch) -> PlacementGroupFactory:
    """What one trial reserves: its own process learns where there is one worker, else it watches the others."""
    bundle = {"CPU": launch.cpus, **launch.resources} | ({"GPU": launch.gpus} if launch.gpus else {})
    bundles = [bundle] if launch.workers == 1 else [{}, *[bundle] * launch.workers]
    return PlacementGroupFactory(bundles, strategy=launch.placement_strategy)


class Loop:
    """The trials of a sweep, run by Tune from the main thread.

    Args:
        folder: of the sweep.
        plan: of the sweep.
        space: of the sweep.
        planned: trials drawn beforehand; empty where the searcher chooses.
        given: what all trials share.
        at_once: trials at a time; None: as many as there is room for.
        epochs: the most of a trial.
        poll: called some times a second with (trial, settings, state) of all trials.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        space: Space,
        planned: list[Trial],
        given: Given,
        at_once: int | None,
        epochs: int,
        poll: Callable[[list[tuple[str, Mapping[str, Any], str]]], None],
    ) -> None:
        self.folder, self.plan, self.space, self.planned = folder, plan, space, planned
        self.given, self.at_once, self.epochs, self.poll = given, at_once, epochs, poll
        self._heard = False
        self._active = False

    def run(self) -> bool:
        """Runs what is left of the trials. Returns whether all of them have ended; if not, a stop was asked for."""
        limited = tune.with_resources(tune.with_parameters(trial, given=self.given), resources(self.given.job.launch))
        place = self.folder / NAME
        if any(place.glob("experiment_state-*.json")) and tune.Tuner.can_restore(str(place)):
            tuner = tune.Tuner.restore(str(place), limited, resume_unfinished=True, resume_errored=True)
            tuner._local_tuner._run_config.callbacks = [self._callback()]  # type: ignore[union-attr]
        else:
            tuner = self._new(limited)
        self._active = True
        try:
            tuner.fit()
        finally:
            self._active = False
        return not self._heard

    def stop(self) -> None:
        """Asks Tune to end: trials stop, their state is kept. Called from a signal handler."""
        self._heard = True
        if self._active:
            signal.raise_signal(signal.SIGUSR1)

    def _new(self, limited: Any) -> tune.Tuner:
        trials = [t.settings for t in self.planned]
        param_space: dict[str, Any] = {PLANNED: tune.grid_search(trials)} if trials else dict(self.space)
        return tune.Tuner(
            limited,
            param_space=param_space,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=1 if trials else self.plan.samples,
                search_alg=self._searcher(),
                scheduler=scheduler(self.plan, self.epochs, self.space),
                max_concurrent_trials=None if trials else self.at_once,
                trial_dirname_creator=_dirname,
                reuse_actors=True,  # a process that has imported torch takes the next trial
            ),
            run_config=tune.RunConfig(
                name=NAME,
                storage_path=str(self.folder),
                verbose=0,
                callbacks=[self._callback()],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT if self.plan.needs_checkpoints else None),
            ),
        )

    def _searcher(self) -> Any:
        if self.plan.search != "optuna":
            return BasicVariantGenerator(max_concurrent=self.at_once or 0)
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(metric=METRIC, mode="max", seed=derive(self.given.job.seed, "optuna") % 2**32)

    def _callback(self) -> tune.Callback:
        return _Ear(self._states)

    def _states(self, trials: list[TuneTrial]) -> None:
        seen = {}
        for t in trials:
            name = name_of(t.trial_id, self.given.names)
            seen[name] = (name, settings_of(t.config), STATES.get(t.status, "running"))
        waiting = [(t.name, t.settings, "pending") for t in self.planned if t.name not in seen]
        self.poll([*seen.values(), *waiting])


def _dirname(found: TuneTrial) -> str:
    return str(found.trial_id)


class _Ear(tune.Callback):
    """Tells of the trials' states after each turn of Tune's loop."""

    def __init__(self, tell: Callable[[list[TuneTrial]], None]) -> None:
        self.tell = tell

    def __getstate__(self) -> dict[str, Any]:
        return {"tell": None}  # Tune keeps its callbacks on disk; a resumed sweep brings its own

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:  # noqa: ARG002
        """After a turn of the loop."""
        if self.tell is not None:
            self.tell(trials)

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:  # noqa: ARG002
        """When the loop is over."""
        if self.tell is not None:
            self.tell(trials)


@contextmanager
def stoppable(stop: Callable[[], None]) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: `stop`. Second Ctrl-C: end now."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def hear(number: int, _: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        stop()

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in watched}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
