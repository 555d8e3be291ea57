"""One driver a folder: two would write over each other's files."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from raykd.errors import ConfigError


@contextlib.contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Holds a folder for this driver; on a file system without locks it holds nothing.

    Args:
        folder: there already.
        taken: what to say where another driver holds it, up to the full stop.

    Raises:
        ConfigError: another driver holds it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{taken}. Wait for it, or stop it first.") from None
        except OSError:
            pass
        yield
