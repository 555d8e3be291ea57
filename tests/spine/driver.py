"""A run in a process of its own, to be killed: `python -m tests.spine.driver DATA FOLDER SETTINGS_JSON`."""

import json
import sys
from pathlib import Path

from raykd.launch import cluster
from tests.spine.small import cifar, go

if __name__ == "__main__":
    data, folder, settings = sys.argv[1:4]
    job = cifar(Path(data), **json.loads(settings))
    if job.launch.backend == "ray":
        cluster.start_here(num_cpus=4)
    go(job, Path(folder))
