"""`python -m benchmarks`: start every row's process, let them take turns, print ratios."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import measure, tables
from benchmarks.scene import DATA, Scene
from raykd.roles.process import ALLOCATOR

T = TypeVar("T")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
PLOT = PAGE.with_name(tables.PLOT)
SIMULATED = "simulated"
SWEEPS = "sweeps"
PEERS = ("peers", "exchange", "slow")
MAKING = ("makers", "bank", "gradient")
DATALESS = (*PEERS[1:], "bank")  # rows that need no data
DEFAULT = ("student", "ceiling", "hand", "inline", "pool", "store", "build", "infer", SIMULATED, *PEERS, *MAKING)
KNOWN = (*DEFAULT, "torchdistill", SWEEPS)
ENVIRONMENT = {  # of every process of every row
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",  # Ray's default is 15: its processes would yield to everything else on the machine
    **ALLOCATOR,  # raykd sets it in its own processes; here the hand-written loop has it too
}
SETTLE_S = 0.4  # between segments: what the row before left running ends


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="What raykd costs, as ratios measured in one run."
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and combinations: under two minutes")
    parser.add_argument("--rows", help=f"comma-separated, of {', '.join(KNOWN)}")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10/ and weights/ (default: ../shared/data)")
    parser.add_argument(
        "--torchdistill", action="store_true", help="install that package into a scratch folder and time it too"
    )
    parser.add_argument("--rounds", type=int, help="turns of every row")
    parser.add_argument("--steps", type=int, help="steps a turn, warm-up not counted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what was asked for. Returns 1 if a row failed."""
    options = parse(argv)
    os.environ |= ENVIRONMENT
    names = options.rows.split(",") if options.rows else list(DEFAULT)
    names += ["torchdistill"] if options.torchdistill and "torchdistill" not in names else []
    unknown = [n for n in names if n not in KNOWN]
    if unknown:
        print(f"rows: expected some of {', '.join(KNOWN)}, got {', '.join(unknown)}.", file=sys.stderr)
        return 2
    found: dict[str, Any] = {"about": about(options.quick), "skipped": {}}
    with tempfile.TemporaryDirectory(prefix="raykd-bench-") as scratch:
        real = [n for n in names if n not in (SIMULATED, SWEEPS, *PEERS, *MAKING)]
        scene = Scene(options.data.resolve(), Path(scratch), shards=1 if options.quick else 5)
        if scene.missing():
            why = f"no {scene.missing()[0]}; name the folder with --data"
            found["skipped"] |= dict.fromkeys(real, why)
        elif real:
            _real(real, scene, options, found)
        if SWEEPS in names and not scene.missing():
            from benchmarks import sweeps

            found[SWEEPS] = sweeps.measure(scene)
        _lines_of([n for n in names if n in (*PEERS, *MAKING)], scene, options, found)
    if SIMULATED in names:
        _simulated(options, found)
    found["about"]["load after"] = _load()
    _show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.write and max(found.get("stolen", 0.0), found.get("peers_stolen", 0.0)) > measure.MOST_STOLEN:
        _say("docs/benchmarks.md is left as it was: the machine was disturbed.")
    elif options.write:
        write(found)
    return 1 if any("failed" in why for why in found["skipped"].values()) else 0


def about(quick: bool) -> dict[str, str]:
    """Date, machine, commit, versions."""
    from raykd.launch.run import commit

    versions = []
    for name in ("raykd", "torch", "ray", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.processor())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "hardware": f"{os.cpu_count()} cores, {cpu}, {platform.system()} {platform.machine()}",
        "commit": str(commit()),
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "run": "quick" if quick else "full",
        "load before": _load(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def _load() -> str:
    return " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "-"


def _real(names: list[str], scene: Scene, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The rows with real models, in turn."""
    if "torchdistill" in names:
        from benchmarks import foreign

        _say("installing torchdistill into a scratch folder")
        why = foreign.install(scene.scratch)
        if why:
            names.remove("torchdistill")
            found["skipped"]["torchdistill"] = why
    rounds, steps = options.rounds or (3 if options.quick else 6), options.steps or (5 if options.quick else 12)
    if {"hand", "inline"} <= set(names):
        found["agreement"] = _agreement(scene)
    if "store" in names:
        found["store_bytes"] = _store_bytes(scene)
    with _workers(names, scene, found["skipped"]) as workers:
        for turn in range(rounds):
            for worker in workers:
                _say(f"round {turn + 1} of {rounds}: {worker.name}")
                time.sleep(SETTLE_S)
                worker.run(measure.WARM_UP + steps)
        left = {w.name: w.stop() for w in workers}
        segments = {w.name: w.segments for w in workers}
    every = scene.grad_norms_every
    found["stolen"] = measure.stolen(segments)
    found["rows"] = measure.summary(segments, scene.batch_size, every)
    found["ratios"] = measure.ratios(segments, every)
    found["segments"] = {n: [asdict(s) for s in own] for n, own in segments.items()}
    found["grad_norms_ms"] = measure.rare_ms(segments, every)
    for row in found["rows"]:
        own = left[row["row"]].get("losses", [])[: row["steps"]]
        row["loss"] = sum(own[-20:]) / len(own[-20:]) if own else None
    if {"pool", "student"} <= segments.keys():
        found["pool"] = _pool_costs(found["rows"], left["pool"]["wait_s"], scene.batch_size)


@contextlib.contextmanager
def _workers(names: list[str], scene: Scene, skipped: dict[str, str]) -> Iterator[list[Any]]:
    """Starts all rows and yields those that are ready."""
    from benchmarks import rows, stored
    from benchmarks.gate import RowFailed, Worker

    workers = [Worker(name, (rows.ROWS | stored.ROWS)[name], scene) for name in names]
    ready = []
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            _say(f"waiting until {worker.name} is ready")
            try:
                worker.wait()
                ready.append(worker)
            except RowFailed as error:
                _say(str(error))
                skipped[worker.name] = f"failed: {str(error).strip().splitlines()[-1]}"
        yield ready
    finally:
        for worker in workers:
            worker.kill()


def _agreement(scene: Scene) -> float:
    from benchmarks.rows import agreement

    _say("comparing losses with the hand-written loop")
    return _apart(agreement, scene, 2)


def _store_bytes(scene: Scene) -> dict[str, dict[str, int]]:
    from benchmarks.stored import sizes

    _say("sizing stores")
    return _apart(sizes, scene)


def _apart(call: Callable[..., T], *arguments: Any) -> T:
    """In a process of its own, so that this one stays small."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result(300)


def _pool_costs(rows: list[dict[str, Any]], wait_s: Sequence[float], batch_size: int) -> dict[str, float]:
    by_name = {row["row"]: row for row in rows}
    pool, alone = by_name["pool"], by_name["student"]
    waits = sorted(wait_s)
    return {
        "client_extra_ms": 1e3 * (pool["cpu_s_per_step"] - alone["cpu_s_per_step"]),
        "client_own_ms": 1e3 * pool["client_s_per_step"],
        "teacher_cpu_ms": 1e3 * pool["teacher_cpu_s_per_step"],
        "answer_ms": 1e3 * pool["teacher_s_per_step"],
        "bytes_out": pool["bytes_out_per_step"] / batch_size,
        "bytes_in": pool["bytes_in_per_step"] / batch_size,
        "wait_ms": 1e3 * waits[len(waits) // 2],
    }


def _simulated(options: argparse.Namespace, found: dict[str, Any]) -> None:
    from benchmarks import simulated

    rows = simulated.QUICK if options.quick else simulated.ROWS
    found["simulated"] = []
    for row in simulated.measure(rows, options.steps or (10 if options.quick else 15)):
        found["simulated"].append(row)
        _say(f"simulated: {row['students']} x {row['replicas']}, {row['payload']}: {row['ratio']:.3f}")


def _lines_of(names: list[str], scene: Scene, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The rows that start a Ray cluster of their own and have a line for each setting."""
    from benchmarks import peers, synthesis

    for name in names:
        if name not in DATALESS and scene.missing():
            found["skipped"][name] = f"no {scene.missing()[0]}; name the folder with --data"
            continue
        found[name] = []
        try:
            for line in (peers if name in PEERS else synthesis).measure(
                name, scene, options.quick, options.rounds, options.steps
            ):
                found[name].append(line)
                _say(f"{name}: {line}")
        except Exception as error:
            _say(str(error))
            found["skipped"][name] = f"failed: {str(error).strip().splitlines()[-1]}"
    stolen = [line["stolen"] for line in found.get("peers", ()) if line["stolen"] is not None]
    found["peers_stolen"] = max(stolen, default=0.0)


def write(found: Mapping[str, Any]) -> None:
    """Replaces what was measured of the parts of docs/benchmarks.md, and draws its plot."""
    page = PAGE.read_text()
    for part, text in tables.markdown(found).items():
        begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page)
    if found.get("exchange"):  # the tables show it
        from benchmarks import peers

        peers.plot(found["exchange"], PLOT)


def _show(found: Mapping[str, Any]) -> None:
    from raykd.report.console import make_console, print_table

    console = make_console()
    for table in (*tables.tables(found), *tables.peer_tables(found), *tables.making_tables(found)):
        print_table(console, table.head, table.body, table.title)
    if SWEEPS in found:
        from benchmarks import sweeps

        for line in sweeps.lines(found[SWEEPS]):
            console.print(line, soft_wrap=True, markup=False)
    for line in tables.notes(found):
        console.print(line, soft_wrap=True, markup=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
