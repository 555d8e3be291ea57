"""What a launch tells whoever watches: the terminal, a notebook, nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raykd.config import Job


class Observer:
    """Hears of a run's progress; this one says nothing. All calls come from the driver's main thread."""

    def begin(self, path: str, job: Job, folder: Path, total_steps: int) -> None:
        """A training starts: `path` is "" for the job itself, "baseline", or "stages.<name>" (nested: joined by dots)."""

    def skip(self, path: str, folder: Path, result: dict[str, Any]) -> None:
        """A stage is finished already and is not run again."""

    def teacher(self, path: str, name: str, split: str, accuracy: dict[str, Any]) -> None:
        """A teacher was measured here, before the training: {"top1", "top5", "count"}, shares in [0, 1]."""

    def note(self, text: str) -> None:
        """One line worth reading."""

    def warn(self, text: str) -> None:
        """One line that asks for attention."""

    def poll(self) -> None:
        """Called some five times a second while a training runs; new lines of <folder>/metrics.jsonl can be read here."""

    def end(self, path: str, folder: Path, result: dict[str, Any]) -> None:
        """A training ended; `result` is what result.json holds."""
