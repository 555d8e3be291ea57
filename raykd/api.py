"""The public calls: `raykd.run(job)`, `raykd.check(job)` and `raykd.sweep(job, space)`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raykd.config import Job
from raykd.launch.inspection import Inspection
from raykd.launch.observer import Observer

if TYPE_CHECKING:
    from raykd.sweep.observer import SweepObserver


def run(
    job: Job,
    *,
    folder: Path | str | None = None,
    resume: bool = False,
    quiet: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Runs a job to its end, on Ray or in this process (`launch.backend`), with live progress on the terminal.

    Args:
        job: what to run.
        folder: the run folder; None: a new one, `<job.runs>/<job.name>-<number>`.
        resume: continue the run in `folder` (None: the newest of this name) from its last checkpoint.
        quiet: no output.
        observer: hears of the progress instead of the terminal.

    Returns:
        The content of the run folder's result.json: accuracies are shares in [0, 1], times in seconds.

    Raises:
        JobFaults: everything that is wrong with the job, at once, before anything started.
        ResourceError: the cluster cannot hold it.
        Interrupted: stopped by Ctrl-C, SIGTERM or job stop; the run is resumable.
        DivergenceError, SourceError, DataError: the run ended early; its last checkpoint is intact.
    """
    from raykd.launch.run import run as launch_run
    from raykd.report.page import write_page
    from raykd.report.terminal import Terminal

    with contextlib.ExitStack() as stack:
        watcher = observer or (Observer() if quiet else stack.enter_context(Terminal()))
        result = launch_run(job, folder=folder, resume=resume, observer=watcher)
    try:
        write_page(Path(result["folder"]))
    except Exception as error:
        warnings.warn(f"The report page was not written: {error}. The result is whole.", stacklevel=2)
    return result


def check(job: Job) -> Inspection:
    """Looks a job over without starting anything: models with parameters and MACs, signals, needs, all faults at once."""
    from raykd.launch.checks import inspect

    return inspect(job)


def sweep(
    job: Job | None = None,
    space: Mapping[str, Any] | None = None,
    *,
    folder: Path | str | None = None,
    resume: bool = False,
    quiet: bool = False,
    observer: SweepObserver | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Runs many trials of a job on one Ray cluster, teachers paid for once, then the best one with several seeds.

    Args:
        job: what every trial does but for its settings; left out when resuming.
        space: job path -> distribution of Ray Tune: `{"losses.kd.temperature": tune.loguniform(1, 16)}`.
        folder: of the sweep; None: a new one, `<job.runs>/<job.name>-sweep-<number>`.
        resume: go on with the sweep in `folder`: the same trials; what is finished is not run again.
        quiet: no output.
        observer: hears of the progress instead of the terminal.
        settings: search ("random", "grid", "optuna"), scheduler ("asha", "hyperband", "median", "pbt", "none"), samples (16),
            seeds (3), share ("store", "pool", "none"), holdout (0.1), grace, reduction, perturb_every, max_concurrent; see
            `raykd.sweep.plan.Plan`.

    Returns:
        The content of the folder's sweep.json: trials, the teachers' forward passes, the winner, mean and spread of its seeds.

    Raises:
        JobFaults: everything that is wrong with job, space and settings, at once, before anything started.
        ResourceError: the cluster cannot hold one trial. Interrupted: stopped, and resumable. SourceError: every trial failed.
    """
    from raykd.errors import ConfigError
    from raykd.report.sweeps import SweepTerminal, finish
    from raykd.sweep import run as launch
    from raykd.sweep.observer import SweepObserver

    with contextlib.ExitStack() as stack:
        watcher = observer or (SweepObserver() if quiet else stack.enter_context(SweepTerminal()))
        if resume:
            if folder is None:
                raise ConfigError("Resume: expected the folder of a sweep, got none. Give folder=...")
            result = launch.resume(folder, observer=watcher)
        elif job is None or space is None:
            raise ConfigError("sweep: expected a job and a space, got none of one. Give both, or folder=... and resume=True.")
        else:
            result = launch.sweep(job, space, folder=folder, observer=watcher, **settings)
        finish(result, watcher)
    return result
