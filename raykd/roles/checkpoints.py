"""Checkpoints: a folder a step, one file a rank, and a commit marker written last.

    checkpoints/step-00000120/rank-0.pt  rank-1.pt  COMMIT

A folder without COMMIT was cut off while it was written and does not count. Files hold tensors, numbers and strings only and
are read with weights_only=True.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from raykd.errors import DataError

VISIBLE_S = 30.0
FOLDER = re.compile(r"step-(\d{8,})")


def save(
    folder: Path, step: int, rank: int, world: int, state: Mapping[str, Any], barrier: Callable[[], None], keep: int
) -> None:
    """Writes this rank's file; rank 0 commits once all ranks have written theirs, then drops old checkpoints.

    Args:
        folder: the run's `checkpoints`.
        step: steps done.
        rank: of this worker.
        world: number of workers.
        state: tensors, numbers, strings, nested in dicts and lists.
        barrier: returns when all workers have called it.
        keep: number of committed checkpoints kept.
    """
    place = folder / f"step-{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    if step == 0:  # written more than once, as the training is prepared: files of two times do not count as one
        if rank == 0 and world > 1:
            (place / "COMMIT").unlink(missing_ok=True)
        barrier()
    part = place / f".rank-{rank}.{os.getpid()}"
    with part.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, place / f"rank-{rank}.pt")
    barrier()
    if rank == 0:
        marker = place / f".commit.{os.getpid()}"
        marker.write_text(json.dumps({"step": step, "world": world}) + "\n")
        os.replace(marker, place / "COMMIT")
        for _, old in committed(folder)[:-keep]:
            (old / "COMMIT").unlink(missing_ok=True)  # first: what is cut off while it is removed does not count
            shutil.rmtree(old, ignore_errors=True)
    barrier()


def committed(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in folder.iterdir() if (m := FOLDER.fullmatch(p.name)) and (p / "COMMIT").is_file()]
    return sorted(found)


def newest(folder: Path, most: int | None = None) -> int | None:
    """Step of the newest committed checkpoint, or of the newest up to step `most`; None where there is none."""
    found = [step for step, _ in committed(folder) if most is None or step <= most]
    return found[-1] if found else None


def forget(folder: Path, after: int) -> None:
    """Removes the checkpoints of later steps: another course of the training may come to them."""
    for step, old in committed(folder):
        if step > after:
            (old / "COMMIT").unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, step: int, rank: int, world: int) -> dict[str, Any]:
    """This rank's state at a committed step, which all ranks have agreed on.

    Raises:
        DataError: the checkpoint was written by another number of workers, its file is damaged, or this node cannot see it.
    """
    place = folder / f"step-{step:08d}"
    deadline = time.monotonic() + VISIBLE_S
    while not (place / "COMMIT").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)  # a network file system may show it late
    try:
        saved = json.loads((place / "COMMIT").read_text())["world"]
    except OSError as error:
        raise DataError(f"Checkpoint {place}: expected a committed one, got {error}. Do all nodes see this folder?") from None
    if saved != world:
        raise DataError(
            f"Checkpoint {place}: expected {world} workers, got one written by {saved}. Resume with launch.workers={saved}; "
            "batch-norm statistics and the split of a batch belong to the number of workers."
        )
    try:
        state = torch.load(place / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"Checkpoint {place}/rank-{rank}.pt is damaged ({type(error).__name__}). "
            "Delete that folder to resume from the one before."
        ) from None
    return dict(state)
