"""A cluster that is there already: a head started in another folder, reached by address and by job submission."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.spine.small import kill_tree

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """`ray start --head` in an empty folder: (address, dashboard address)."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    port, dashboard = free_port(), free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=4"]
    command += [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    log = (elsewhere / "head.log").open("w")
    process = subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=2)
            break
        except OSError as error:
            if getattr(error, "code", None) in (401, 403):
                break
            assert process.poll() is None, (elsewhere / "head.log").read_text()
            time.sleep(0.5)
    yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    kill_tree(process)


def settings(real_data: Path, runs: Path) -> list[str]:
    values = {
        "data.root": real_data / "cifar10",
        "data.limit": 256,
        "data.eval_limit": 64,
        "data.test": "none",
        "training.max_steps": 4,
        "training.batch_size": 32,
        "runs": runs,
        "launch.cpus": 0.5,
    }
    return [part for path, value in values.items() for part in ("--set", f"{path}={value}")]


@pytest.mark.slow
def test_a_driver_connects_by_address(head, real_data, tmp_path):
    """The student's factory is a module of this checkout, which the head's node has never seen: it is shipped."""
    command = [sys.executable, "-m", "raykd", "run", "jobs/cifar10_resnet56_resnet20.py:short", "--json"]
    command += [*settings(real_data, tmp_path / "runs"), "--set", "student.model=tests.spine.plain:plain"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": head[0]}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["student"]["steps"] == 4
    assert result["exchange"]["resnet56"]["requests"] == 5


def test_the_same_file_goes_through_job_submit(head, real_data, tmp_path):
    inner = [
        sys.executable,
        "-m",
        "raykd",
        "run",
        "jobs/cifar10_resnet56_resnet20.py:short",
        *settings(real_data, tmp_path / "runs"),
    ]
    command = [
        str(Path(sys.executable).parent / "ray"),
        "job",
        "submit",
        "--address",
        head[1],
        "--working-dir",
        str(ROOT),
        "--",
        *inner,
    ]
    environment = os.environ | {"RAY_AUTH_MODE": "token"}  # as the README says: `ray job submit` does not look for the token
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(2)  # the head is still starting
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "succeeded" in (done.stdout + done.stderr)
    result = json.loads((tmp_path / "runs" / "cifar10-short-001" / "result.json").read_text())
    assert result["teachers"]["resnet56"]["top1"] > 0.85
    assert result["student"]["steps"] == 4


def test_an_address_where_nothing_listens_is_one_clear_error(real_data, tmp_path):
    command = [sys.executable, "-m", "raykd", "run", "jobs/cifar10_resnet56_resnet20.py:short"]
    command += settings(real_data, tmp_path / "runs")
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert "ray start --head" in done.stderr
    assert "Traceback" not in done.stderr
