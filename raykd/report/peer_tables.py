"""What a run of peers, or a student with branches, has to tell: gains, ensemble, edges, branches, who was lost (pure)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raykd.report import words
from raykd.report.follow import Record
from raykd.report.words import Result

EDGES = ("edge", "messages", "bytes a message", "bytes a step", "received", "waited", "share of the time", "age, steps")
EDGES_NOTE = (
    "a > b: a teaches b. Counted at b's first worker, since its last start: bytes of signals or weights, protocol left out; "
    "what b waited for a, neighbours in turn, so that the first takes the wait that all have in common. Age: how much older "
    "than b's own step the copy of a was, mean and most; 0 where signals are exchanged."
)
MOST = 30  # rows of edges
BRANCHES = ("", "top-1 / top-5", "split")


def edges(result: Result) -> list[tuple[str, ...]]:
    """One row an edge, in the order of EDGES; of more than MOST edges one row a learner, its edges summed."""
    peers, found = result.get("peers") or {}, result.get("edges") or {}
    if len(found) <= MOST:
        pairs = {name: name.partition(">") for name in found}
        return [_edge_row(f"{s} > {t}", [found[name]], peers.get(t) or {}) for name, (s, _, t) in pairs.items()]
    into: dict[str, list[Mapping[str, Any]]] = {}
    for name, edge in found.items():
        into.setdefault(name.partition(">")[2], []).append(edge)
    return [_edge_row(f"{target} from {len(own)} peers", own, peers.get(target) or {}) for target, own in into.items()]


def _edge_row(who: str, own: Sequence[Mapping[str, Any]], learner: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = [edge_numbers(edge, learner) for edge in own]
    messages, num_bytes = (sum(edge.get(name, 0) for edge in own) for name in ("messages", "bytes_in"))
    a_step, share = (_sum([n[name] for n in numbers]) for name in ("bytes_a_step", "wait_share"))
    ages = [n["age"] or 0.0 for n in numbers]
    most = max(edge.get("stalest", 0) for edge in own)
    return (
        who,
        f"{messages:,}",
        words.size(num_bytes / messages) if messages else "-",
        "-" if a_step is None else words.size(a_step),
        words.size(num_bytes),
        words.duration(sum(edge.get("wait_s", 0.0) for edge in own)),
        words.percent(share, 1),
        f"{statistics.fmean(ages):.1f}, most {most:,}" if most else "0",
    )


def _sum(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def edge_numbers(edge: Mapping[str, Any], learner: Mapping[str, Any]) -> dict[str, float | None]:
    """An edge's shares: bytes a step of its learner, waiting as a share of its time, mean age of the copy.

    The first message is the probe's, before the first step.
    """
    messages, num_bytes = edge.get("messages", 0), edge.get("bytes_in", 0)
    steps, seconds = learner.get("steps_this_time") or 0, learner.get("seconds") or 0.0
    return {
        "bytes_a_step": num_bytes / messages * max(messages - 1, 0) / steps if messages and steps else None,
        "wait_share": edge.get("wait_s", 0.0) / seconds if seconds else None,
        "age": edge["stale_steps"] / steps if edge.get("stale_steps") and steps else None,
    }


def branches(result: Result) -> list[tuple[str, ...]]:
    """One row a branch and one for their ensemble, of the student or each peer that has several; in the order of BRANCHES."""
    found: list[tuple[str, ...]] = []
    for who, model in {"": result.get("student") or {}, **(result.get("peers") or {})}.items():
        measured = model.get("branches") or {}
        each = measured.get("each") or []
        if len(each) < 2:
            continue
        head = f"peer {who}: " if who else ""
        for place, accuracy in enumerate(each):
            kept = ", the plain model" if place == 0 else ""
            found.append((f"{head}branch {place}{kept}", words.accuracy(accuracy), str(measured.get("split", "-"))))
        ensemble = words.accuracy(measured.get("ensemble"))
        found.append((f"{head}ensemble of {len(each)}", ensemble, str(measured.get("split", "-"))))
    return found


def noted(folder: Path) -> list[Record]:
    """That a peer was dropped, as its own folder says; it need not have been heard by anybody."""
    try:
        found = json.loads((folder / "dropped.json").read_text())
    except (OSError, ValueError):
        return []
    return [{"kind": "dropped", "step": int(found["step"]), "peers": [folder.name]}]


def events(records: Mapping[str, Iterable[Record]]) -> list[dict[str, Any]]:
    """Peers that were lost or came back, in the order of the steps.

    Args:
        records: peer -> its records of the kinds "dropped" and "rejoined", and what is `noted` of it.

    Returns:
        `{"kind": "dropped", "peer", "step", "by"}`: the first step without it, of those in `by` that noticed first; where
            nobody did, the last step of its own;
        `{"kind": "rejoined", "peer", "step", "version"}`: where it came in again, and the step its weights were of.
    """
    lost: dict[str, dict[str, Any]] = {}
    itself: dict[str, int] = {}
    found: list[dict[str, Any]] = []
    for name, own in records.items():
        for record in own:
            step = int(record.get("step", 0))
            if record.get("kind") == "rejoined":
                found.append({"kind": "rejoined", "peer": name, "step": step, "version": record.get("version")})
            elif record.get("kind") == "dropped":
                itself |= {peer: step for peer in record.get("peers", ()) if peer == name}
                for peer in (p for p in record.get("peers", ()) if p != name):
                    known = lost.setdefault(peer, {"kind": "dropped", "peer": peer, "step": step, "by": []})
                    if step < known["step"]:
                        known |= {"step": step, "by": []}
                    if step == known["step"] and name not in known["by"]:
                        known["by"].append(name)
    alone = {p: {"kind": "dropped", "peer": p, "step": step, "by": []} for p, step in itself.items()}
    lost = {**alone, **lost}
    return sorted([*lost.values(), *found], key=lambda e: (e["step"], e["kind"], e["peer"]))


def event_text(event: Mapping[str, Any]) -> str:
    """An event in words."""
    if event["kind"] == "dropped" and not event["by"]:
        return f"peer {event['peer']} is lost after its step {event['step']:,}; the others went on without it"
    if event["kind"] == "dropped":
        by = ", ".join(event["by"]) if len(event["by"]) <= words.SHOWN else f"{len(event['by'])} others"
        return f"peer {event['peer']} is lost; {by} went on without it from step {event['step']:,}"
    behind = event["step"] - event["version"] if event.get("version") is not None else 0
    of = f" with weights {behind:,} step{'s' if behind > 1 else ''} behind" if behind > 0 else ""
    return f"peer {event['peer']} was started again; it joined at step {event['step']:,}{of}"


def gains(result: Result) -> str | None:
    """What each peer gains over itself alone; of many, the mean and both ends."""
    measured = _beside_alone(result)
    if not measured:
        return None
    gained = {name: ours - alone for name, (_, ours, alone) in measured.items()}
    shown = words.several({name: words.points(gain) for name, gain in gained.items()}, gained)
    mean = words.points(statistics.fmean(gained.values()))
    return f"Gain of each peer over itself alone: {shown}; mean {mean} ({_split(measured)})."


def ensemble(result: Result) -> list[str]:
    """The peers' ensemble beside the best of them on the same split, and how much they differ."""
    together = result.get("together")
    if not together:
        return []
    measure = "test" if together.get("split") == "test" else "last"
    reached = {name: value for name, peer in result["peers"].items() if (value := words.top1(peer.get(measure))) is not None}
    found = []
    if reached:
        best = max(reached, key=lambda name: reached[name])
        gap = together["top1"] - reached[best]
        beside = f"{100 * abs(gap):.2f} points {'above' if gap >= 0 else 'below'} the best peer, {best}"
        found.append(f"Ensemble (mean of probabilities): {beside} ({words.split(measure)}).")
    apart = f"{words.percent(together['disagree'])} of the images, their probabilities by {together['distance']:.3f} (L2)"
    return [*found, f"The peers' first choices differ on {apart}; both are means over pairs of peers."]


def flags(result: Result) -> list[str]:
    """Peers that were lost, started again, or are worse off than alone."""
    found = []
    for name, peer in result["peers"].items():
        if "dropped_at" in peer:
            found.append(f"Peer {name} was lost at step {peer['dropped_at']:,}; the others went on without it.")
        if peer.get("respawned"):
            times = f"{peer['respawned']} times" if peer["respawned"] > 1 else "once"
            found.append(f"Peer {name} was lost and started again from its checkpoint, {times}.")
    measured = _beside_alone(result)
    below = [
        f"{name} {words.percent(ours)} against {words.percent(alone)}"
        for name, (_, ours, alone) in measured.items()
        if ours < alone
    ]
    if below:
        found.append(f"Below what they reach alone: {', '.join(below)} ({_split(measured)}). One seed may be chance (--seeds).")
    return found


def seeds(results: Sequence[Result]) -> dict[str, Any]:
    """Several seeds of one job of peers: the spread of each peer together, alone and of its gain, and of the ensemble."""
    found: dict[str, Any] = {"student": None, "baseline": None, "peers": {}}
    for name in dict.fromkeys(name for r in results for name in r.get("peers") or {}):
        ours = [(r.get("peers") or {}).get(name) or {} for r in results]
        alone = [(r.get("baseline") or {}).get(name) or {} for r in results]
        own: dict[str, Any] = {"together": _spreads(ours), "alone": None, "gain": None}
        if any(alone):
            own["alone"] = _spreads(alone)
            own["gain"] = {m: words.spread(_gain(a, b, m) for a, b in zip(ours, alone)) for m in words.MEASURES}
        found["peers"][name] = own
    measured = [r.get("together") or {} for r in results]
    split = next((t["split"] for t in measured if t.get("split")), None)
    of_all = {name: words.spread(t.get(name) for t in measured) for name in ("top1", "disagree", "distance")}
    return found | {"ensemble": of_all | {"split": split} if split else None}


def seed_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """`seeds` as text: who, last, best, test."""
    found: list[tuple[str, str, str, str]] = []
    for name, own in summary["peers"].items():
        shown = {"alone": f"peer {name} alone", "together": f"peer {name}", "gain": f"peer {name}, gain"}
        for kind, who in shown.items():
            if own.get(kind):
                last, best, test = (words.spread_text(own[kind][m], signed=kind == "gain") for m in words.MEASURES)
                found.append((who, last, best, test))
    of_all = summary.get("ensemble")
    if of_all:
        text = words.spread_text(of_all["top1"])
        found.append(("ensemble of the peers", *(("-", "-", text) if of_all["split"] == "test" else (text, "-", "-"))))
    return found


def _beside_alone(result: Result) -> dict[str, tuple[str, float, float]]:
    """Peer -> the measure, its top-1 together and alone, of those that have both."""
    alone = result.get("baseline") or {}
    pairs = {name: words.both(peer, alone.get(name) or {}) for name, peer in result["peers"].items()}
    return {name: pair for name, pair in pairs.items() if pair is not None}


def _split(measured: Mapping[str, tuple[str, float, float]]) -> str:
    return words.split(next(iter(measured.values()))[0])


def _spreads(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {m: words.spread(words.top1(model.get(m)) for model in models) for m in words.MEASURES}


def _gain(ours: Mapping[str, Any], alone: Mapping[str, Any], measure: str) -> float | None:
    a, b = words.top1(ours.get(measure)), words.top1(alone.get(measure))
    return None if a is None or b is None else a - b
