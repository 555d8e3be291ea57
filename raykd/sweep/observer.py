"""What a sweep tells whoever watches: the terminal, a notebook, nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raykd.launch.observer import Observer


class SweepObserver:
    """Hears of a sweep's progress; this one says nothing. All calls come from the driver's main thread."""

    def begin(self, folder: Path, about: Mapping[str, Any]) -> None:
        """The sweep starts, or goes on: plan, space, epochs of a trial, trials at a time."""

    def note(self, text: str) -> None:
        """One line worth reading."""

    def warn(self, text: str) -> None:
        """One line that asks for attention."""

    def update(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """The table of trials, some five times a second; a changed status or epoch is in it."""

    def end(self, result: Mapping[str, Any]) -> None:
        """The sweep ended; `result` is what sweep.json holds."""

    def run(self, what: str) -> Observer:
        """Who hears of one of the runs around the trials: a stage, the store, one of the winner's seeds."""
        del what
        return Observer()
