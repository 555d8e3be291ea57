"""The observer of the command line: one live line where stderr is a terminal, plain lines where it is not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from raykd.config import Job
from raykd.launch.observer import Observer
from raykd.report import peer_tables, tables, words
from raykd.report.console import make_console, print_table
from raykd.report.peer_watch import PeersWatch
from raykd.report.watch import Remark, Watch

PLAIN_EVERY_S = 10.0
STYLES = {"eval": "", "note": "cyan", "warn": "yellow"}


class Terminal(Observer):
    """Prints a run's progress; use it in a `with`, so that the live line ends whatever happens.

    Args:
        console: where progress goes; None: stderr.
        out: where the closing table goes; None: the same console.
        quiet: print warnings and the closing table only.
        clock: seconds that pass.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        out: Console | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or make_console(stderr=True)
        self.out = out or self.console
        self.quiet = quiet
        self._clock = clock
        self._watches: dict[str, Watch | PeersWatch] = {}
        self._live: Live | None = None
        self._printed: tuple[str, int, float] = ("", -1, 0.0)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, path: str, job: Job, folder: Path, total_steps: int) -> None:
        """A training starts; from now on its metrics are followed."""
        follow = PeersWatch if job.peers else Watch
        watch = self._watches[path] = follow(path, job, folder, total_steps, self._clock)
        self._printed = (path, watch.progress.epoch, self._clock())
        done = f", {watch.progress.step:,} of them done" if watch.progress.step else ""
        self._say(f"{watch.title}: {total_steps:,} steps{done}, in {folder}", "bold")
        if self.console.is_terminal and not self.quiet and self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()

    def skip(self, path: str, folder: Path, result: dict[str, Any]) -> None:
        """A stage, or the whole run, was finished earlier."""
        title = words.title(path, str(result.get("name", "")), bool(result.get("peers")))
        self._say(f"{title}: finished earlier, not run again ({folder})")
        if not path:
            print_result(self.out, result)

    def teacher(self, path: str, name: str, split: str, accuracy: dict[str, Any]) -> None:
        """A teacher was measured."""
        where = f"{path}: " if path else ""
        who = name if name.startswith("ensemble, ") else f"teacher {name}"
        self._say(f"{where}{who}, {split} split, {words.HERE}: {words.sentence(accuracy)}")

    def note(self, text: str) -> None:
        """One line worth reading."""
        self._say(text, STYLES["note"])

    def warn(self, text: str) -> None:
        """One line that asks for attention; printed even where quiet."""
        self._print(f"warning: {text}", STYLES["warn"])

    def poll(self) -> None:
        """Follows the metrics; keeps the live line fresh, or prints a plain line now and then."""
        for watch in list(self._watches.values()):
            self._remarks(watch.poll())
        if not self._watches or self.quiet:
            return
        path, watch = next(reversed(self._watches.items()))
        if self._live is not None:
            self._live.update(Text(watch.line(), no_wrap=True, overflow="ellipsis"), refresh=True)
        elif (watch.progress.live_steps or watch.progress.prepared) and self._is_due(path, watch):
            self._printed = (path, watch.progress.epoch, self._clock())
            self._say(watch.line())

    def end(self, path: str, folder: Path, result: dict[str, Any]) -> None:
        """A training ended; the job's own end closes with the table."""
        watch = self._watches.pop(path, None)
        if watch is not None:
            self._remarks(watch.finish())
        if path:
            self._say(f"{watch.title if watch else path}: finished{_reached(result)}")
            return
        self.close()
        print_result(self.out, result)
        self._say(f"Run folder: {folder}")

    def _is_due(self, path: str, watch: Watch | PeersWatch) -> bool:
        last_path, last_epoch, last_time = self._printed
        return path != last_path or watch.progress.epoch != last_epoch or self._clock() - last_time >= PLAIN_EVERY_S

    def _remarks(self, remarks: list[Remark]) -> None:
        for remark in remarks:
            if remark.kind == "warn":
                self.warn(remark.text)
            else:
                self._say(remark.text, STYLES[remark.kind])

    def _say(self, text: str, style: str = "") -> None:
        if not self.quiet:
            self._print(text, style)

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style), soft_wrap=not self.console.is_terminal)


def print_result(console: Console, result: tables.Result) -> None:
    """The closing table of a run: top-1 / top-5 of every model, gain and gap, flags."""
    body = [row.cells() for row in tables.rows(result)]
    print_table(console, tables.HEAD, body, f"{result.get('name', 'run')}: top-1 / top-5, per cent")
    for head, more in ((peer_tables.BRANCHES, peer_tables.branches(result)), (peer_tables.EDGES, peer_tables.edges(result))):
        if more:
            print_table(console, head, more, "Branches" if head is peer_tables.BRANCHES else "Exchange among the peers")
    for text in tables.comparisons(result):
        console.print(Text(text))
    for text in tables.flags(result):
        console.print(Text(f"warning: {text}", style=STYLES["warn"]))


def _reached(result: tables.Result) -> str:
    """What the student, or each peer, ended with."""
    if result.get("peers"):
        top1 = {name: value for name, peer in result["peers"].items() if (value := words.top1(peer.get("last"))) is not None}
        shown = words.several({name: words.percent(value) for name, value in top1.items()}, top1) if top1 else ""
        return f", eval top-1 {shown}" if shown else ""
    last = (result.get("student") or result).get("last")
    return f", eval {words.sentence(last)}" if last else ""
