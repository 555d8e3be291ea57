"""A sweep as a picture: accuracy over the value for one searched path, parallel coordinates for more."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raykd.report.plots import GRID, INK
from raykd.sweep.space import names

Row = Mapping[str, Any]
PLOT = "sweep.png"
LINE_STYLES = {"finished": "-", "stopped": "--"}
COLOURS, POINTS, WINNER = "viridis", "#0072b2", "#d55e00"
SHOWN_WIDTH = 28


def plot(folder: Path, result: Row) -> Path:
    """Writes <folder>/sweep.png; bright is better.

    Stopped trials are dashed, or hollow: they are shown with what they had reached.
    """
    rows = [r for r in result["trials"] if r["last"] is not None]
    paths = list(result["space"])
    figure = _one_path(rows, paths[0], result) if len(paths) == 1 else _parallel(rows, paths, result)
    target = folder / PLOT
    figure.savefig(target, dpi=150)
    return target


def value(found: Any) -> str:
    """A setting, short."""
    if isinstance(found, float):
        return f"{found:.3g}"
    if isinstance(found, Mapping):
        method = [str(found["method"])] if "method" in found else []
        found = ", ".join([*method, *(f"{k} {value(v)}" for k, v in found.items() if k != "method")])
    text = str(found)
    return text if len(text) <= SHOWN_WIDTH else f"{text[: SHOWN_WIDTH - 3]}..."


def _one_path(rows: Sequence[Row], path: str, result: Row) -> Figure:
    figure, axes = _canvas(6.4, 3.8, f"{result['name']}: top-1 on held-out images")
    axis = _Axis(result["space"][path], [r["settings"][path] for r in rows])
    for label, filled in (("went all the way", True), ("stopped early", False)):
        own = [r for r in rows if (r["status"] == "finished") is filled]
        xs, ys = [axis.number(r["settings"][path]) for r in own], [100 * r["last"] for r in own]
        face = POINTS if filled else "none"
        axes.scatter(xs, ys, s=36, facecolors=face, edgecolors=POINTS, linewidths=1.4, label=label, zorder=3)
    axes.set_xlabel(path, color=INK)
    axes.set_ylabel("top-1, %", color=INK)
    axes.set_xticks(axis.places, axis.labels)
    axes.grid(color=GRID, linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    return figure


def _parallel(rows: Sequence[Row], paths: Sequence[str], result: Row) -> Figure:
    title = f"{result['name']}: {len(rows)} trials, top-1 on held-out images"
    figure, axes = _canvas(max(6.4, 1.9 * (len(paths) + 1) + 1.4), 4.2, title)
    columns = [_Axis(result["space"][path], [r["settings"][path] for r in rows]) for path in paths]
    accuracies = [100 * r["last"] for r in rows] or [0.0, 1.0]
    low, high = min(accuracies), max(max(accuracies), min(accuracies) + 1e-6)
    colours = matplotlib.colormaps[COLOURS]
    best = max(rows, key=lambda r: (r["status"] == "finished", r["last"]), default=None)
    for row in sorted(rows, key=lambda r: r["last"]):
        share = (100 * row["last"] - low) / (high - low)
        heights = [*(c.share(row["settings"][p]) for c, p in zip(columns, paths)), share]
        wins = best is not None and row["trial"] == best["trial"]
        axes.plot(
            range(len(heights)),
            heights,
            LINE_STYLES.get(row["status"], ":"),
            color=WINNER if wins else colours(0.95 * share),
            linewidth=2.6 if wins else 1.3,
            alpha=1.0 if wins else 0.8,
            zorder=4 if wins else 3,
            label=f"winner (trial {row['trial']})" if wins else None,
        )
    short = names(list(paths))
    axes.set_xticks(range(len(paths) + 1), [*(short[p] for p in paths), "top-1, %"])
    axes.set_yticks([])
    axes.set_xlim(-0.25, len(paths) + 0.25)
    axes.set_ylim(-0.06, 1.06)
    axes.tick_params(axis="x", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    for x, column in enumerate(columns):
        _ruler(axes, x, [column.share_of(p) for p in column.places], column.labels)
    ticks = _rounds(low, high)
    _ruler(axes, len(paths), [(t - low) / (high - low) for t in ticks], [f"{t:g}" for t in ticks])
    axes.plot([], [], "-", color=INK, linewidth=1.3, label="went all the way")
    axes.plot([], [], "--", color=INK, linewidth=1.3, label="stopped early")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.07))
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colours), ax=axes, pad=0.02, fraction=0.04)
    bar.set_label("top-1, %", color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=INK, labelsize=8)
    return figure


class _Axis:
    """One searched path as numbers: its own scale, or places in a row for values that are no numbers."""

    def __init__(self, about: Mapping[str, Any], seen: Sequence[Any]) -> None:
        self.values: list[Any] | None = None
        few = about["kind"] == "values"
        self.log = bool(about.get("log"))
        if few and not all(_is_number(v) for v in about["values"]):
            self.values = [_key(v) for v in about["values"]]
            self.low, self.high = 0.0, max(len(self.values) - 1.0, 1.0)
            self.places = [float(i) for i in range(len(self.values))]
            self.labels = [value(v) for v in about["values"]]
            return
        known = about["values"] if few else [v for v in (about["low"], about["high"]) if v is not None]
        ends = [self.number(v) for v in [*known, *seen]] or [0.0, 1.0]
        self.low, self.high = min(ends), max(max(ends), min(ends) + 1e-9)
        if few and len(about["values"]) <= 8:
            ticks = sorted(float(v) for v in about["values"])
        elif self.log:
            ticks = _powers(10**self.low, 10**self.high)
        else:
            ticks = _rounds(self.low, self.high)
        self.places = [self.number(t) for t in ticks]
        self.labels = [f"{t:g}" for t in ticks]

    def number(self, found: Any) -> float:
        """Where a value lies on the axis."""
        if self.values is not None:
            return float(self.values.index(_key(found)))
        return math.log10(found) if self.log else float(found)

    def share(self, found: Any) -> float:
        """The same, from 0 to 1."""
        return self.share_of(self.number(found))

    def share_of(self, place: float) -> float:
        """A place on the axis, from 0 to 1."""
        return (place - self.low) / (self.high - self.low)


def _is_number(found: Any) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool)


def _key(found: Any) -> str:
    return json.dumps(found, sort_keys=True)


def _rounds(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    return [round(float(t), 12) for t in MaxNLocator(5).tick_values(low, high) if low - 1e-9 <= t <= high + 1e-9]


def _powers(low: float, high: float) -> list[float]:
    """The powers from low to high: of 2 over a short range, of 10 over a long one."""
    base = 10.0 if high / low > 100 else 2.0
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    return [float(f"{base**k:.6g}") for k in range(first, last + 1)]


def _ruler(axes: Axes, x: float, heights: Sequence[float], labels: Sequence[str]) -> None:
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
    axes.plot([x, x], [0, 1], color=INK, linewidth=1.0, zorder=2)
    for height, label in zip(heights, labels):
        axes.plot([x - 0.015, x], [height, height], color=INK, linewidth=1.0, zorder=2)
        axes.text(x - 0.03, height, label, ha="right", va="center", fontsize=8, color=INK, zorder=6, bbox=box)


def _canvas(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
