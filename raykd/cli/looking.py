"""`raykd check`, `raykd list`, `raykd show`: what starts nothing."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raykd.errors import ConfigError, JobFaults, near

if TYPE_CHECKING:
    from rich.console import Console

    from raykd.config import Job

FAULTS = 1


def check(arguments: argparse.Namespace) -> tuple[int, Any]:
    """Prints an inspection of the job of FILE; faults in --set are faults of the job."""
    from raykd.launch.checks import inspect
    from raykd.report import checking
    from raykd.report.console import make_console

    console = make_console(stderr=arguments.json)
    job = job_of(arguments)
    try:
        job = with_settings(job, arguments)
    except JobFaults as error:
        checking.print_faults(console, faults(error))
        return FAULTS, {"faults": faults(error)}
    found = inspect(job)
    if not arguments.json:
        checking.print_inspection(console, found)
    return FAULTS if found.faults else 0, checking.as_json(found)


def listing(arguments: argparse.Namespace) -> tuple[int, Any]:
    """Prints a catalogue."""
    from raykd.report import catalogues
    from raykd.report.console import make_console

    found = catalogues.listing(arguments.kind, arguments.section)
    if not arguments.json:
        catalogues.print_listing(make_console(), arguments.kind, found)
    return 0, found


def show(arguments: argparse.Namespace) -> tuple[int, Any]:
    """Prints a run folder, finished or not, a folder of seeds, or a method."""
    from raykd.report.console import make_console

    console = make_console(stderr=arguments.json)
    place = Path(arguments.what)
    if not place.is_dir():
        return _show_method(arguments.what, None if arguments.json else console)
    from raykd.report import runs
    from raykd.report.words import plain

    if (place / "seeds.json").is_file():
        summary = json.loads((place / "seeds.json").read_text())
        if not arguments.json:
            runs.print_seeds(console, summary)
        return 0, summary
    if (place / "sweep.json").is_file():
        from raykd.report.sweeps import print_sweep

        sweep = json.loads((place / "sweep.json").read_text())
        if not arguments.json:
            print_sweep(console, sweep)
        return 0, sweep
    run = runs.load(place)
    if not arguments.json:
        runs.print_run(console, run)
    return 0, plain(runs.as_json(run))


def _show_method(name: str, console: Console | None) -> tuple[int, Any]:
    from raykd import catalogue
    from raykd.report import catalogues

    if "/" in name:
        folders = sorted(str(p) for p in Path(name).parent.glob("*") if (p / "job.json").is_file())
        raise ConfigError(f"{name}: no such folder. {near(name, folders)}")
    sys.path.insert(0, os.getcwd())
    page = catalogues.method_page(catalogue.method(name))
    if console is not None:
        catalogues.print_method(console, page)
    return 0, page


def job_of(arguments: argparse.Namespace) -> Job:
    """The job of FILE; resuming a folder that is named takes that folder's, and FILE only says where modules are."""
    from raykd.cli import jobfile

    single = getattr(arguments, "seeds", None) is None
    if single and getattr(arguments, "resume", False) and arguments.folder is not None:
        if arguments.file is not None:
            jobfile.find_modules(Path(arguments.file))
        return jobfile.load(str(arguments.folder))
    if arguments.file is None:
        raise ConfigError("FILE: expected a job file or a run folder, got none. For example: raykd run jobs/digits_demo.py")
    return jobfile.load(arguments.file, jobfile.parse_arguments(arguments.arg))


def with_settings(job: Job, arguments: argparse.Namespace) -> Job:
    from raykd.resolve import parse_settings, set_paths

    settings = parse_settings(arguments.set)
    return set_paths(job, settings) if settings else job


def faults(error: JobFaults) -> list[str]:
    """The faults one by one: the numbered lines of the message, with what follows them."""
    parts = re.split(r"^  \d+\. ", str(error), flags=re.MULTILINE)
    return [part.rstrip("\n") for part in parts[1:]]
