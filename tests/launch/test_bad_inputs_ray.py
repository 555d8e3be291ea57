"""Bad input on a real cluster: the same errors, of the same types, and nothing left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raykd import Job
from raykd.errors import DataError, DivergenceError, JobFaults, RaykdError, ResourceError, SourceError
from raykd.launch.run import run
from raykd.roles import checkpoints
from tests.launch import scene

pytestmark = pytest.mark.ray
W = "{root}/weights/"
BIG = "teachers.big."
CPU = {"launch.backend": "ray", "launch.cpus": 0.5, "launch.max_failures": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The files of the scene, made once."""
    folder = tmp_path_factory.mktemp("scene")
    scene.write_data(folder / "data")
    scene.write_weights(folder / "weights")
    return folder


def fails(kind: type[RaykdError], job: Job, folder: Path, *says: str) -> str:
    """The message of a run that ends with exactly this error and leaves no actor."""
    import ray

    with pytest.raises(RaykdError) as caught:
        run(job, folder=folder)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert "Traceback" not in text
    assert all(word in text for word in says), text
    deadline = time.monotonic() + 20
    while alive := [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if ":big:" in actor["name"]]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)
    return text


def test_static_faults_start_nothing(root, ray_cluster):
    settings = {"student.model": "cifar_resnet9", BIG + "codec": "fp61", **CPU}
    with pytest.raises(JobFaults, match="2 faults"):
        run(scene.job(root, **settings))
    assert not (root / "runs").exists()


@pytest.mark.parametrize(
    "settings, setting",
    [
        ({BIG + "replicas": 40}, "teachers.big.replicas, .cpus or .gpus"),
        ({"launch.workers": 16, "launch.cpus": 4.0}, "launch.workers, launch.cpus or launch.gpus"),
        ({BIG + "resources": {"tpu": 1.0}}, "teachers.big.replicas"),
    ],
    ids=["replicas", "workers", "a resource nobody has"],
)
def test_too_few_resources_print_the_sum_and_the_setting(settings, setting, root, tmp_path, ray_cluster):
    text = fails(
        ResourceError, scene.job(root, **CPU | settings), tmp_path, "does not fit the cluster", "student workers: ", setting
    )
    assert "of 8 free" in text
    assert "on 1 node" in text


@pytest.mark.parametrize(
    "settings, kind, says",
    [
        ({BIG + "weights": W + "nan.safetensors"}, SourceError, ("'big'", "signal logits", "NaN or infinite")),
        pytest.param(
            {BIG + "weights": W + "large.safetensors", BIG + "codec": "fp16"},
            SourceError,
            ("logits", "fp16's +-65504"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"data.train": "undecodable.parquet"},
            DataError,
            ("image: ", "(undecodable.parquet, row group 2, row 5)"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["NaN teacher", "fp16 overflow", "undecodable row"],
)
def test_the_probe_finds_it_before_the_first_step(settings, kind, says, root, tmp_path, ray_cluster):
    fails(kind, scene.job(root, **CPU | settings), tmp_path, *says)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_diverging_loss(root, tmp_path, ray_cluster):
    job = scene.job(root, **CPU, **{"training.lr": 1e38, "training.checkpoint_every": 1, "training.epochs": 2})
    text = fails(DivergenceError, job, tmp_path, "Step ", "not finite", "checkpoint is intact")
    step, _ = checkpoints.committed(tmp_path / "checkpoints")[-1]
    assert f"Step {step}:" in text


def test_a_cluster_that_is_not_there(root, tmp_path):
    """In a process of its own: this one may be connected already."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    code = (
        "import sys\nfrom pathlib import Path\nfrom raykd.errors import ResourceError\nfrom raykd.launch.run import run\n"
        "from tests.launch import scene\njob = scene.job(Path(sys.argv[1]), **{'launch.backend': 'ray'})\n"
        "try:\n    run(job, folder=sys.argv[2])\nexcept ResourceError as error:\n    print('ONE', error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(root), str(tmp_path / "run")],
        env=os.environ | {"RAY_ADDRESS": address},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert found.stdout.startswith("ONE Ray cluster at"), found.stderr[-2000:]
    assert address in found.stdout
    assert "RAY_ADDRESS" in found.stdout
    assert "Traceback" not in found.stdout + found.stderr
