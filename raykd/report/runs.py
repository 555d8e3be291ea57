"""What a run folder says: its result, its curves in a few numbers, its settings. `raykd show` and the page read it here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from raykd.errors import ConfigError
from raykd.report import peer_tables, tables, words
from raykd.report.console import print_table
from raykd.report.follow import PEERS_WAIT, Record, wait_share
from raykd.report.peer_watch import ROOM
from raykd.report.terminal import print_result
from raykd.roles.recorder import read

EDGE = 20


@dataclass(frozen=True)
class Run:
    """A run folder, read. `result` is None while the run is not finished; `job` is empty where job.json is missing.

    Of a run of peers, `peers` holds each one's folder, and `events` who was lost and who came back. `shown` is what records
    say of the grids of a run that makes its images.
    """

    folder: Path
    result: Mapping[str, Any] | None
    job: Mapping[str, Any]
    steps: Sequence[Record]
    evals: Sequence[Record]
    peers: Mapping[str, Run] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    shown: Sequence[Mapping[str, Any]] = ()


def load(folder: Path) -> Run:
    """Reads a run folder, finished or not.

    Raises:
        ConfigError: the folder holds neither a result nor metrics nor a job.
    """
    metrics = folder / "metrics.jsonl"
    places = {path.parent.name: path for path in sorted(folder.glob(f"{ROOM}/*/metrics.jsonl"))}
    if not places and not any((folder / name).is_file() for name in ("result.json", "metrics.jsonl", "job.json")):
        raise ConfigError(f"Folder {folder}: expected a run folder (job.json, metrics.jsonl, result.json), got none of these.")
    job = _json(folder / "job.json") or {}
    order = [name for name in job.get("peers") or {} if name in places] or list(places)
    peers = {n: Run(places[n].parent, None, {}, read(places[n], "step"), read(places[n], "eval")) for n in order}
    told = {n: [r for k in ("dropped", "rejoined") for r in read(places[n], k)] for n in order}
    happened = peer_tables.events({n: [*own, *peer_tables.noted(places[n].parent)] for n, own in told.items()})
    steps, evals = read(metrics, "step"), read(metrics, "eval")
    shown = [{"epoch": r["epoch"], **r["shown"]} for r in (evals or read(metrics, "shown")) if r.get("shown")]
    return Run(folder, _json(folder / "result.json"), job, steps, evals, peers, happened, shown)


def curves(run: Run) -> dict[str, Any]:
    """The curves in numbers: first and last loss by term, best evaluation, speed, waiting share, seconds an epoch."""
    steps = run.steps
    if not steps:
        return {"steps": 0}
    full = [r for r in steps if r.get("step_s") and r.get("images")]
    return {
        "steps": steps[-1]["step"],
        "epochs": steps[-1].get("epoch", 0) + 1,
        "loss": _edges([r.get("loss") for r in steps]),
        "terms": {name: _edges([r.get("terms", {}).get(name) for r in steps]) for name in _terms(steps)},
        "best_eval": max(run.evals, key=lambda r: r["top1"], default=None),
        "last_eval": run.evals[-1] if run.evals else None,
        "images_per_s": statistics.median(r["images"] / r["step_s"] for r in full) if full else None,
        "wait_share": wait_share(steps),
        "peer_wait_share": wait_share(steps, PEERS_WAIT) if any(PEERS_WAIT in r for r in steps) else None,
        "epoch_s": epoch_seconds(steps),
        "grad_norms": next((r["grad_norms"] for r in steps if r.get("grad_norms")), None),
    }


def epoch_seconds(steps: Sequence[Record]) -> float | None:
    """Median training time of an epoch, evaluation left out; the last epoch counts only where it is the only one."""
    sums: dict[int, float] = {}
    for record in steps:
        sums[record.get("epoch", 0)] = sums.get(record.get("epoch", 0), 0.0) + (record.get("step_s") or 0.0)
    whole = list(sums.values())[:-1] or list(sums.values())
    return statistics.median(whole) if whole else None


def images_per_request(run: Run) -> float | None:
    """Images in one request: a worker's share of a step's batch."""
    counts = [r["images"] for r in run.steps if r.get("images")]
    workers = (run.job.get("launch") or {}).get("workers") or 1
    return statistics.fmean(counts) / workers if counts else None


def as_json(run: Run) -> dict[str, Any]:
    """The run as plain data."""
    return {
        "folder": str(run.folder),
        "finished": run.result is not None,
        "result": run.result,
        "curves": curves(run),
        "job": run.job,
        **({"images": run.shown[-1]} if run.shown else {}),
        **({"peers": {name: curves(peer) for name, peer in run.peers.items()}, "events": run.events} if run.peers else {}),
    }


def print_run(console: Console, run: Run) -> None:
    """Prints a run: table, traffic, curves, origin."""
    if run.result is None:
        console.print(Text(f"{run.job.get('name', run.folder.name)}: not finished.", style="yellow"))
    else:
        print_result(console, run.result)
        traffic = tables.exchange(run.result, images_per_request(run))
        if traffic:
            print_table(console, tables.EXCHANGE_HEAD, traffic, "Exchange with the teachers")
    made = [f"Images made, epoch {last['epoch'] + 1}: {words.images(last)} ({last['file']})." for last in run.shown[-1:]]
    for line in all_curve_lines(run) + made:
        console.print(Text(line), soft_wrap=True)
    if run.result is None:
        console.print(Text(f"Go on with: raykd run --resume {run.folder}"), soft_wrap=True)
        return
    for name, value in tables.origin(run.result).items():
        console.print(Text(f"{name}: {value}"), soft_wrap=True)


def all_curve_lines(run: Run) -> list[str]:
    """`curves` in words; of a run of peers, a line each, and what happened to them."""
    if not run.peers:
        return curve_lines(curves(run))
    lines = [f"Peer {name}: {' '.join(curve_lines(curves(peer)))}" for name, peer in run.peers.items()]
    return lines + [f"{text[0].upper()}{text[1:]}." for text in map(peer_tables.event_text, run.events)]


def curve_lines(found: Mapping[str, Any]) -> list[str]:
    """`curves` in words."""
    if not found["steps"]:
        return ["No steps recorded."]
    lines = [f"{found['steps']:,} steps in {found['epochs']} epoch{'s' if found['epochs'] > 1 else ''}."]
    for name, edges in {"loss": found["loss"], **found["terms"]}.items():
        if edges is not None and not (name != "loss" and len(found["terms"]) == 1):
            lines.append(f"{name}: {edges[0]:.4g} at first, {edges[1]:.4g} at last (means of {EDGE} steps).")
    if found["best_eval"] is not None:
        lines.append(f"Best evaluation: epoch {found['best_eval']['epoch'] + 1}, {words.sentence(found['best_eval'])}.")
    if found["images_per_s"] is not None:
        lines.append(
            f"Speed: {found['images_per_s']:,.0f} img/s (median), {words.duration(found['epoch_s'])} an epoch (median)."
        )
    if found["peer_wait_share"] is not None:
        lines.append(f"Waiting for peers: {words.percent(found['peer_wait_share'], 1)} of the step time.")
    elif found["wait_share"] is not None:
        lines.append(f"Waiting for teachers: {words.percent(found['wait_share'], 1)} of the step time.")
    return lines


def print_seeds(console: Console, summary: Mapping[str, Any]) -> None:
    """Prints the spread over seeds."""
    body = tables.seed_rows(summary)
    title = f"{summary['name']}: top-1 over seeds {', '.join(map(str, summary['seeds']))}, per cent, mean ± standard deviation"
    print_table(console, ("", "eval, last", "eval, best", "test"), body, title)
    console.print(Text(f"All of it {summary['source']}; standard deviation with n - 1."))


def _edges(values: Sequence[float | None]) -> tuple[float, float] | None:
    known = [v for v in values if v is not None]
    return (statistics.fmean(known[:EDGE]), statistics.fmean(known[-EDGE:])) if known else None


def _terms(steps: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for r in steps for name in r.get("terms", {})))


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON, got something else ({error}). Is the disk full, or was it edited?") from None
