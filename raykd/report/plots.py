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
    figure, axes = _canvas("Loss terms, weighted, on the training set", "step", "loss")
    names = list(dict.fromkeys(name for r in steps for name in r.get("terms", {})))
    series = {name: [(r["step"], r["terms"][name]) for r in steps if name in r.get("terms", {})] for name in names}
    if len(names) != 1:
        series = {"sum": [(r["step"], r["loss"]) for r in steps if r.get("loss") is not None], **series}
    colours = dict(zip(series, (INK, *COLOURS) if "sum" in series else COLOURS))
    for name, pairs in series.items():
        _draw(axes, *thin([float(s) for s, _ in pairs], [float(v) for _, v in pairs]), name, colours.get(name, INK))
    values = [v for pairs in series.values() for _, v in pairs]
    if values and min(values) > 0 and max(values) / min(values) > 50:
        axes.set_yscale("log")
    _legend(axes)
    return figure


def _accuracy(evals: Sequence[Record], alone: Sequence[Record], teachers: Mapping[str, float]) -> Figure:
    figure, axes = _canvas("Top-1 on the eval split", "epoch", "top-1, %")
    for name, records, colour in (("student alone", alone, COLOURS[6]), ("student", evals, COLOURS[0])):
        if records:
            _draw(axes, [r["epoch"] + 1 for r in records], [100 * r["top1"] for r in records], name, colour)
    for place, (name, top1) in enumerate(teachers.items()):
        axes.axhline(100 * top1, color=COLOURS[1 + place % 5], linestyle="--", linewidth=1.2, label=f"teacher {name}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(axes)
    return figure


def _rate(steps: Sequence[Record]) -> Figure:
    figure, axes = _canvas("Learning rate", "step", "learning rate")
    _draw(axes, [float(r["step"]) for r in steps], [float(r.get("lr") or 0.0) for r in steps], "", COLOURS[2])
    axes.set_ylim(bottom=0)
    return figure


def _wait(steps: Sequence[Record]) -> Figure:
    """Each point is the share over a stretch of steps: sums before division, so that short steps do not count double."""
    figure, axes = _canvas("Time a step waits for teachers", "step", "share, %")
    size = max(1, math.ceil(len(steps) / 100))
    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
    shares = [(float(p[-1]["step"]), 100 * share) for p in parts if (share := wait_share(p)) is not None]
    _draw(axes, [s for s, _ in shares], [v for _, v in shares], "", COLOURS[1])
    axes.set_ylim(0, 100)
    return figure


def _canvas(title: str, x: str, y: str) -> tuple[Figure, Axes]:
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


def _draw(axes: Axes, xs: Sequence[float], ys: Sequence[float], name: str, colour: str) -> None:
    marker = "o" if len(xs) <= 30 else ""
    axes.plot(xs, ys, color=colour, label=name, linewidth=1.6, marker=marker, markersize=4, clip_on=False)


def _legend(axes: Axes) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9)


def _eval_teachers(folder: Path) -> dict[str, float]:
    """Teachers that were measured on the split the curve shows."""
    try:
        result: Mapping[str, Any] = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    teachers = result.get("teachers") or {}
    return {name: t["top1"] for name, t in teachers.items() if t.get("split") == "eval" and t.get("top1") is not None}
