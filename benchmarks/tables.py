"""A run's findings as tables: the same cells for the terminal and for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.measure import MOST_STOLEN, RARE_BY_DEFAULT

LABELS = {
    "student": "student only",
    "ceiling": "ceiling: student only + the teacher elsewhere",
    "hand": "hand-written loop",
    "inline": "raykd inline",
    "pool": "raykd pool, 1 replica",
    "store": "raykd from a store",
    "build": "raykd building a store",
    "infer": "plain inference loop",
    "torchdistill": "torchdistill",
}
Findings = Mapping[str, Any]


class Table(NamedTuple):
    """A title, column heads, rows of text."""

    title: str
    head: Sequence[str]
    body: list[Sequence[str]]


def tables(found: Findings) -> Iterator[Table]:
    """All tables of a run that have rows."""
    if found.get("rows"):
        yield Table(
            "ResNet-32 -> ResNet-20, CIFAR-10, batch 128, one torch thread a process",
            ("row", "ms a step", "images/s", "CPU ms a step", "page faults a step", "last loss"),
            [_row(row) for row in found["rows"]],
        )
    if found.get("ratios"):
        yield Table("Ratios, paired by round", ("ratio", "median", "goal", ""), [_ratio(r) for r in found["ratios"]])
    if found.get("pool"):
        yield Table("What the pool costs, a step", ("", "", ""), [_cells(line) for line in _pool(found["pool"])])
    if found.get("store_bytes"):
        yield _store(found["store_bytes"])
    if found.get("simulated"):
        yield Table(
            "Simulated devices: student step 200 ms, batch 32 of 3x224x224; goal pool / student only >= 0.97; bytes a sample",
            (
                "students x replicas",
                "teacher ms",
                "answer",
                "sent",
                "pool / student only",
                "",
                "wait %",
                "client CPU ms",
                "teacher CPU ms",
                "bound",
                "B out",
                "B in",
            ),
            [_simulated(row) for row in found["simulated"]],
        )


def _store(sizes: Mapping[str, Mapping[str, int]]) -> Table:
    codecs = list(dict.fromkeys(codec for own in sizes.values() for codec in own))
    body = [[loss, *(f"{own[c]:,}" if c in own else "-" for c in codecs)] for loss, own in sizes.items()]
    return Table("What a store keeps of ResNet-32, bytes a sample and epoch", ("loss", *codecs), body)


def notes(found: Findings) -> list[str]:
    """Lines below the tables."""
    lines = [f"{key}: {value}" for key, value in found["about"].items()]
    if found.get("stolen") is not None:
        lines.append(
            f"time that other processes took: {100 * found['stolen']:.1f} % (above {100 * MOST_STOLEN:.0f} % no goal is judged)"
        )
    if found.get("agreement") is not None:
        lines.append(
            f"loss of raykd and of the hand-written loop, same start and batches, 2 steps: {found['agreement']:.1e} apart"
        )
    if found.get("grad_norms_ms"):
        shown = ", ".join(f"{LABELS[n]} {ms:.1f}" for n, ms in found["grad_norms_ms"].items())
        lines.append(
            f"of raykd's ms a step, for measuring gradient norms every {RARE_BY_DEFAULT} steps, spread over them: {shown}"
        )
    return lines + [f"not run: {LABELS.get(name, name)}: {why}" for name, why in found.get("skipped", {}).items()]


def markdown(found: Findings) -> str:
    """Tables and notes for docs/benchmarks.md."""
    parts = []
    for table in tables(found):
        lines = [f"**{table.title}**", "", f"| {' | '.join(table.head)} |", f"|{' --- |' * len(table.head)}"]
        parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table.body)]))
    parts.append("\n".join(f"- {line}" for line in notes(found)))
    return "\n\n".join(parts)


def _row(row: Findings) -> Sequence[str]:
    loss = f"{row['loss']:.2f}" if row.get("loss") is not None else "-"
    ms, cpu = _figure(row["step_ms"], 1), f"{1e3 * row['cpu_s_per_step']:.0f}"
    return LABELS[row["row"]], ms, f"{row['images_s']:.0f}", cpu, f"{row['faults_per_step']:.0f}", loss


def _ratio(row: Findings) -> Sequence[str]:
    sign = ">=" if row["throughput"] else "<="
    goal = "" if row["goal"] is None else f"{sign} {row['goal']:.2f}"
    return row["name"], _figure(row["ratio"], 3), goal, _mark(row["met"])


def _figure(value: Mapping[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} [{value['least']:.{digits}f} .. {value['greatest']:.{digits}f}]"


def _mark(met: bool | None) -> str:
    return {None: "", True: "met", False: "MISSED"}[met]


def _pool(pool: Findings) -> Iterator[tuple[str, float, str]]:
    yield "process CPU of the student, beyond student only (KD loss included)", pool["client_extra_ms"], "ms"
    yield "of it measured in the client: sending, receiving, decoding", pool["client_own_ms"], "ms"
    yield "process CPU of the replica", pool["teacher_cpu_ms"], "ms"
    yield "of it answering (wall clock: model, normalising, encoding)", pool["answer_ms"], "ms"
    yield "bytes a sample, out", pool["bytes_out"], ""
    yield "bytes a sample, in", pool["bytes_in"], ""
    yield "waiting for signals, median", pool["wait_ms"], "ms"


def _cells(line: tuple[str, float, str]) -> Sequence[str]:
    text, value, unit = line
    return text, f"{value:.2f}" if unit else f"{value:.0f}", unit


def _simulated(row: Findings) -> Sequence[str]:
    return (
        f"{row['students']} x {row['replicas']}",
        f"{row['teacher_ms']:.0f}",
        row["payload"],
        row["inputs"],
        f"{row['ratio']:.3f}",
        _mark(row["met"]),
        f"{100 * row['wait_share']:.1f}",
        f"{row['client_cpu_ms']:.1f}",
        f"{row['teacher_beside_ms']:.1f}",
        f"{row['bound_ms']:.1f}",
        f"{row['bytes_out']:.0f}",
        f"{row['bytes_in']:.0f}",
    )
