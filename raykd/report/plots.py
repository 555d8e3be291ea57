"""A run's curves as PNG files: loss terms, accuracy per epoch, learning rate, waiting share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raykd.report.follow import Record, wait_share
from raykd.roles.recorder import read

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
INK, GRID = "#333333", "#e4e4e4"
MAX_POINTS = 400
Points = tuple[list[float], list[float]]


def plots(folder: Path) -> list[Path]:
    """Writes <folder>/plots/{loss,accuracy,rate,wait}.png, those that the run's metrics allow.

    Args:
        folder: a run folder; its metrics.jsonl is read, and result.json and baseline/ where they exist.

    Returns:
        The files, in the order in which the page shows them.
    """
    steps, evals = read(folder / "metrics.jsonl", "step"), read(folder / "metrics.jsonl", "eval")
    figures: dict[str, Figure] = {}
    if steps:
        figures["loss"] = _loss(steps)
    if evals:
        figures["accuracy"] = _accuracy(evals, read(folder / "baseline" / "metrics.jsonl", "eval"), _eval_teachers(folder))
    if steps:
        figures["rate"] = _rate(steps)
        if any(r.get("wait_s") for r in steps):
            figures["wait"] = _wait(steps)
    if any(len(r.get("branches") or []) > 2 for r in evals):
        figures["branches"] = _branches(evals)
    return save(folder, figures)


def save(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Writes <folder>/plots/<name>.png of each figure."""
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    paths = [target / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values()):
        figure.savefig(path, dpi=150)
    return paths


def thin(xs: Sequence[float], ys: Sequence[float], most: int = MAX_POINTS) -> Points:
    """At most `most` points: means over equal stretches, values that are not finite left out."""
    pairs = [(x, y) for x, y in zip(xs, ys) if math.isfinite(y)]
    size = max(1, math.ceil(len(pairs) / most))
    parts = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [sum(x for x, _ in p) / len(p) for p in parts], [sum(y for _, y in p) / len(p) for p in parts]


def _loss(steps: Sequence[Record]) -> Figure:
    figure, axes = canvas("Loss terms, weighted, on the training set", "step", "loss")
    names = list(dict.fromkeys(name for r in steps for name in r.get("terms", {})))
    series = {name: [(r["step"], r["terms"][name]) for r in steps if name in r.get("terms", {})] for name in names}
    if len(names) != 1:
        series = {"sum": [(r["step"], r["loss"]) for r in steps if r.get("loss") is not None], **series}
    colours = dict(zip(series, (INK, *COLOURS) if "sum" in series else COLOURS))
    for name, pairs in series.items():
        draw(axes, *thin([float(s) for s, _ in pairs], [float(v) for _, v in pairs]), name, colours.get(name, INK))
    values = [v for pairs in series.values() for _, v in pairs]
    if values and min(values) > 0 and max(values) / min(values) > 50:
        axes.set_yscale("log")
    legend(axes)
    return figure


def _accuracy(evals: Sequence[Record], alone: Sequence[Record], teachers: Mapping[str, float]) -> Figure:
    figure, axes = canvas("Top-1 on the eval split", "epoch", "top-1, %")
    for name, records, colour in (("student alone", alone, COLOURS[6]), ("student", evals, COLOURS[0])):
        if records:
            draw(axes, [r["epoch"] + 1 for r in records], [100 * r["top1"] for r in records], name, colour)
    for place, (name, top1) in enumerate(teachers.items()):
        axes.axhline(100 * top1, color=COLOURS[1 + place % 5], linestyle="--", linewidth=1.2, label=f"teacher {name}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend(axes)
    return figure


def _branches(evals: Sequence[Record]) -> Figure:
    figure, axes = canvas("Top-1 of each branch on the eval split", "epoch", "top-1, %")
    known = [r for r in evals if len(r.get("branches") or []) > 2]
    epochs = [float(r["epoch"] + 1) for r in known]
    for place in range(len(known[-1]["branches"]) - 1):
        name = f"branch {place}" + (", the plain model" if place == 0 else "")
        draw(axes, epochs, [100 * r["branches"][place]["top1"] for r in known], name, COLOURS[place % 7])
    draw(axes, epochs, [100 * r["branches"][-1]["top1"] for r in known], "ensemble", INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend(axes)
    return figure


def _rate(steps: Sequence[Record]) -> Figure:
    figure, axes = canvas("Learning rate", "step", "learning rate")
    draw(axes, [float(r["step"]) for r in steps], [float(r.get("lr") or 0.0) for r in steps], "", COLOURS[2])
    axes.set_ylim(bottom=0)
    return figure


def _wait(steps: Sequence[Record]) -> Figure:
    figure, axes = canvas("Time a step waits for teachers", "step", "share, %")
    draw(axes, *wait_points(steps), "", COLOURS[1])
    axes.set_ylim(0, 100)
    return figure


def wait_points(steps: Sequence[Record], name: str = "wait_s") -> Points:
    """Each point is the share over a stretch of steps: sums before division, so that short steps do not count double."""
    size = max(1, math.ceil(len(steps) / 100))
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    shares = [(float(p[-1]["step"]), 100 * share) for p in parts if (share := wait_share(p, name)) is not None]
    return [s for s, _ in shares], [v for _, v in shares]


def canvas(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot."""
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def draw(axes: Axes, xs: Sequence[float], ys: Sequence[float], name: str, colour: str, style: str = "-") -> None:
    """One curve; few points are marked."""
    marker = "o" if len(xs) <= 30 else ""
    axes.plot(xs, ys, color=colour, label=name, linestyle=style, linewidth=1.6, marker=marker, markersize=4, clip_on=False)


def legend(axes: Axes) -> None:
    """Names the curves, where there are several; many stand beside the plot."""
    count = len(axes.get_legend_handles_labels()[1])
    if count > 8:
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + (count - 1) // 18)
    elif count > 1:
        axes.legend(frameon=False, fontsize=9)


def _eval_teachers(folder: Path) -> dict[str, float]:
    """Teachers that were measured on the split the curve shows."""
    try:
        result: Mapping[str, Any] = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    teachers = result.get("teachers") or {}
    return {name: t["top1"] for name, t in teachers.items() if t.get("split") == "eval" and t.get("top1") is not None}
