"""Placement never changes the result: the same job, wherever the teacher lives, gives the same losses bit for bit.

Real CIFAR-10 images with crop, flip and mixup; kd, fitnet, at, sp and crd together; CPU, float32, dense.
"""

import warnings

import pytest
import ray

from tests.spine.small import At, cifar, go, steps_seen, trace

RAY = {"launch.backend": "ray"}
PLACEMENTS = {
    "local inline": {"teachers.big.placement": "inline"},
    "local recipe": {"teachers.big.inputs": "recipe"},
    "loader processes": {"launch.loader_processes": 1},
}
ON_RAY = {
    "inline": RAY | {"teachers.big.placement": "inline"},
    "one replica": RAY,
    "three replicas, recipes": RAY | {"teachers.big.replicas": 3, "teachers.big.inputs": "recipe"},
    "actor group": RAY | {"launch.host": "actors"},
}
IN_EVERY_RUN = ("three replicas, recipes", "actor group")


@pytest.fixture(scope="module")
def reference(real_data, tmp_path_factory):
    """Trace of the local backend, with the signals pickled on their way."""
    folder = tmp_path_factory.mktemp("parity") / "local"
    go(cifar(real_data), folder)
    found = trace(folder)
    assert [step for step, _ in found] == list(range(1, 33))
    assert all({"ce", "kd", "fitnet", "at", "sp", "crd"} == set(terms) for _, terms in found)
    return found


@pytest.mark.parametrize("name", PLACEMENTS)
def test_local_placements(name, reference, real_data, tmp_path):
    go(cifar(real_data, **PLACEMENTS[name]), tmp_path / "run")
    assert trace(tmp_path / "run") == reference


@pytest.mark.ray
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in IN_EVERY_RUN else [pytest.mark.slow]) for n in ON_RAY])
def test_ray_placements(name, reference, real_data, tmp_path, ray_cluster):
    go(cifar(real_data, **ON_RAY[name]), tmp_path / "run")
    assert trace(tmp_path / "run") == reference


@pytest.mark.ray
def test_a_replica_dies_in_mid_epoch(reference, real_data, tmp_path, ray_cluster):
    def kill(_):
        names = [n for n in ray.util.list_named_actors(all_namespaces=True) if n["name"].endswith(":big:1")]
        ray.kill(ray.get_actor(**names[-1]), no_restart=True)

    killer = At(4, kill)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = go(cifar(real_data, **RAY, **{"teachers.big.replicas": 3}), tmp_path / "run", killer)
    assert killer.fired_at is not None
    assert killer.fired_at < 30, "the replica was killed too late to matter"
    assert trace(tmp_path / "run") == reference
    assert result["exchange"]["big"]["requests"] == 33  # the probe and each step once
    assert steps_seen(tmp_path / "run") == 32
