"""How numbers and names are written: shares in per cent, epochs from 1, bytes, durations. Terminal, page and `show` agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Result = Mapping[str, Any]
MEASURES = ("last", "best", "test")
HERE = "measured here"
SHOWN = 6  # names that a line tells one by one


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


def images(shown: Mapping[str, Any]) -> str:
    """`9 of 10 classes, confidence 0.83, 71 % as wanted`: what teachers see in images that were shown."""
    classes = seen(shown)
    parts = [f"{sum(n > 0 for n in classes)} of {len(classes)} classes"] if sum(classes) else []
    parts += [f"confidence {shown['confidence']:.2f}"] if shown.get("confidence") is not None else []
    parts += [f"{percent(shown['wanted'], 0)} as wanted"] if shown.get("wanted") is not None else []
    return ", ".join(parts) or "nobody noted what teachers see"


def seen(shown: Mapping[str, Any]) -> list[int]:
    """How many of the images shown teachers see in each class; empty where a record does not say it."""
    return list(shown["classes"]) if "confidences" in shown else []


def several(shown: Mapping[str, str], values: Mapping[str, float]) -> str:
    """`a 1.2, b 1.5` for a few; of more than SHOWN the least and the most."""
    if len(shown) <= SHOWN:
        return ", ".join(f"{name} {text}" for name, text in shown.items())
    least, most = min(values, key=lambda n: values[n]), max(values, key=lambda n: values[n])
    return f"{least} {shown[least]} (least) to {most} {shown[most]} (most)"


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


def title(path: str, name: str, peers: bool = False) -> str:
    """A training's path in words: "" is the job's name, "baseline" the student (or peers) alone, "stages.a" stage a."""
    parts = path.split(".") if path else []
    words: list[str] = []
    for place, part in enumerate(parts):
        if part == "stages":
            words.append("stage")
        elif part == "baseline" and (place == 0 or parts[place - 1] != "stages"):
            words.append("peers alone" if peers else "student alone")
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


def both(student: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """The measure on which both were measured (test before last), and both top-1."""
    for measure in ("test", "last"):
        ours, alone = top1(student.get(measure)), top1(baseline.get(measure))
        if ours is not None and alone is not None:
            return measure, ours, alone
    return None


def split(measure: str) -> str:
    return "test" if measure == "test" else "eval, last epoch"


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1 in the denominator; None for a single value) and n of the values that are there."""
    known = [v for v in values if v is not None]
    mean = statistics.fmean(known) if known else None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": mean, "std": deviation, "n": len(known), "values": known}


def spread_text(found: Mapping[str, Any], signed: bool = False) -> str:
    if found["mean"] is None:
        return "-"
    deviation = f" ± {100 * found['std']:.2f}" if found["std"] is not None else ""
    return f"{100 * found['mean']:{'+' if signed else ''}.2f}{deviation} (n = {found['n']})"
