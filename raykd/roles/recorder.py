"""metrics.jsonl: one line a step and one an evaluation; each step appears once, however often the run was resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Recorder:
    """Appends records of one run; a resumed run first cuts the file back to its checkpoint.

    Args:
        path: the file.
        step: steps done so far; later records are cut away.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        kept = [line for line, record in _lines(path) if record.get("step", 0) <= step] if path.is_file() else []
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text("".join(kept))
        os.replace(part, path)
        self._file = path.open("a", buffering=1)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes one record. `step` is the number of steps done when it was made."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read(path: Path, kind: str | None = None) -> list[Mapping[str, Any]]:
    """The records of a run, oldest first; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    return [record for _, record in _lines(path) if kind is None or record.get("kind") == kind]


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for line in path.read_text().splitlines():
        try:
            yield f"{line}\n", json.loads(line)
        except json.JSONDecodeError:
            continue
