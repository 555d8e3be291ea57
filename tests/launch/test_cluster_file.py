"""cluster.yaml: a file that `ray up` takes, with the settings of a cluster that raykd starts itself."""

import json
import re
from pathlib import Path

import yaml

from raykd.launch.cluster import INLINE

FILE = Path(__file__).parents[2] / "cluster.yaml"


def test_ray_takes_it():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(FILE.read_text()))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_its_head_starts_as_ours():
    (start,) = [c for c in yaml.safe_load(FILE.read_text())["head_start_ray_commands"] if "--head" in c]
    assert json.loads(re.search(r"--system-config='(.*)'", start)[1]) == INLINE
