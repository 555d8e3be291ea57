"""Result dictionaries to rows and sentences. Pure functions; terminal, page and `raykd show` print the same strings.

A result is what <run folder>/result.json holds. Accuracies are shares in [0, 1] there and per cent here; epochs are counted
from 0 there and from 1 here.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
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
MEASURES = ("last", "best", "test")
HERE = "measured here"


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
        parameters = "-" if self.parameters is None else quantity(self.parameters)
        return (self.who, self.model, parameters, accuracy(self.last), accuracy(self.best), accuracy(self.test), self.source)


def rows(result: Result, stage: str = "") -> list[Row]:
    """The models of a run: its stages' students first, then its teachers, the student alone and the student distilled."""
    found: list[Row] = []
    for name, inner in (result.get("stages") or {}).items():
        found += rows(inner, f"{stage}{name}: ")
    for name, teacher in (result.get("teachers") or {}).items():
        found.append(_teacher(f"{stage}teacher {name}", teacher))
    if result.get("ensemble"):
        ensemble = result["ensemble"]
        found.append(_teacher(f"{stage}ensemble of {len(ensemble['teachers'])}", ensemble | {"model": ensemble["aggregate"]}))
    if result.get("baseline"):
        found.append(_student(f"{stage}student alone", result["baseline"]))
    if result.get("student"):
        distilled = bool(result.get("teachers"))
        found.append(_student(f"{stage}student{' distilled' if distilled else ''}", result["student"]))
    return found


def comparisons(result: Result) -> list[str]:
    """Gain over the student alone and gap to each teacher, in points of top-1, where both were measured on the same split."""
    student, baseline = result.get("student") or {}, result.get("baseline") or {}
    found = []
    both = _both(student, baseline)
    if both is not None:
        measure, ours, alone = both
        found.append(f"Gain over the student alone: {points(ours - alone)} ({_split(measure)}).")
    for name, teacher in (result.get("teachers") or {}).items():
        measure = "test" if teacher.get("split") == "test" else "last"
        reached = top1(student.get(measure))
        if reached is not None and teacher.get("split") in ("test", "eval") and teacher.get("top1") is not None:
            gap = teacher["top1"] - reached
            side = "below" if gap > 0 else "above"
            found.append(f"Gap to teacher {name}: the student is {100 * abs(gap):.2f} points {side} ({_split(measure)}).")
    return found


def flags(result: Result) -> list[str]:
    """What should not be overlooked: a distilled student below its baseline, here and in stages."""
    found = [f"stage {name}: {flag}" for name, inner in (result.get("stages") or {}).items() for flag in flags(inner)]
    found += [
        f"Teacher {name} was lost at step {teacher['dropped_at']:,}; the others went on without it."
        for name, teacher in (result.get("teachers") or {}).items()
        if "dropped_at" in teacher
    ]
    both = _both(result.get("student") or {}, result.get("baseline") or {})
    if both is not None and both[1] < both[2]:
        measure, ours, alone = both
        found.append(
            f"The distilled student is below the student alone: {percent(ours)} against {percent(alone)} ({_split(measure)}). "
            "Look at the losses' weights and at the teacher's accuracy; one seed may also be chance (--seeds)."
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
                size(stats.get("bytes_in", 0)),
                size(stats.get("bytes_out", 0)),
                duration(stats.get("teacher_s", 0.0)),
                duration(stats.get("client_s", 0.0)),
                errors or "none",
            )
        )
    return found


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1 in the denominator; None for a single value) and n of the values that are there."""
    known = [v for v in values if v is not None]
    mean = statistics.fmean(known) if known else None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": mean, "std": deviation, "n": len(known), "values": known}


def seeds(results: Sequence[Result]) -> dict[str, Any]:
    """Several seeds of one job: the spread of top-1, last, best and test, of the student and of the student alone."""
    found: dict[str, Any] = {
        "name": results[0].get("name", "") if results else "",
        "n": len(results),
        "seeds": [r.get("seed") for r in results],
        "folders": [str(r.get("folder", "")) for r in results],
        "source": HERE,
    }
    for who in ("student", "baseline"):
        inner = [r.get(who) or {} for r in results]
        measured = {m: spread(top1(i.get(m)) for i in inner) for m in MEASURES}
        found[who] = measured if any(inner) else None
    return found


def seed_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """`seeds` as text: who, last, best, test."""
    names = {"baseline": "student alone", "student": "student"}
    return [(names[who], *(_spread_text(summary[who][m]) for m in MEASURES)) for who in names if summary.get(who)]


def origin(result: Result) -> dict[str, str]:
    """Seed, commit, hardware, date and time spent: where a result comes from."""
    student = result.get("student") or {}
    steps = student.get("steps")
    trained = f"{steps:,} steps" if isinstance(steps, int) else "-"
    if student.get("epochs") is not None:
        trained += f", {student['epochs']:g} epochs"
    found = {
        "seed": str(result.get("seed", "-")),
        "commit": str(result.get("commit") or "not a git checkout"),
        "hardware": _hardware(result.get("hardware")),
        "started": _date(result.get("started")),
        "took": duration(result["seconds"]) if result.get("seconds") is not None else "-",
        "student trained": trained,
        "folder": str(result.get("folder", "-")),
    }
    return {name: value for name, value in found.items() if value != "-"}


def top1(found: Mapping[str, Any] | None) -> float | None:
    """Top-1 of an accuracy that may be missing."""
    value = found.get("top1") if found else None
    return None if value is None else float(value)


def accuracy(found: Mapping[str, Any] | None) -> str:
    """`91.23 / 99.80 (epoch 7)`: top-1 / top-5 in per cent."""
    if not found or found.get("top1") is None:
        return "-"
    text = f"{100 * found['top1']:.2f}"
    if found.get("top5") is not None:
        text += f" / {100 * found['top5']:.2f}"
    return text + (f" (epoch {found['epoch'] + 1})" if found.get("epoch") is not None else "")


def sentence(found: Mapping[str, Any]) -> str:
    """`top-1 91.23 %, top-5 99.80 % (360 images)`."""
    text = f"top-1 {percent(found['top1'])}"
    text += f", top-5 {percent(found['top5'])}" if found.get("top5") is not None else ""
    return text + (f" ({found['count']:,} images)" if found.get("count") is not None else "")


def percent(share: float | None, digits: int = 2) -> str:
    """A share of 1 as per cent."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of shares in points of per cent."""
    return f"{100 * difference:+.2f} points"


def quantity(number: float) -> str:
    """Parameters and multiply-adds as papers print them: 0.86 M, 125.8 M, 4.09 G; small ones as they are."""
    if number >= 1e9:
        return f"{number / 1e9:,.2f} G"
    if number >= 1e5:
        return f"{number / 1e6:.{2 if number < 1e7 else 1}f} M"
    return f"{number / 1e3:.1f} k" if number >= 1e3 else f"{number:g}"


def size(num_bytes: float) -> str:
    """Bytes in powers of 1000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """`8.3 s`, `12 min 05 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def title(path: str, name: str) -> str:
    """A training's path in words: "" is the job's name, "baseline" the student alone, "stages.a" stage a."""
    parts = path.split(".") if path else []
    words: list[str] = []
    for place, part in enumerate(parts):
        if part == "stages":
            words.append("stage")
        elif part == "baseline" and (place == 0 or parts[place - 1] != "stages"):
            words.append("student alone")
        else:
            words.append(part)
    return " ".join(words) or name


def plain(value: Any) -> Any:
    """JSON-ready data: numbers that are not finite become None, everything unknown its text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def flatten(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf of nested mappings."""
    if isinstance(data, Mapping) and data:
        for name, value in data.items():
            yield from flatten(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, data


def _teacher(who: str, teacher: Mapping[str, Any]) -> Row:
    measured = {k: teacher[k] for k in ("top1", "top5", "count") if k in teacher} or None
    split = str(teacher.get("split", ""))
    source = str(teacher.get("source", HERE))
    if split and teacher.get("count") is not None:
        source += f" ({split}, {teacher['count']:,} images)"
    last, test = (None, measured) if split == "test" else (measured, None)
    return Row(who, str(teacher.get("model", "-")), teacher.get("parameters"), last, None, test, source)


def _student(who: str, student: Mapping[str, Any]) -> Row:
    counts = [(split, student.get(m)) for split, m in (("eval", "last"), ("test", "test"))]
    shown = "; ".join(f"{split}, {found['count']:,} images" for split, found in counts if found and found.get("count"))
    source = str(student.get("source", HERE)) + (f" ({shown})" if shown else "")
    return Row(
        who,
        str(student.get("model", "-")),
        student.get("parameters"),
        student.get("last"),
        student.get("best"),
        student.get("test"),
        source,
    )


def _both(student: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """The measure on which both were measured (test before last), and both top-1."""
    for measure in ("test", "last"):
        ours, alone = top1(student.get(measure)), top1(baseline.get(measure))
        if ours is not None and alone is not None:
            return measure, ours, alone
    return None


def _split(measure: str) -> str:
    return "test" if measure == "test" else "eval, last epoch"


def _spread_text(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    deviation = f" ± {100 * found['std']:.2f}" if found["std"] is not None else ""
    return f"{100 * found['mean']:.2f}{deviation} (n = {found['n']})"


def _hardware(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "-"
    return str(value) if value else "-"


def _date(value: Any) -> str:
    if isinstance(value, (int, float)):
        return datetime.datetime.fromtimestamp(value).astimezone().isoformat(sep=" ", timespec="seconds")
    return str(value) if value else "-"
