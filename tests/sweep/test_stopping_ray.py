"""A sweep that is stopped, killed and resumed: the same trials, finished ones untouched, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from raykd.resolve import write
from raykd.roles import recorder
from raykd.sweep.run import resume
from tests.spine.small import descendants
from tests.sweep.leftovers import NOTHING, alive, assert_becomes, on_cluster, shared_memory
from tests.sweep.small import digits

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
SPACE = """
from ray import tune

def space():
    return {"losses.kd.temperature": tune.loguniform(1, 16), "losses.kd.weight": tune.uniform(0, 1)}
"""


def start(arguments: list[str], address: str | None) -> subprocess.Popen:
    """`raykd sweep ...` in a process of its own, on a cluster of its own or on a running one."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    env |= {"RAY_ADDRESS": address} if address else {}
    return subprocess.Popen(
        [sys.executable, "-m", "raykd", "sweep", *arguments],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def epochs(folder: Path) -> int:
    """Evaluations of all trials so far."""
    return sum(p.read_text().count('"kind": "eval"') for p in folder.glob("trials/*/metrics.jsonl"))


def wait_for(process: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while epochs(folder) < count:
        assert process.poll() is None, f"it ended early: {process.communicate()}"
        assert time.monotonic() < deadline, "it is too slow to be stopped"
        time.sleep(0.05)


def asked(teacher: Path, tmp_path: Path) -> list[str]:
    """The command line of a new sweep of five trials in `tmp_path / "sweep"`."""
    write(digits(teacher, tmp_path / "runs", **{"training.epochs": 2}), tmp_path / "job.json")
    (tmp_path / "space.py").write_text(SPACE)
    plan = ["--samples", "5", "--grace", "1", "--reduction", "2", "--holdout", "0.2", "--max-concurrent", "2"]
    return [str(tmp_path / "job.json"), str(tmp_path / "space.py"), *plan, "--folder", str(tmp_path / "sweep")]


def test_killed_on_a_running_cluster_it_leaves_nothing_and_ends_with_the_trials_it_was_asked_for(
    teacher, tmp_path, ray_cluster
):
    folder = tmp_path / "sweep"
    address = ray.get_runtime_context().gcs_address
    process = start(asked(teacher, tmp_path), address)
    wait_for(process, folder, 3)
    assert on_cluster()["actors"], "trials run on this cluster"
    process.kill()
    process.communicate()
    assert_becomes(on_cluster, NOTHING, "cluster after SIGKILL")

    planned = json.loads((folder / "plan.json").read_text())["trials"]
    done = {
        p.parent.name: p.read_text() for p in folder.glob("trials/*/metrics.jsonl") if '"epoch": 1, "top1"' in p.read_text()
    }
    result = resume(folder)
    assert [{"trial": t["trial"], "settings": t["settings"]} for t in result["trials"]] == planned
    assert {t["status"] for t in result["trials"]} <= {"finished", "stopped"}
    assert len(result["seeds"]) == 3
    for name, text in done.items():
        assert (folder / "trials" / name / "metrics.jsonl").read_text() == text, (
            f"trial {name} was finished and is not run again"
        )
    for trial in result["trials"]:
        steps = [r["step"] for r in recorder.read(folder / "trials" / trial["trial"] / "metrics.jsonl", "step")]
        assert steps == list(range(1, 25 * trial["epoch"] + 1)), "each step appears once"
    assert_becomes(on_cluster, NOTHING, "cluster at the end")


def test_stopped_and_killed_on_a_cluster_of_its_own_it_leaves_nothing(teacher, tmp_path):
    folder, memory = tmp_path / "sweep", shared_memory()
    process = start(asked(teacher, tmp_path), None)
    wait_for(process, folder, 2)
    below = descendants(process.pid)
    assert below
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert f"raykd sweep --resume {folder}" in err
    assert "Traceback" not in err
    assert_becomes(lambda: alive(below), [], "processes after Ctrl-C")
    assert_becomes(lambda: shared_memory() - memory, set(), "/dev/shm after Ctrl-C")

    first = epochs(folder)
    process = start(["--resume", str(folder)], None)
    wait_for(process, folder, first + 1)
    below = descendants(process.pid)
    process.kill()
    process.communicate()
    assert_becomes(lambda: alive(below), [], "processes after SIGKILL")
    assert_becomes(lambda: shared_memory() - memory, set(), "/dev/shm after SIGKILL")


def test_finished_seeds_are_not_run_again(teacher, tmp_path, ray_cluster):
    """The winner's second seed is stopped; the first is kept as it is."""
    from raykd.errors import Interrupted
    from raykd.launch.observer import Observer
    from raykd.sweep.observer import SweepObserver
    from raykd.sweep.run import sweep
    from tests.sweep.test_sweeps_ray import SPACE as TWO

    class Stops(SweepObserver):
        def run(self, what):
            if what == "winner, seed 1":
                os.kill(os.getpid(), signal.SIGTERM)
            return Observer()

    folder = tmp_path / "sweep"
    job = digits(teacher, tmp_path / "runs", **{"training.epochs": 1})
    with pytest.raises(Interrupted):
        sweep(job, TWO, samples=2, holdout=0.2, folder=folder, observer=Stops())
    first = folder / "winner" / "seed-0" / "result.json"
    kept = first.read_text()
    stamp = first.stat().st_mtime_ns
    result = resume(folder)
    assert [s["seed"] for s in result["seeds"]] == [0, 1, 2]
    assert (first.read_text(), first.stat().st_mtime_ns) == (kept, stamp)
