"""From segments to figures: medians over segments, ratios paired round by round. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gate import Segment

WARM_UP = 2  # first steps of a segment, not counted
MOST_STOLEN = 0.02  # above it no goal is judged
RARE_BY_DEFAULT = 200  # steps between two measurements of gradient norms: training.grad_norms_every


@dataclass(frozen=True)
class Figure:
    """A median, and the least and greatest value it was taken over."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """From values, one a segment or round."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Comparison:
    """A ratio of two rows with its goal, if it has one."""

    name: str
    above: str
    below: str
    throughput: bool = False  # of images a second; else of seconds a step
    goal: float | None = None

    def met(self, ratio: float) -> bool | None:
        """Whether a ratio reaches the goal."""
        if self.goal is None:
            return None
        return ratio >= self.goal if self.throughput else ratio <= self.goal


COMPARISONS = (
    Comparison("inline / hand-written, time", "inline", "hand", goal=1.03),
    Comparison("pool / ceiling, throughput", "pool", "ceiling", throughput=True, goal=0.97),
    Comparison("store / student-only, throughput", "store", "student", throughput=True, goal=0.97),
    Comparison("building a store / plain inference loop, throughput", "build", "infer", throughput=True, goal=0.95),
    Comparison("pool / student-only, throughput", "pool", "student", throughput=True),
    Comparison("ceiling / student-only, throughput", "ceiling", "student", throughput=True),
    Comparison("pool / hand-written, throughput", "pool", "hand", throughput=True),
    Comparison("torchdistill / hand-written, time", "torchdistill", "hand"),
    Comparison("torchdistill / inline, time", "torchdistill", "inline"),
)


def step_seconds(segments: Sequence[Segment], rare_every: int = 0, spread: int = RARE_BY_DEFAULT) -> list[float]:
    """Mean seconds a step of each segment.

    Args:
        segments: of one row.
        rare_every: steps k, 2k, ... do more work (raykd measures gradient norms there). They are left out of the means, and
            what they cost more is added to every step in equal parts: a segment holds too few steps for its fair share.
        spread: over how many steps, as many as lie between two of them in a job that does not say.
    """
    usual = [_usual(segment, rare_every) for segment in segments]
    share = rare_share(segments, rare_every, spread)
    return [statistics.fmean(values) + share for values in usual if values]


def rare_share(segments: Sequence[Segment], every: int, spread: int = RARE_BY_DEFAULT) -> float:
    """Seconds that rare steps add to each step, on average, each beside its own segment's usual ones; 0 if none."""
    extra = [
        seconds - statistics.median(_usual(segment, every))
        for segment in segments
        for k, seconds in enumerate(segment.seconds, segment.first)
        if every and k and k % every == 0 and _usual(segment, every)
    ]
    return max(statistics.median(extra), 0.0) / spread if extra else 0.0


def _usual(segment: Segment, every: int) -> list[float]:
    """Seconds of the steps that count and are not rare."""
    counted = list(enumerate(segment.seconds, segment.first))[WARM_UP:]
    return [s for k, s in counted if not every or k % every]


def stolen(segments: Mapping[str, Sequence[Segment]]) -> float:
    """Share of the time that other processes took from us: rows that compute in one process should be on a CPU all the time.

    The mean over their segments, so that a few disturbed rounds show too.
    """
    own = [s for name in ("student", "hand", "inline") for s in segments.get(name, ())]
    shares = [max(1 - s.counters["cpu_s"] / sum(s.seconds), 0.0) for s in own]
    return statistics.fmean(shares) if shares else 0.0


def counters(segments: Sequence[Segment]) -> dict[str, float]:
    """Counters a step, medians over segments."""
    names = segments[0].counters if segments else {}
    return {n: statistics.median([s.counters[n] / len(s.seconds) for s in segments]) for n in names}


def summary(segments: Mapping[str, Sequence[Segment]], batch_size: int, rare_every: int) -> list[dict[str, Any]]:
    """One dictionary a row: milliseconds a step, images a second, counters a step."""
    found = []
    for name, own in segments.items():
        figure = Figure.of([1e3 * s for s in step_seconds(own, rare(name, rare_every))])
        found.append(
            {
                "row": name,
                "step_ms": vars(figure),
                "images_s": 1e3 * batch_size / figure.median,
                "steps": sum(len(s.seconds) for s in own),
                **{f"{n}_per_step": v for n, v in counters(own).items()},
            }
        )
    return found


def rare_ms(segments: Mapping[str, Sequence[Segment]], every: int) -> dict[str, float]:
    """Row -> milliseconds a step for measuring gradient norms, where it was seen."""
    shares = {name: 1e3 * rare_share(own, rare(name, every)) for name, own in segments.items()}
    return {name: ms for name, ms in shares.items() if ms}


def rare(row: str, every: int) -> int:
    """Rows that measure gradient norms."""
    return every if row in ("student", "ceiling", "inline", "pool", "store") else 0


def ratios(segments: Mapping[str, Sequence[Segment]], rare_every: int) -> list[dict[str, Any]]:
    """Every comparison whose two rows are there: medians over rounds of the ratio within a round; unjudged if disturbed."""
    found, quiet = [], stolen(segments) <= MOST_STOLEN
    for comparison in COMPARISONS:
        if not {comparison.above, comparison.below} <= segments.keys():
            continue
        above, below = (step_seconds(segments[n], rare(n, rare_every)) for n in (comparison.above, comparison.below))
        pairs = [(b / a if comparison.throughput else a / b) for a, b in zip(above, below)]
        figure = Figure.of(pairs)
        found.append(
            {
                "name": comparison.name,
                "ratio": vars(figure),
                "goal": comparison.goal,
                "met": comparison.met(figure.median) if quiet else None,
            }
            | {"throughput": comparison.throughput}
        )
    return found
