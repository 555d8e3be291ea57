"""Shared fixtures: the real data if it is there, one Ray cluster for a whole test session, small jobs on real images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets and teachers; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real data sets are not at {DATA}")
    return DATA.resolve()


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """One Ray cluster of 8 logical CPUs for the session; jobs connect to it because Ray is initialised."""
    import ray

    from raykd.launch import cluster

    cluster.start_here(num_cpus=8)
    yield
    ray.shutdown()
