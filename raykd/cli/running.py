"""`raykd run`: one run or several seeds, new or resumed."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raykd.cli.looking import job_of, with_settings
from raykd.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from raykd.config import Job
    from raykd.report.terminal import Terminal


def run(arguments: argparse.Namespace) -> tuple[int, Any]:
    """Runs the job of FILE once, or with several seeds; the answer is result.json or the spread."""
    from raykd.report.console import make_console
    from raykd.report.terminal import Terminal

    _settle_resume(arguments)
    job = with_settings(job_of(arguments), arguments)
    out = None if arguments.json else make_console()
    with Terminal(out=out, quiet=arguments.quiet) as terminal:
        if arguments.seeds is None:
            return 0, _run_once(arguments, job, terminal)
        summary = _run_seeds(arguments, job, terminal)
    if out is not None:
        from raykd.report.runs import print_seeds

        print_seeds(out, summary)
    return 0, summary


def _settle_resume(arguments: argparse.Namespace) -> None:
    """Turns --resume and --folder into `resume` (a bool), `folder` and, for `raykd run --resume jobs/kd.py`, `file`."""
    named = arguments.resume or None
    arguments.resume = arguments.resume is not None
    if named and arguments.file is None and re.search(r"\.py(:\w+)?$", named):
        arguments.file, named = named, None
    if arguments.resume and not named and arguments.file and Path(arguments.file).is_dir():
        named = arguments.folder or arguments.file
    if named and arguments.folder and Path(named) != Path(arguments.folder):
        raise ConfigError(f"--folder {arguments.folder}: --resume names another folder, {named}. Leave one of them out.")
    folder = named or arguments.folder
    arguments.folder = Path(folder) if folder else None
    arguments.stopped = None


def _run_once(arguments: argparse.Namespace, job: Job, terminal: Terminal) -> dict[str, Any]:
    from raykd.launch.run import find_folder

    before = find_folder(job)
    try:
        return _run_in(arguments.folder, job, arguments.resume, terminal)
    except (Interrupted, KeyboardInterrupt):
        place = arguments.folder or find_folder(job)
        started = place is not None and (place / "job.json").is_file()
        if started and (arguments.folder or arguments.resume or place != before):
            arguments.stopped = place
        raise


def _run_in(folder: Path | None, job: Job, resume: bool, terminal: Terminal) -> dict[str, Any]:
    """Runs the job and writes its page; a page that fails does not fail the run."""
    from raykd.launch import run as launch
    from raykd.report.page import write_page
    from raykd.report.words import plain

    result = launch.run(job, folder=folder, resume=resume, observer=terminal)
    try:
        terminal.note(f"Report: {write_page(Path(result['folder']))}")
    except Exception as error:
        terminal.warn(f"The run is complete, its page is not: {type(error).__name__}: {error}")
    return plain(result)


def _run_seeds(arguments: argparse.Namespace, job: Job, terminal: Terminal) -> dict[str, Any]:
    """Runs seeds job.seed .. + N - 1, each in <folder>/seed-<seed>; when resuming, finished ones are not run again."""
    from raykd.report.tables import seeds

    base = _seeds_folder(job, arguments)
    arguments.stopped = base
    results: list[dict[str, Any]] = []
    for seed in range(job.seed, job.seed + arguments.seeds):
        place = base / f"seed-{seed}"
        terminal.note(f"Seed {seed}, {len(results) + 1} of {arguments.seeds}.")
        resume = arguments.resume and (place / "job.json").is_file()
        results.append(_run_in(place, job.replace(seed=seed), resume, terminal))
    summary = seeds(results)
    (base / "seeds.json").write_text(json.dumps(summary, indent=2) + "\n")
    terminal.note(f"Written: {base / 'seeds.json'}")
    return summary


def _seeds_folder(job: Job, arguments: argparse.Namespace) -> Path:
    """The folder of all seeds: as given, else <runs>/<name>-seeds-<number>, the newest of them when resuming."""
    if arguments.folder is not None:
        return Path(arguments.folder)
    places = Path(job.runs).glob(f"{job.name}-seeds-*") if Path(job.runs).is_dir() else []
    numbers = sorted(int(tail) for p in places if (tail := p.name.rpartition("-")[2]).isdigit())
    if arguments.resume and not numbers:
        raise ConfigError(f"Resume: no run of {job.name!r} over seeds in {job.runs!r}. Leave --resume out to start one.")
    number = numbers[-1] if arguments.resume else (numbers or [0])[-1] + 1
    return Path(job.runs) / f"{job.name}-seeds-{number:03d}"


def resume_command(arguments: argparse.Namespace) -> str | None:
    """The command that goes on with what was stopped; None if nothing was started."""
    if getattr(arguments, "stopped", None) is None:
        return None
    words = ["raykd", "run", *([arguments.file] if arguments.file else [])]
    if arguments.seeds is not None:
        words += [w for pair in arguments.set for w in ("--set", pair)] + [w for pair in arguments.arg for w in ("--arg", pair)]
        words += ["--seeds", str(arguments.seeds)]
    return shlex.join([*words, "--resume", str(arguments.stopped)])
