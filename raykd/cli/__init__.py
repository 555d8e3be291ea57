"""The command line: `raykd run | check | list | show | store | sweep`.

Commands import what they need when they run, so that `raykd list` is there at once. With --json, stdout holds exactly one JSON
object and everything else goes to stderr. Exit codes: 0 done, 1 `check` found faults or something unexpected happened, 2 a
mistake of the user's or a failed run (one message, no traceback), 130 stopped and resumable.

parser    commands, options, help        jobfile   a job out of a file
running   run, resume, seeds             looking   check, list, show
storing   store build, info, verify, export        sweeping  sweep
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from raykd.cli import looking, running, storing, sweeping
from raykd.cli.looking import faults
from raykd.cli.parser import make_parser
from raykd.errors import Interrupted, JobFaults, RaykdError

MISTAKE, STOPPED = 2, 130
COMMANDS = {
    "run": running.run,
    "check": looking.check,
    "list": looking.listing,
    "show": looking.show,
    "store": storing.storing,
    "sweep": sweeping.sweep,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        if not arguments.json:
            code, _ = _guarded(arguments)
            return code
        with _stdout_kept():
            code, answer = _guarded(arguments)
        print(json.dumps(answer, indent=2, allow_nan=False), flush=True)
        return code
    except BrokenPipeError:  # `raykd list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _guarded(arguments: argparse.Namespace) -> tuple[int, Any]:
    """The command's exit code and answer; errors become a message, a code and an answer too."""
    try:
        return COMMANDS[arguments.command](arguments)
    except (Interrupted, KeyboardInterrupt) as error:
        _say(f"stopped: {error}" if str(error) else "stopped.", "yellow")
        resume = running.resume_command(arguments)
        if resume:
            _say(f"Go on with: {resume}")
        return STOPPED, {"error": {"type": "Interrupted", "message": str(error)}, "resume": resume}
    except RaykdError as error:
        _say(f"error: {error}", "red")
        return MISTAKE, {"error": _error(error)}
    except BrokenPipeError:
        raise
    except Exception as error:
        traceback.print_exc()
        return 1, {"error": _error(error)}


def _error(error: BaseException) -> dict[str, Any]:
    found: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    return found | ({"faults": faults(error)} if isinstance(error, JobFaults) else {})


def _say(text: str, style: str = "") -> None:
    """One message on stderr."""
    from rich.text import Text

    from raykd.report.console import make_console

    make_console(stderr=True).print(Text(text, style=style), soft_wrap=True)


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """Sends everything that is written to stdout meanwhile to stderr, that of libraries below Python too."""
    real = sys.stdout
    real.flush()
    try:
        copy = os.dup(real.fileno())
    except (OSError, ValueError):  # not a file: a notebook, a test
        copy = None
    with contextlib.redirect_stdout(sys.stderr):
        if copy is not None:
            os.dup2(sys.__stderr__.fileno() if sys.__stderr__ else 2, real.fileno())
        try:
            yield
        finally:
            if copy is not None:
                os.dup2(copy, real.fileno())
                os.close(copy)
