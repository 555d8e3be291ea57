"""A sweep on the terminal: the table of trials while they run, a line a trial that has ended, the closing table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raykd.launch.observer import Observer
from raykd.report import words
from raykd.report.console import make_console, print_table
from raykd.report.storing import Builds
from raykd.report.sweep_plot import plot, value
from raykd.report.terminal import STYLES, Terminal
from raykd.sweep.observer import SweepObserver
from raykd.sweep.sharing import STORE
from raykd.sweep.space import names

Row = Mapping[str, Any]
OVER = ("finished", "stopped", "diverged", "failed")


class SweepTerminal(SweepObserver):
    """Prints a sweep's progress: a live table where stderr is a terminal, a line a trial where it is not. Use it in a `with`.

    Args:
        console: where progress goes; None: stderr.
        out: where the closing table goes; None: the same console.
        quiet: warnings and the closing table only.
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
        self.quiet, self._clock = quiet, clock
        self._about: Mapping[str, Any] = {}
        self._live: Live | None = None
        self._told: set[str] = set()
        self._first: tuple[float, int] | None = None
        self._inner: Builds | Terminal | None = None

    def __enter__(self) -> SweepTerminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the live table."""
        if self._inner is not None:
            self._inner.__exit__(None, None, None)
            self._inner = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Says what is about to run."""
        self._about = about
        self._say(
            f"{about['name']}: {about['samples']} trials of up to {about['epochs']} epochs, {about['at_once']} at a time; "
            f"search {about['search']}, scheduler {about['scheduler']}, teachers shared by {about['share']}; in {folder}",
            "bold",
        )

    def note(self, text: str) -> None:
        """One line worth reading."""
        self._say(text, STYLES["note"])

    def warn(self, text: str) -> None:
        """One line that asks for attention."""
        self._print(f"warning: {text}", STYLES["warn"])

    def run(self, what: str) -> Observer:
        """Runs around the trials print as runs do; the store as it does when it is built by itself."""
        self.close()
        self._say(f"{what}:", "bold")
        self._inner = Builds(self.console, self.quiet) if what == STORE else Terminal(self.console, quiet=self.quiet)
        return self._inner

    def update(self, trials: Sequence[Row]) -> None:
        """Keeps the live table fresh; says which trials have ended."""
        if self._first is None and trials:
            self._first = (self._clock(), epochs_done(trials))
        for row in trials:
            if row["status"] in OVER and row["trial"] not in self._told:
                self._told.add(row["trial"])
                if self._live is None:
                    self._say(ended(row, trials))
        if not self.console.is_terminal or self.quiet:
            return
        if self._inner is not None:
            self.close()
        if self._live is None and any(r["status"] not in OVER for r in trials):
            self._live = Live(console=self.console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        if self._live is not None:
            self._live.update(self._table(trials), refresh=True)

    def end(self, result: Row) -> None:
        """Prints the closing table."""
        self.close()
        print_sweep(self.out, result)

    def _table(self, trials: Sequence[Row]) -> Group:
        body = Table(box=None, pad_edge=False)
        for name in head(self._about.get("space", {})):
            body.add_column(name, justify="right" if name != "status" else "left")
        room = max(4, self.console.size.height - 6)
        for row in foremost(trials, room):
            style = "green" if row["status"] == "running" else "dim" if row["status"] == "pending" else ""
            body.add_row(*(Text(cell) for cell in cells(row, self._about.get("space", {}))), style=style)
        return Group(body, Text(self._sum(trials)))

    def _sum(self, trials: Sequence[Row]) -> str:
        counts = {status: sum(r["status"] == status for r in trials) for status in dict.fromkeys(r["status"] for r in trials)}
        parts = [f"{count} {status}" for status, count in counts.items()]
        best = best_of(trials)
        if best is not None:
            parts.append(f"best {words.percent(best['best'])} (trial {best['trial']})")
        left = seconds_left(trials, self._first, self._clock())
        return " · ".join(parts + ([f"ETA at most {words.duration(left)}"] if left is not None else []))

    def _say(self, text: str, style: str = "") -> None:
        if not self.quiet:
            self._print(text, style)

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(text, style=style), soft_wrap=not self.console.is_terminal)


def finish(result: Row, observer: SweepObserver) -> None:
    """Writes the picture of a sweep that has ended; one that fails does not fail the sweep."""
    try:
        observer.note(f"Picture: {plot(Path(result['folder']), result)}")
    except Exception as error:
        observer.warn(f"The sweep is complete, its picture is not: {type(error).__name__}: {error}")


def epochs_done(trials: Sequence[Row]) -> int:
    """Epochs of all trials."""
    return sum(r["epoch"] for r in trials)


def seconds_left(trials: Sequence[Row], first: tuple[float, int] | None, now: float) -> float | None:
    """Time until the last trial ends if none is stopped any more; None before an epoch has passed."""
    if first is None or epochs_done(trials) <= first[1]:
        return None
    left = sum(r["epochs"] - r["epoch"] for r in trials if r["status"] not in OVER)
    return left * (now - first[0]) / (epochs_done(trials) - first[1])


def best_of(trials: Sequence[Row]) -> Row | None:
    """The best so far."""
    return max((r for r in trials if r["best"] is not None), key=lambda r: r["best"], default=None)


def foremost(trials: Sequence[Row], count: int) -> list[Row]:
    """The trials worth a row of the live table: running ones, then the best, then what is waiting."""
    order = {"running": 0, "paused": 2, "pending": 3}
    return sorted(trials, key=lambda r: (order.get(r["status"], 1), -(r["last"] or 0.0), r["trial"]))[:count]


def ended(row: Row, trials: Sequence[Row]) -> str:
    """One line about a trial that is over."""
    found = "no evaluation" if row["last"] is None else words.percent(row["last"])
    short = names(list(row["settings"]))
    shown = ", ".join(f"{short[path]} {value(v)}" for path, v in row["settings"].items())
    best = best_of(trials)
    beside = "" if best is None or best["trial"] == row["trial"] else f"; best so far {words.percent(best['best'])}"
    why = f": {row['error']['message']}" if row.get("error") else ""
    return f"trial {row['trial']} {row['status']} at epoch {row['epoch']}/{row['epochs']}: {found} ({shown}){beside}{why}"


def head(space: Mapping[str, Any]) -> tuple[str, ...]:
    """Heads of the table of trials."""
    return ("trial", *names(list(space)).values(), "status", "epoch", "held-out, last", "best")


def cells(row: Row, space: Mapping[str, Any]) -> tuple[str, ...]:
    """A trial as text, in the order of `head`."""
    accuracy = ["-" if row[m] is None else words.percent(row[m]) for m in ("last", "best")]
    shown = [value(row["settings"].get(path)) for path in space]
    return (row["trial"], *shown, row["status"], f"{row['epoch']}/{row['epochs']}", *accuracy)


def print_sweep(console: Console, result: Row) -> None:
    """The closing table of a sweep, what its teachers computed, the winner."""
    ranked = sorted(result["trials"], key=lambda r: (r["status"] != "finished", -(r["last"] or 0.0)))
    title = f"{result['name']}: {len(ranked)} trials, judged on {result['judged_on']}, top-1"
    print_table(console, head(result["space"]), [cells(r, result["space"]) for r in ranked], title)
    for line in lines(result):
        console.print(Text(line), soft_wrap=True)


def lines(result: Row) -> list[str]:
    """What there is to say below the table."""
    found = [forwards_text(result)]
    exploits = [e for r in result["trials"] for e in r["exploits"]]
    if result["scheduler"] == "pbt":
        found.append(f"Exploits: {len(exploits)} times a trial went on from the weights of a better one.")
    winner = result["winner"]
    if winner is None:
        return [*found, f"Not finished. Go on with: raykd sweep --resume {result['folder']}"]
    short = names(list(winner["settings"]))
    shown = ", ".join(f"{short[p]} {value(v)}" for p, v in winner["settings"].items())
    found.append(f"Winner: trial {winner['trial']} ({shown}), {words.percent(winner['last'])} on the held-out images.")
    for split, of in (("last", "eval split"), ("test", "test split")):
        spread = result["spread"].get(split)
        if spread:
            seeds = ", ".join(str(s["seed"]) for s in result["seeds"])
            deviation = "" if spread["std"] is None else f" ± {100 * spread['std']:.2f}"
            found.append(
                f"On the whole training set, {of}, measured once at the end: {100 * spread['mean']:.2f}{deviation} % "
                f"(mean ± standard deviation, seeds {seeds})."
            )
    return [*found, f"Run it again: raykd run {result['folder']}/best_job.json"]


def forwards_text(result: Row) -> str:
    """How often the teachers computed, beside what one trial takes."""
    forwards = result["forwards"]
    if not forwards["one_trial"]:
        return "No teachers: nothing to share."
    times = forwards["sweep"] / forwards["one_trial"]
    how = {"store": "kept once, read by all", "pool": "computed by shared replicas", "none": "computed in every trial"}
    return (
        f"Teacher forward passes: {forwards['sweep']:,} images for the whole sweep ({how[forwards['share']]}), "
        f"{forwards['one_trial']:,} for one trial by itself: {times:.2f} x; "
        f"these trials, each with its own teachers: {forwards['unshared']:,}."
    )
