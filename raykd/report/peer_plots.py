"""The curves of a run of peers as PNG files: every peer in one plot of each kind; losses and returns are marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raykd.report.follow import PEERS_WAIT, Record
from raykd.report.peer_watch import ROOM
from raykd.report.plots import COLOURS, INK, canvas, draw, legend, save, thin, wait_points
from raykd.report.runs import Run
from raykd.roles.recorder import read

PALETTE = COLOURS[:6]
STYLES = ("-", "--", ":", "-.")


def plots(run: Run) -> list[Path]:
    """Writes <folder>/plots/peers_{loss,accuracy,rate,wait}.png, those that the peers' metrics allow.

    Returns:
        The files, in the order in which the page shows them.
    """
    steps = {name: peer.steps for name, peer in run.peers.items() if peer.steps}
    evals = {name: peer.evals for name, peer in run.peers.items() if peer.evals}
    figures: dict[str, Figure] = {}
    if steps:
        figures["peers_loss"] = _loss(run, steps)
    if evals:
        figures["peers_accuracy"] = _accuracy(run, evals)
    if steps:
        figures["peers_rate"] = _rate(run, steps)
    if any(r.get(PEERS_WAIT) for own in steps.values() for r in own):
        figures["peers_wait"] = _wait(run, steps)
    return save(run.folder, figures)


def look(place: int) -> tuple[str, str]:
    """Colour and line style of the place-th peer."""
    return PALETTE[place % len(PALETTE)], STYLES[place // len(PALETTE) % len(STYLES)]


def _looks(run: Run) -> dict[str, tuple[str, str]]:
    return {name: look(place) for place, name in enumerate(run.peers)}


def _loss(run: Run, steps: Mapping[str, Sequence[Record]]) -> Figure:
    figure, axes = canvas("Loss of each peer, all terms, on the training set", "step", "loss")
    values: list[float] = []
    for name, own in steps.items():
        known = [r for r in own if r.get("loss") is not None]
        xs, ys = thin([float(r["step"]) for r in known], [float(r["loss"]) for r in known])
        values += ys
        draw(axes, xs, ys, name, *_looks(run)[name])
    if values and min(values) > 0 and max(values) / min(values) > 50:
        axes.set_yscale("log")
    _mark(run, axes, 1.0)
    legend(axes)
    return figure


def _accuracy(run: Run, evals: Mapping[str, Sequence[Record]]) -> Figure:
    figure, axes = canvas("Top-1 of each peer on the eval split", "epoch", "top-1, %")
    alone = False
    for name, own in evals.items():
        colour, style = _looks(run)[name]
        draw(axes, [float(r["epoch"] + 1) for r in own], [100 * r["top1"] for r in own], name, colour, style)
        before = read(run.folder / "baseline" / ROOM / name / "metrics.jsonl", "eval")
        if before:
            xs, ys = [r["epoch"] + 1 for r in before], [100 * r["top1"] for r in before]
            axes.plot(xs, ys, color=colour, linestyle=style, linewidth=1.0, alpha=0.45, marker="x" if len(xs) <= 30 else "")
            alone = True
    if alone:
        axes.plot([], [], color=INK, alpha=0.45, linewidth=1.0, marker="x", label="pale: the same alone")
    together = (run.result or {}).get("together")
    if together:
        split = "" if together.get("split") == "eval" else f", {together.get('split')} split"
        axes.axhline(100 * together["top1"], color=INK, linestyle="--", linewidth=1.2, label=f"ensemble at the end{split}")
    longest = max(evals.values(), key=len)
    _mark(run, axes, max(r["step"] / (r["epoch"] + 1) for r in longest))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend(axes)
    return figure


def _rate(run: Run, steps: Mapping[str, Sequence[Record]]) -> Figure:
    figure, axes = canvas("Learning rate of each peer", "step", "learning rate")
    series = {name: ([float(r["step"]) for r in own], [float(r.get("lr") or 0.0) for r in own]) for name, own in steps.items()}
    groups: dict[tuple[tuple[float, ...], ...], list[str]] = {}
    for name, (xs, ys) in series.items():
        groups.setdefault((tuple(xs), tuple(ys)), []).append(name)
    for names in groups.values():
        who = ", ".join(names) if len(names) <= 6 else f"{names[0]} and {len(names) - 1} others"
        draw(axes, *series[names[0]], who, *_looks(run)[names[0]])
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def _wait(run: Run, steps: Mapping[str, Sequence[Record]]) -> Figure:
    figure, axes = canvas("Time a step waits for peers", "step", "share, %")
    for name, own in steps.items():
        draw(axes, *wait_points(own, PEERS_WAIT), name, *_looks(run)[name])
    axes.set_ylim(0, 100)
    _mark(run, axes, 1.0)
    legend(axes)
    return figure


def _mark(run: Run, axes: Axes, unit: float) -> None:
    """A line where a peer was lost or came back; `unit` is how many steps an axis unit has."""
    looks = _looks(run)
    for place, event in enumerate(run.events):
        colour = looks[event["peer"]][0] if event["peer"] in looks else INK
        lost = event["kind"] == "dropped"
        axes.axvline(event["step"] / unit, color=colour, linestyle=":" if lost else "-.", linewidth=1.0)
        axes.annotate(
            f"{event['peer']} {'lost' if lost else 'back'}",
            (event["step"] / unit, 0.98 - 0.08 * (place % 4)),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
        )
