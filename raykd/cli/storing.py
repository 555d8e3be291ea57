"""`raykd store build | info | verify | export`."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raykd.cli.looking import job_of, with_settings
from raykd.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from rich.console import Console

    from raykd.config import Job

FAULTS = 1


def storing(arguments: argparse.Namespace) -> tuple[int, Any]:
    """What `raykd store ACTION` does."""
    actions = {"build": _build, "info": _info, "verify": _verify, "export": _export}
    return actions[arguments.action](arguments)


def _build(arguments: argparse.Namespace) -> tuple[int, Any]:
    from raykd.launch import storing as launch
    from raykd.report.storing import Builds, print_built, print_planned

    job = with_settings(job_of(arguments), arguments)
    folder = _folder(arguments, job)
    out = _out(arguments)
    if arguments.dry_run:
        found = launch.plan(job, folder, arguments.epochs, arguments.rows)
        if out is not None:
            print_planned(out, found)
        return 0, found
    try:
        with Builds(quiet=arguments.quiet) as watching:
            found = launch.build(job, folder, arguments.epochs, watching, not arguments.anew, arguments.rows)
    except Interrupted as error:
        raise Interrupted(f"{error} Go on with: {_command(arguments, folder)}") from None
    if out is not None:
        print_built(out, found)
    return 0, found


def _info(arguments: argparse.Namespace) -> tuple[int, Any]:
    from raykd.launch import storing as launch
    from raykd.report.storing import print_info

    found = launch.info(arguments.folder)
    out = _out(arguments)
    if out is not None:
        print_info(out, found)
    return 0, found


def _verify(arguments: argparse.Namespace) -> tuple[int, Any]:
    from raykd.cli import jobfile
    from raykd.launch import storing as launch
    from raykd.report.storing import print_verified

    jobfile.find_modules(Path(arguments.folder))
    found = launch.verify(arguments.folder, arguments.recompute)
    out = _out(arguments)
    if out is not None:
        print_verified(out, found)
    return FAULTS if found["faults"] else 0, found


def _export(arguments: argparse.Namespace) -> tuple[int, Any]:
    from raykd.exchange.stored import export

    started = time.time()
    files = list(export(Path(arguments.folder), Path(arguments.out)))
    num_bytes = sum(path.stat().st_size for path in files)
    found = {"folder": arguments.out, "files": len(files), "bytes": num_bytes, "seconds": round(time.time() - started, 3)}
    out = _out(arguments)
    if out is not None:
        out.print(f"{len(files)} Parquet files, {num_bytes:,} bytes, in {arguments.out}", soft_wrap=True)
    return 0, found


def _folder(arguments: argparse.Namespace, job: Job) -> str:
    """--out, or the folder that all of the job's stored teachers name."""
    named = {t.store for t in job.teachers.values() if t.store is not None}
    if arguments.out is None and len(named) != 1:
        raise ConfigError(
            f"--out: expected the folder of the store, got none, and the job's teachers name "
            f"{', '.join(sorted(named)) or 'none'}. Give --out DIR."
        )
    return arguments.out or named.pop()


def _command(arguments: argparse.Namespace, folder: str) -> str:
    settings = [w for pair in arguments.set for w in ("--set", pair)] + [w for pair in arguments.arg for w in ("--arg", pair)]
    epochs = ["--epochs", str(arguments.epochs)] if arguments.epochs is not None else []
    return shlex.join(["raykd", "store", "build", arguments.file, *settings, "--out", folder, *epochs])


def _out(arguments: argparse.Namespace) -> Console | None:
    from raykd.report.console import make_console

    return None if arguments.json else make_console()
