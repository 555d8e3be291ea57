"""Nothing is lost: killed anywhere and resumed, a run ends with the same weights, connectors, bank and momenta, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raykd.errors import ConfigError, Interrupted
from raykd.resolve import read
from tests.spine.small import At, assert_equal_states, cifar, descendants, final_state, go, kill_tree, mlp, steps_seen, trace

ROOT = Path(__file__).resolve().parents[2]
THREE = {"launch.backend": "ray", "launch.workers": 3, "launch.cpus": 0.5, "training.batch_size": 36}
CASES = {"one worker": {"launch.backend": "ray"}, "three workers": THREE}


def kill_at(step: int, arguments: list[str], folder: Path) -> None:
    """Starts a run, SIGKILLs it and everything below it once `step` steps are recorded."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.spine.driver", *arguments],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 240
    while steps_seen(folder) < step:
        assert process.poll() is None, f"the run ended before it was killed: {process.stderr.read().decode()[-2000:]}"
        assert time.monotonic() < deadline, "the run is too slow to be killed"
        time.sleep(0.02)
    kill_tree(process)


def own_workers(title: bytes) -> list[int]:
    """Processes of this session's cluster whose title begins so."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title):
                found.append(pid)
        except OSError:
            continue
    return found


def born(pid: int) -> int:
    """When a process started, in clock ticks since boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])


@pytest.mark.ray
@pytest.mark.parametrize("name", [pytest.param("one worker", marks=pytest.mark.slow), "three workers"])
def test_sigkill_and_resume(name, real_data, tmp_path, ray_cluster):
    settings = CASES[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(cifar(real_data, **settings), whole)
    step = random.randrange(6, 24)
    kill_at(step, [str(real_data), str(cut), json.dumps(settings)], cut)
    assert not (cut / "result.json").exists()
    go(cifar(real_data, **settings), cut, resume=True)
    for rank in range(settings.get("launch.workers", 1)):
        assert_equal_states(final_state(whole, rank), final_state(cut, rank))
    assert trace(cut) == trace(whole), f"killed at step {step}"


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_recovers_by_itself(real_data, tmp_path, ray_cluster):
    go(cifar(real_data, **THREE), tmp_path / "whole")

    def kill(_):
        workers = sorted(own_workers(b"ray::RayTrainWorker"), key=born)[-3:]  # those of the run before may still be ending
        assert len(workers) == 3
        os.kill(random.choice(workers), signal.SIGKILL)

    killer = At(7, kill)
    go(cifar(real_data, **THREE), tmp_path / "hurt", killer)
    assert killer.fired_at is not None
    assert killer.fired_at < 27
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "hurt"))
    assert trace(tmp_path / "hurt") == trace(tmp_path / "whole")


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_member_of_an_actor_group_recovers(real_data, tmp_path, ray_cluster):
    settings = THREE | {"launch.host": "actors"}
    go(cifar(real_data, **settings), tmp_path / "whole")

    def kill(_):
        workers = sorted(own_workers(b"ray::_Worker"), key=born)[-3:]
        assert len(workers) == 3
        os.kill(workers[0], signal.SIGKILL)

    killer = At(7, kill)
    go(cifar(real_data, **settings), tmp_path / "hurt", killer)
    assert killer.fired_at is not None
    assert killer.fired_at < 27
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "hurt"))


@pytest.mark.ray
@pytest.mark.parametrize("host", ["train", pytest.param("actors", marks=pytest.mark.slow)])
def test_two_workers_equal_one_with_the_whole_batch(host, real_data, tmp_path, ray_cluster):
    go(mlp(real_data), tmp_path / "one")
    go(mlp(real_data, **{"launch.backend": "ray", "launch.workers": 2, "launch.host": host}), tmp_path / "two")
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert [s for s, _ in one] == [s for s, _ in two]
    for (_, terms), (_, others) in zip(one, two):
        assert terms == pytest.approx(others, rel=2e-5)
    assert one[0][1]["fitnet"] > one[-1][1]["fitnet"], "the connector learns"


def test_local_kill_and_resume(real_data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(cifar(real_data), whole)
    kill_at(random.randrange(6, 24), [str(real_data), str(cut), "{}"], cut)
    go(cifar(real_data), cut, resume=True)
    assert_equal_states(final_state(whole), final_state(cut))
    assert trace(cut) == trace(whole)


def test_stop_and_resume(real_data, tmp_path):
    go(cifar(real_data), tmp_path / "whole")
    stopper = At(7, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="checkpoint was written"):
        go(cifar(real_data), tmp_path / "cut", stopper)
    go(cifar(real_data), tmp_path / "cut", resume=True)
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_the_command_on_a_ray_of_its_own(number, tmp_path):
    """Ray sets handlers when it starts; ours come after."""
    set_to = ["training.epochs=2000", "training.eval_every=2000", "baseline=false", "stages={}", "teachers={}", "losses={}"]
    words = [sys.executable, "-m", "raykd", "run", str(ROOT / "jobs" / "digits_demo.py"), "--folder", str(tmp_path / "run")]
    words += [w for s in [*set_to, "ce_weight=1.0"] for w in ("--set", s)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        deadline = time.monotonic() + 120
        while steps_seen(tmp_path / "run") < 40:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        kill_tree(process)
    assert process.returncode == 130, said
    assert "a checkpoint was written" in said
    assert steps_seen(tmp_path / "run") == max(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*"))


def test_resume_refuses_another_job(real_data, tmp_path):
    go(cifar(real_data, **{"training.max_steps": 3}), tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"losses\.kd\.temperature: was 4\.0, is 2\.0"):
        go(cifar(real_data, **{"training.max_steps": 3, "losses.kd.temperature": 2.0}), tmp_path / "run", resume=True)


def test_the_written_job_runs_again(real_data, tmp_path):
    go(cifar(real_data, **{"training.max_steps": 3}), tmp_path / "one")
    go(read(tmp_path / "one" / "job.json"), tmp_path / "two")
    assert trace(tmp_path / "two") == trace(tmp_path / "one")
