"""A cluster of two nodes, the teacher on the second; that node is killed in mid-run and another takes its place.

`python -m tests.launch.two_nodes DATA FOLDER`, in a process of its own: a session has one Ray only.
"""

import os
import sys
import warnings
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from raykd.launch import cluster as launch
from tests.spine.small import At, cifar, go

SETTINGS = {"launch.backend": "ray", "teachers.big.resources": {"teaching": 1}, "launch.request_timeout_s": 30.0}


def main(data: Path, folder: Path) -> None:
    """Runs the small job while its teacher's node goes."""
    launch._prepare()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    second = nodes.add_node(num_cpus=1, resources={"teaching": 1})
    ray.init(address=nodes.address, runtime_env={"env_vars": launch._env()}, **launch.OPTIONS)

    def move(_) -> None:
        nodes.remove_node(second, allow_graceful=False)
        nodes.add_node(num_cpus=1, resources={"teaching": 1})

    mover = At(4, move)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = go(cifar(data, **SETTINGS), folder, mover)
    assert mover.fired_at is not None
    assert mover.fired_at < 30, "the node was removed too late to matter"
    assert result["exchange"]["big"]["retries"] > 0
    sys.stdout.flush()
    os._exit(0)  # Cluster.shutdown waits for the node that was killed


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
