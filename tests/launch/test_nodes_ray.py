"""Two nodes: the teacher lives where its resource is, and the death of its node changes nothing but the time."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.spine.small import cifar, go, kill_tree, trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_the_teachers_node_dies_in_mid_epoch(real_data, tmp_path):
    command = [sys.executable, "-m", "tests.launch.two_nodes", str(real_data), str(tmp_path / "nodes")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        out, _ = process.communicate(timeout=300)
    finally:
        kill_tree(process)
    assert process.returncode == 0, out[-3000:]
    go(cifar(real_data), tmp_path / "local")
    assert trace(tmp_path / "nodes") == trace(tmp_path / "local")
