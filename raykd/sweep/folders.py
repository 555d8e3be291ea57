"""Folders of sweeps: numbered below the job's `runs`, held by one driver at a time."""

from __future__ import annotations

from pathlib import Path

from raykd.config import Job
from raykd.errors import ConfigError
from raykd.sweep.plan import PLAN


def new(job: Job, folder: Path | None) -> Path:
    """The folder of a new sweep: as given, else the next number of this job's name.

    Raises:
        ConfigError: it holds a sweep already, or cannot be made.
    """
    if folder is not None:
        folder = folder.absolute()
        if (folder / PLAN).exists():
            raise ConfigError(f"Folder {folder} holds a sweep already. Resume it with --resume {folder}, or name another.")
    number = max((n for n, _ in numbered(job)), default=0)
    while True:
        number += 1
        place = folder or (Path(job.runs) / f"{job.name}-sweep-{number:03d}").absolute()
        try:
            place.mkdir(parents=True, exist_ok=folder is not None)
            return place
        except FileExistsError:  # another sweep took the number
            continue
        except OSError as error:
            raise ConfigError(f"Folder {place}: cannot be made ({error}). Set `runs` to a folder you may write.") from None


def numbered(job: Job) -> list[tuple[int, Path]]:
    """(number, folder) of all sweeps of this job's name, oldest first."""
    head = f"{job.name}-sweep-"
    places = Path(job.runs).glob(f"{head}*") if Path(job.runs).is_dir() else []
    tails = [(p.name[len(head) :], p) for p in places]
    return sorted((int(tail), p.absolute()) for tail, p in tails if tail.isdigit())
