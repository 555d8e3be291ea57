"""The public calls: `raykd.run(job)` and `raykd.check(job)`."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

from raykd.config import Job
from raykd.launch.inspection import Inspection
from raykd.launch.observer import Observer


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
