"""What a sweep leaves on disk, and the table of its trials, read from their folders.

plan.json  job.json  space.pkl        what was asked for: `--resume` needs nothing else
trials/<name>/                        job.json, metrics.jsonl, checkpoints/ of every trial
tune/  store/  stages/  winner/       Tune's state, kept outputs, finished stages, the winner's runs
sweep.json  trials.csv  best_job.json sweep.png
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raykd.roles import recorder
from raykd.sweep.trial import ERROR, EXPLOITS, LIVES, METRICS

SWEEP, CSV, BEST = "sweep.json", "trials.csv", "best_job.json"
Row = dict[str, Any]


def row(folder: Path, name: str, settings: Mapping[str, Any], epochs: int, state: str) -> Row:
    """One trial as its folder tells it.

    Args:
        folder: of the sweep.
        name: of the trial.
        settings: job path -> value; those it was started with.
        epochs: of a whole trial.
        state: Tune's: pending | running | paused | ended | failed.
    """
    place = folder / "trials" / name
    evals = recorder.read(place / METRICS, "eval")
    lives = [json.loads(p.read_text()) for p in sorted((place / LIVES).glob("*.json"))]
    fault = json.loads((place / ERROR).read_text()) if (place / ERROR).is_file() else None
    done = int(evals[-1]["epoch"]) + 1 if evals else 0
    best = max(evals, key=lambda r: r["top1"], default=None)
    exploits = _lines(place / EXPLOITS)
    return {
        "trial": name,
        "settings": dict(settings),
        "status": _status(state, done, epochs, fault),
        "epoch": done,
        "epochs": epochs,
        "last": evals[-1]["top1"] if evals else None,
        "best": best["top1"] if best else None,
        "best_epoch": int(best["epoch"]) + 1 if best else None,
        "seconds": round(sum(life["seconds"] for life in lives), 3),
        "forwards": sum(life["forwards"] for life in lives),
        "curve": [r["top1"] for r in evals],
        "exploits": exploits,
        "error": fault,
    }


def _status(state: str, done: int, epochs: int, fault: Mapping[str, Any] | None) -> str:
    """finished | stopped (by the scheduler) | diverged | failed, or Tune's own while it is not over."""
    if fault is not None:
        return "diverged" if fault["type"] == "DivergenceError" else "failed"
    if state != "ended":
        return state
    return "finished" if done >= epochs else "stopped"


def best_of(rows: Sequence[Row]) -> Row | None:
    """The winner: the best accuracy at the end, among trials that went all the way if there are any."""
    judged = [r for r in rows if r["last"] is not None and r["error"] is None]
    whole = [r for r in judged if r["status"] == "finished"] or judged
    return max(whole, key=lambda r: r["last"], default=None)


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """Reads a file of ours."""
    return json.loads(path.read_text())


def mark(folder: Path, name: str) -> tuple[int, ...]:
    """Changes when a trial's folder does."""
    place = folder / "trials" / name
    files = (place / METRICS, place / LIVES, place / ERROR, place / EXPLOITS)
    return tuple(p.stat().st_mtime_ns if p.exists() else 0 for p in files)


def write_csv(path: Path, rows: Sequence[Row], paths: Sequence[str]) -> None:
    """Writes the trials as a table, a column a searched path; whole losses as JSON."""
    measures = ("status", "epoch", "epochs", "last", "best", "best_epoch", "seconds", "forwards")
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["trial", *paths, *measures])
        for r in rows:
            values = [r["settings"].get(p) for p in paths]
            shown = [json.dumps(v) if isinstance(v, (dict, list)) else v for v in values]
            table.writerow([r["trial"], *shown, *(r[m] for m in measures)])


def _lines(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
