"""Every error raykd raises on purpose.

    RaykdError
    ├── ConfigError (ValueError)      a setting is unknown, ill-typed or contradicts another
    │   └── JobFaults                 all faults of one job, found before anything starts
    ├── ModelError (ValueError)       an architecture, layer or weight file does not fit
    ├── DataError (ValueError)        a data set is missing, unreadable or not what the job says
    ├── SignalError (ValueError)      a signal is unknown, never fired or has the wrong shape
    ├── ResourceError (ValueError)    the cluster cannot hold the job
    ├── DivergenceError               a loss stopped being finite; the last checkpoint is intact
    ├── SourceError                   a teacher, peer or store did not answer
    │   └── LostError                 none of its replicas is left
    └── Interrupted                   Ctrl-C, SIGTERM or job stop; the run is resumable

Messages read `<what>: expected <wanted>, got <actual> (<where>). <what to do>.` An error holds one positional message,
so that it keeps its type when Ray pickles it from one process to another.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class RaykdError(Exception):
    """Root of all errors raykd raises on purpose."""


class ConfigError(RaykdError, ValueError):
    """A setting is unknown, ill-typed or contradicts another."""


class JobFaults(ConfigError):
    """All faults of one job, one a line; found before anything starts."""

    @classmethod
    def of(cls, faults: Iterable[str]) -> JobFaults:
        """Joins the faults into one message, one numbered line each."""
        lines = list(dict.fromkeys(faults))
        head = f"{len(lines)} fault{'s' if len(lines) != 1 else ''} in this job; nothing was started."
        return cls("\n".join([head, *(f"  {i}. {line}" for i, line in enumerate(lines, 1))]))


class ModelError(RaykdError, ValueError):
    """An architecture, layer or weight file does not fit."""


class DataError(RaykdError, ValueError):
    """A data set is missing, unreadable or not what the job says."""


class SignalError(RaykdError, ValueError):
    """A signal is unknown, never fired or has the wrong shape."""


class ResourceError(RaykdError, ValueError):
    """The cluster cannot hold the job."""


class DivergenceError(RaykdError):
    """A loss stopped being finite; the last checkpoint is intact."""


class SourceError(RaykdError):
    """A teacher, peer or store did not answer."""


class LostError(SourceError):
    """None of a teacher's replicas is left, or comes back."""


class Interrupted(RaykdError):
    """Ctrl-C, SIGTERM or job stop; the run is resumable."""


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint for a misspelt name: `Did you mean 'kd'?` or the list of known names when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.55)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    shown = ", ".join(known[:24]) + (f", ... ({len(known)} in all)" if len(known) > 24 else "")
    return f"Known: {shown}." if known else "None are known."


def told(error: Exception, path: str | None = None) -> str:
    """`KeyError: 'margin' (losses.py:12)`: one line, with the innermost place in the file at `path`."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}{place}"
