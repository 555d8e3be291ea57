"""How a store, and the building of one, look on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from raykd.exchange.store import Place
from raykd.launch.storing import Building
from raykd.report import words
from raykd.report.console import make_console, print_table
from raykd.report.terminal import PLAIN_EVERY_S, STYLES


class Builds(Building):
    """Follows a build: one bar where stderr is a terminal, plain lines where it is not; use it in a `with`.

    Args:
        console: where progress goes; None: stderr.
        quiet: print warnings only.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console, self.quiet = console or make_console(stderr=True), quiet
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = self._before = 0
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Builds:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """One line worth reading."""
        if not self.quiet:
            self._print(text, STYLES["note"])

    def warn(self, text: str) -> None:
        """One line that asks for attention; printed even where quiet."""
        self._print(f"warning: {text}", STYLES["warn"])

    def planned(self, folder: Path, rows: int, done: int, num_bytes: int) -> None:
        """The build begins."""
        self._total, self._before = rows, done
        self._started = self._printed = time.monotonic()
        there = f", {done:,} of them there" if done else ""
        self.note(f"{rows:,} rows{there}, {num_bytes:,} bytes in all, in {folder}")
        if self.console.is_terminal and not self.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("building", total=rows, completed=done, rate="")
            self._bar.start()

    def progressed(self, place: Place, done: int) -> None:
        """A shard was written."""
        now = time.monotonic()
        rate = done / max(now - self._started, 1e-9)
        left = self._total - self._before - done
        if self._bar is not None:
            name = f"{place.teacher}, epoch {place.epoch}"
            self._bar.update(self._task, completed=self._before + done, description=name, rate=f"{rate:,.0f} img/s")
        elif not self.quiet and (now - self._printed >= PLAIN_EVERY_S or not left):
            self._printed = now
            parts = [
                f"{place.teacher}, epoch {place.epoch}",
                f"{self._before + done:,}/{self._total:,} rows",
                f"{rate:,.0f} img/s",
            ]
            self._print(" · ".join([*parts, f"ETA {words.duration(left / rate)}"]), "")

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style), soft_wrap=not self.console.is_terminal)


def print_planned(console: Console, found: Mapping[str, Any]) -> None:
    """What a build would write."""
    _print_signals(console, found, f"{found['bytes']:,} bytes would be written to {found['folder']}")


def print_built(console: Console, found: Mapping[str, Any]) -> None:
    """What a build has written."""
    computed = ", ".join(f"{name} {count:,}" for name, count in found["forwards"].items())
    lines = (
        f"Store {found['folder']}: {found['rows']:,} rows of {_epochs(found)}, {found['bytes']:,} bytes; "
        f"{found['built']} shards built, {found['kept']} kept, in {words.duration(found['seconds'])}",
        f"Views computed: {computed}",
    )
    for line in lines:
        console.print(line, soft_wrap=True)
    for name, errors in found["errors"].items():
        for error, value in errors.items():
            console.print(f"Codec of {name}: {error} at most {value:.4g}", soft_wrap=True)


def print_info(console: Console, found: Mapping[str, Any]) -> None:
    """A store: what it holds, what it was made of."""
    whole = "complete" if found["complete"] else f"{found['whole_shards']} of {found['shards']} shards are whole"
    _print_signals(console, found, f"Store {found['folder']}: {found['bytes']:,} bytes, {whole}")
    size = f"{found['samples']:,} samples x {_epochs(found)}, {found['rows_a_shard']:,} rows a shard"
    console.print(f"{size}; seed {found['seed']}")
    changed = {n: v for n, v in found["augmentation"].items() if v not in (0, 0.0, None, False) and not isinstance(v, list)}
    console.print(
        f"augmentation: {', '.join(f'{n} {v}' for n, v in changed.items())}; data {found['data'][:12]}", soft_wrap=True
    )
    for name, made in found["models"].items():
        console.print(f"{name}: {made['model']}, weights {made['weights'][:12]}, {made['dtype']}", soft_wrap=True)


def print_verified(console: Console, found: Mapping[str, Any]) -> None:
    """The verdict on a store."""
    for wrong in found["faults"]:
        console.print(Text(wrong, style=STYLES["warn"]), soft_wrap=True)
    again = f"; {found['recomputed']} batches computed again" if found["recomputed"] else ""
    console.print(f"{found['whole']} of {found['shards']} shards are whole{again}: {found['folder']}", soft_wrap=True)


def _print_signals(console: Console, found: Mapping[str, Any], title: str) -> None:
    body = [
        (
            name,
            key,
            "; ".join(f"{p} {s}" for p, s in signal["shape"].items()),
            teacher["codec"],
            f"{signal['bytes_per_sample']:,}",
        )
        for name, teacher in found["teachers"].items()
        for key, signal in teacher["signals"].items()
    ]
    print_table(console, ("teacher", "signal", "kept", "codec", "bytes a sample"), body, title)


def _epochs(found: Mapping[str, Any]) -> str:
    return f"{found['epochs']} epoch{'s' if found['epochs'] > 1 else ''}"
