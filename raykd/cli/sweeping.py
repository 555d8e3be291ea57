"""`raykd sweep`: many trials of one job, or going on with a sweep that was stopped."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raykd.cli.looking import faults, job_of, with_settings
from raykd.errors import ConfigError, JobFaults, near

DEFAULT = "space"
SETTINGS = (
    "search",
    "scheduler",
    "samples",
    "seeds",
    "share",
    "holdout",
    "grace",
    "reduction",
    "perturb_every",
    "max_concurrent",
)


def sweep(arguments: argparse.Namespace) -> tuple[int, Any]:
    """Runs the trials of JOB over SPACE, or goes on with --resume FOLDER; the answer is sweep.json."""
    from raykd.cli import jobfile
    from raykd.report.console import make_console
    from raykd.report.sweeps import SweepTerminal, finish
    from raykd.report.words import plain
    from raykd.sweep import run as launch

    out = None if arguments.json else make_console()
    with SweepTerminal(out=out, quiet=arguments.quiet) as terminal:
        if arguments.resume is not None:
            if arguments.job is not None:
                jobfile.find_modules(Path(arguments.job))
            find_modules()
            result = launch.resume(arguments.resume, observer=terminal)
        else:
            job, space = _asked(arguments)
            chosen = {name: getattr(arguments, name) for name in SETTINGS if getattr(arguments, name) is not None}
            result = launch.sweep(job, space, folder=arguments.folder, observer=terminal, **chosen)
        finish(result, terminal)
    return 0, plain(result)


def _asked(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Job and space of the command line; what is wrong with either is told together."""
    if arguments.job is None or arguments.space is None:
        raise ConfigError(
            "JOB SPACE: expected a job file and a space file. For example: raykd sweep jobs/digits_demo.py "
            "tune_spaces/kd_temperature_weight.py"
        )
    told: list[str] = []
    found: list[Any] = [None, None]
    arguments.file = arguments.job
    attempts: tuple[Callable[[], Any], ...] = (
        lambda: with_settings(job_of(arguments), arguments),
        lambda: load_space(arguments.space),
    )
    for place, attempt in enumerate(attempts):
        try:
            found[place] = attempt()
        except JobFaults as error:
            told += faults(error)
        except ConfigError as error:
            told.append(str(error))
    if told:
        raise JobFaults.of(told)
    return found[0], found[1]


def find_modules() -> None:
    """Makes the modules of the working directory importable."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def load_space(spec: str) -> dict[str, Any]:
    """The space that `FILE[:function]` names: a function without arguments that returns {job path: distribution}.

    Raises:
        ConfigError: no such file or function, a mistake in the file, or it returns something else.
    """
    from raykd.cli import jobfile

    path, name = jobfile.split_spec(spec)
    jobfile.find_modules(path)
    if not path.is_file():
        raise ConfigError(f"Space file {path}: no such file. {jobfile.near_files(path)}")
    module = jobfile.import_file(path)
    public = {
        n: f
        for n, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")
    }
    if name is not None and name not in public:
        raise ConfigError(f"{path}: no function {name!r}. {near(name, public)}")
    function = public.get(name or DEFAULT) or (next(iter(public.values())) if len(public) == 1 else None)
    if function is None:
        wanted = "Write `def space(): return {'losses.kd.temperature': tune.loguniform(1, 16)}`."
        several = f"several functions: {', '.join(public)}. Name one: {path}:{next(iter(public))}." if public else ""
        raise ConfigError(f"{path}: {several or f'no function that returns a space. {wanted}'}")
    try:
        found = function()
    except Exception as error:
        raise ConfigError(jobfile.place_of(path, error)) from error
    from raykd.sweep.space import as_space

    return as_space(found, f"{path}:{function.__name__}")
