"""Result dictionaries to rows and sentences. Pure functions; terminal, page and `raykd show` print the same strings.

A result is what <run folder>/result.json holds. Accuracies are shares in [0, 1] there and per cent here; epochs are counted
from 0 there and from 1 here.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raykd.report import peer_tables, words

Result = words.Result
HEAD = ("", "model", "parameters", "eval, last", "eval, best", "test", "numbers")
EXCHANGE_HEAD = (
    "teacher",
    "requests",
    "retries",
    "bytes a sample",
    "received",
    "sent",
    "teacher time",
    "client time",
    "codec error",
)


@dataclass(frozen=True)
class Row:
    """One model of a run: its accuracies (dictionaries of result.json, or None) and where they come from."""

    who: str
    model: str
    parameters: int | None
    last: Mapping[str, Any] | None
    best: Mapping[str, Any] | None
    test: Mapping[str, Any] | None
    source: str

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEAD."""
        parameters = "-" if self.parameters is None else words.quantity(self.parameters)
        last, best, test = (words.accuracy(found) for found in (self.last, self.best, self.test))
        return (self.who, self.model, parameters, last, best, test, self.source)


def rows(result: Result, stage: str = "") -> list[Row]:
    """The models of a run: its stages' students first, then its teachers, the student alone and the student distilled.

    Of a run of peers: each peer alone and together with the others, last the ensemble of all.
    """
    found: list[Row] = []
    for name, inner in (result.get("stages") or {}).items():
        found += rows(inner, f"{stage}{name}: ")
    for name, teacher in (result.get("teachers") or {}).items():
        found.append(_teacher(f"{stage}teacher {name}", teacher))
    if result.get("ensemble"):
        ensemble = result["ensemble"]
        found.append(_teacher(f"{stage}ensemble of {len(ensemble['teachers'])}", ensemble | {"model": ensemble["aggregate"]}))
    if result.get("peers"):
        return found + _peers(result, stage)
    if result.get("baseline"):
        found.append(_student(f"{stage}student alone", result["baseline"]))
    if result.get("student"):
        distilled = bool(result.get("teachers"))
        found.append(_student(f"{stage}student{' distilled' if distilled else ''}", result["student"]))
    return found


def comparisons(result: Result) -> list[str]:
    """Gain over the student alone and gap to each teacher, in points of top-1, where both were measured on the same split."""
    if result.get("peers"):
        return [text for text in (peer_tables.gains(result), *peer_tables.ensemble(result)) if text]
    student, baseline = result.get("student") or {}, result.get("baseline") or {}
    found = []
    both = words.both(student, baseline)
    if both is not None:
        measure, ours, alone = both
        found.append(f"Gain over the student alone: {words.points(ours - alone)} ({words.split(measure)}).")
    for name, teacher in (result.get("teachers") or {}).items():
        measure = "test" if teacher.get("split") == "test" else "last"
        reached = words.top1(student.get(measure))
        if reached is not None and teacher.get("split") in ("test", "eval") and teacher.get("top1") is not None:
            gap = teacher["top1"] - reached
            side = "below" if gap > 0 else "above"
            found.append(f"Gap to teacher {name}: the student is {100 * abs(gap):.2f} points {side} ({words.split(measure)}).")
    return found


def flags(result: Result) -> list[str]:
    """What should not be overlooked: a distilled student below its baseline, here and in stages."""
    found = [f"stage {name}: {flag}" for name, inner in (result.get("stages") or {}).items() for flag in flags(inner)]
    found += [
        f"Teacher {name} was lost at step {teacher['dropped_at']:,}; the others went on without it."
        for name, teacher in (result.get("teachers") or {}).items()
        if "dropped_at" in teacher
    ]
    if result.get("peers"):
        return found + peer_tables.flags(result)
    both = words.both(result.get("student") or {}, result.get("baseline") or {})
    if both is not None and both[1] < both[2]:
        measure, ours, alone = both
        found.append(
            f"The distilled student is below the student alone: {words.percent(ours)} against {words.percent(alone)} "
            f"({words.split(measure)}). Look at the losses' weights and at the teacher's accuracy; one seed may also be chance "
            "(--seeds)."
        )
    return found


def exchange(result: Result, images_per_request: float | None) -> list[tuple[str, ...]]:
    """Traffic with each teacher, in the order of EXCHANGE_HEAD.

    Args:
        result: of the run.
        images_per_request: images in one request of one worker; None: unknown, bytes a sample are left out.
    """
    found: list[tuple[str, ...]] = []
    for name, stats in (result.get("exchange") or {}).items():
        requests = stats.get("requests", 0)
        samples = requests * images_per_request if images_per_request else 0
        errors = ", ".join(f"{k} {v:.2g}" for k, v in (stats.get("errors") or {}).items())
        found.append(
            (
                name,
                f"{requests:,}",
                f"{stats.get('retries', 0):,}",
                f"{stats.get('bytes_in', 0) / samples:,.0f}" if samples else "-",
                words.size(stats.get("bytes_in", 0)),
                words.size(stats.get("bytes_out", 0)),
                words.duration(stats.get("teacher_s", 0.0)),
                words.duration(stats.get("client_s", 0.0)),
                errors or "none",
            )
        )
    return found


def seeds(results: Sequence[Result]) -> dict[str, Any]:
    """Several seeds of one job: the spread of top-1, last, best and test, of the student and of the student alone.

    Of peers: of each, together and alone, of what it gains (the difference within each seed), and of their ensemble.
    """
    found: dict[str, Any] = {
        "name": results[0].get("name", "") if results else "",
        "n": len(results),
        "seeds": [r.get("seed") for r in results],
        "folders": [str(r.get("folder", "")) for r in results],
        "source": words.HERE,
    }
    if any(r.get("peers") for r in results):
        return found | peer_tables.seeds(results)
    for who in ("student", "baseline"):
        inner = [r.get(who) or {} for r in results]
        measured = {m: words.spread(words.top1(i.get(m)) for i in inner) for m in words.MEASURES}
        found[who] = measured if any(inner) else None
    return found


def seed_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """`seeds` as text: who, last, best, test."""
    if summary.get("peers"):
        return peer_tables.seed_rows(summary)
    names = {"baseline": "student alone", "student": "student"}
    return [(names[who], *(words.spread_text(summary[who][m]) for m in words.MEASURES)) for who in names if summary.get(who)]


def origin(result: Result) -> dict[str, str]:
    """Seed, commit, hardware, date and time spent: where a result comes from."""
    found = {
        "seed": str(result.get("seed", "-")),
        "commit": str(result.get("commit") or "not a git checkout"),
        "hardware": _hardware(result.get("hardware")),
        "started": _date(result.get("started")),
        "took": words.duration(result["seconds"]) if result.get("seconds") is not None else "-",
        **(
            {f"peer {name} trained": _trained(p) for name, p in result["peers"].items()}
            if result.get("peers")
            else {"student trained": _trained(result.get("student") or {})}
        ),
        "folder": str(result.get("folder", "-")),
    }
    return {name: value for name, value in found.items() if value != "-"}


def _teacher(who: str, teacher: Mapping[str, Any]) -> Row:
    measured = {k: teacher[k] for k in ("top1", "top5", "count") if k in teacher} or None
    split = str(teacher.get("split", ""))
    source = str(teacher.get("source", words.HERE))
    if split and teacher.get("count") is not None:
        source += f" ({split}, {teacher['count']:,} images)"
    last, test = (None, measured) if split == "test" else (measured, None)
    return Row(who, str(teacher.get("model", "-")), teacher.get("parameters"), last, None, test, source)


def _student(who: str, student: Mapping[str, Any]) -> Row:
    counts = [(split, student.get(m)) for split, m in (("eval", "last"), ("test", "test"))]
    shown = "; ".join(f"{split}, {found['count']:,} images" for split, found in counts if found and found.get("count"))
    source = str(student.get("source", words.HERE)) + (f" ({shown})" if shown else "")
    return Row(
        who,
        str(student.get("model", "-")),
        student.get("parameters"),
        student.get("last"),
        student.get("best"),
        student.get("test"),
        source,
    )


def _trained(student: Mapping[str, Any]) -> str:
    steps = student.get("steps")
    trained = f"{steps:,} steps" if isinstance(steps, int) else "-"
    return trained + (f", {student['epochs']:g} epochs" if student.get("epochs") is not None else "")


def _peers(result: Result, stage: str) -> list[Row]:
    alone, found = result.get("baseline") or {}, []
    for name, peer in result["peers"].items():
        if alone.get(name):
            found.append(_student(f"{stage}peer {name} alone", alone[name]))
        row = _student(f"{stage}peer {name}" + (" together" if alone else ""), peer)
        found.append(row if "dropped_at" not in peer else replace(row, source=f"lost at step {peer['dropped_at']:,}"))
    if result.get("together"):
        found.append(_teacher(f"{stage}ensemble of {len(result['together']['peers'])} peers", result["together"]))
    return found


def _hardware(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "-"
    return str(value) if value else "-"


def _date(value: Any) -> str:
    if isinstance(value, (int, float)):
        return datetime.datetime.fromtimestamp(value).astimezone().isoformat(sep=" ", timespec="seconds")
    return str(value) if value else "-"
