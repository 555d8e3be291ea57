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
PLOT = "peers.png"
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


def peer_tables(found: Findings) -> Iterator[Table]:
    """The tables of peers that have rows."""
    quiet = found.get("peers_stolen", 0.0) <= MOST_STOLEN
    if found.get("peers"):
        yield Table(
            "CIFAR-10, dml, batch 128, an actor each (+: they share one), one torch thread an actor: ms a step of the "
            "slowest; bound: the slowest alone, or the work of all / cores if there are fewer; goal together / bound <= 1.05",
            ("crd_resnet", "cores", "alone", "work / cores", "together", "together / bound", "", "CPU / alone", "wait %"),
            [_peers(row, quiet) for row in found["peers"]],
        )
    if found.get("exchange"):
        yield Table(
            "Simulated peers: step 200 ms, logits of 1000 classes, batch 32; per step",
            (
                "peers",
                "graph",
                "messages",
                "B out a peer",
                "alone ms",
                "longer by ms",
                "%",
                "CPU ms a peer",
                "CPU ms a message",
            ),
            [_exchange(row) for row in found["exchange"]],
        )
    if found.get("slow"):
        yield Table(
            "Three simulated peers, one three times slower: the other two",
            ("exchange", "ms a step", "alone ms", "throughput / alone", "", "B out a step"),
            [_slow(row) for row in found["slow"]],
        )


def _peers(row: Findings, quiet: bool) -> Sequence[str]:
    times = [_figure(row[key], 0) for key in ("alone_ms", "work_ms", "together_ms")]
    met = _mark(row["met"] if quiet else None)
    shares = f"{row['cpu_ratio']:.3f}", f"{100 * row['wait_share']:.1f}"
    return row["models"], str(row["cores"]), *times, _figure(row["ratio"], 3), met, *shares


def _exchange(row: Findings) -> Sequence[str]:
    each = row["cpu_ms"]["median"] * row["peers"] / row["messages"]
    sent = f"{row['messages']:.0f}", f"{row['bytes_out']:,.0f}"
    longer = _figure(row["longer_ms"], 1), f"{100 * row['longer']:.1f}"
    alone = f"{row['alone_ms']['median']:.1f}"
    return str(row["peers"]), row["graph"], *sent, alone, *longer, _figure(row["cpu_ms"], 1), f"{each:.1f}"


def _slow(row: Findings) -> Sequence[str]:
    ms = _figure(row["step_ms"], 1), _figure(row["alone_ms"], 1)
    modes = {"signals": "signals of the same step", "newest": "weights (14 MB, every 10 steps), the newest"}
    return modes[row["mode"]], *ms, _figure(row["ratio"], 3), _mark(row["met"]), f"{row['bytes_out']:,.0f}"


def making_tables(found: Findings) -> Iterator[Table]:
    """The tables of made images that have rows."""
    if found.get("makers"):
        own = found["makers"][0]
        yield Table(
            f"Synthesizers: batches of {own['batch']} images of 3x32x32, {own['updates']} updates each of a generator through "
            "ResNet-20, one torch thread a process",
            ("synthesizers", "images/s", "/ one", "B a batch"),
            [
                (str(r["makers"]), _figure(r["images_s"], 1), _figure(r["ratio"], 2), f"{r['batch_bytes']:,}")
                for r in found["makers"]
            ],
        )
    if found.get("bank"):
        own = found["bank"][0]
        yield Table(
            f"Simulated synthesizers, {own['batch_s']:g} s a batch of 32 images of 3x32x32, beside a student whose step is "
            f"{1e3 * own['step_s']:g} ms",
            (
                "synthesizers",
                "batches/s",
                "efficiency",
                "student: ms a step",
                "at work %",
                "waits for the bank %",
                "most ms",
                "CPU ms a step",
            ),
            [_bank(row) for row in found["bank"]],
        )
    if found.get("gradient"):
        own = found["gradient"][0]
        yield Table(
            f"Logits of ResNet-20 for {own['batch']} images and the gradient at these, one torch thread: the teacher in this "
            f"process, or on a replica; the gradients are {own['error']:.0e} apart; bytes an image",
            ("teacher", "forward ms", "backward ms", "both / here", "client CPU ms", "B out", "B in", "backward B out", "B in"),
            [_gradient(row) for row in found["gradient"]],
        )


def _bank(row: Findings) -> Sequence[str]:
    shares = f"{100 * row['busy_share']:.1f}", f"{100 * row['wait_share']:.2f}"
    ms = f"{row['wait_ms_most']:.1f}", f"{row['cpu_ms']:.1f}"
    return str(row["makers"]), f"{row['batches_s']:.2f}", f"{row['efficiency']:.3f}", f"{row['step_ms']:.1f}", *shares, *ms


def _gradient(row: Findings) -> Sequence[str]:
    times = _figure(row["forward_ms"], 1), _figure(row["backward_ms"], 1), _figure(row["ratio"], 2), f"{row['client_ms']:.1f}"
    sent = [f"{row[key]:,.0f}" for key in ("forward_out", "forward_in", "backward_out", "backward_in")]
    return row["place"], *times, *sent


def _store(sizes: Mapping[str, Mapping[str, int]]) -> Table:
    codecs = list(dict.fromkeys(codec for own in sizes.values() for codec in own))
    body = [[loss, *(f"{own[c]:,}" if c in own else "-" for c in codecs)] for loss, own in sizes.items()]
    return Table("What a store keeps of ResNet-32, bytes a sample and epoch", ("loss", *codecs), body)


def notes(found: Findings) -> list[str]:
    """Lines below the tables."""
    lines = [f"{key}: {value}" for key, value in found["about"].items()]
    if found.get("peers"):
        lines.append(f"time that other processes took from the peers: {100 * found['peers_stolen']:.1f} %")
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


def markdown(found: Findings) -> dict[str, str]:
    """Part of docs/benchmarks.md -> its tables and notes, of the parts that were measured."""
    parts = {"measured": list(tables(found)), "peers": list(peer_tables(found)), "making": list(making_tables(found))}
    below = "\n".join(f"- {line}" for line in notes(found))
    drawn = {"peers": [f"![Simulated peers: what a step takes longer, and CPU time]({PLOT})"]} if found.get("exchange") else {}
    return {part: "\n\n".join([*map(_lines, own), *drawn.get(part, []), below]) for part, own in parts.items() if own}


def _lines(table: Table) -> str:
    lines = [f"**{table.title}**", "", f"| {' | '.join(table.head)} |", f"|{' --- |' * len(table.head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table.body)])


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
