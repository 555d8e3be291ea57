"""Peers in a process of their own, to be killed: `python -m tests.spine.online_driver DATA FOLDER NAMES SETTINGS_JSON`."""

import json
import sys
from pathlib import Path

from raykd.launch import cluster
from tests.spine.online_jobs import peers
from tests.spine.small import go

if __name__ == "__main__":
    data, folder, names, settings = sys.argv[1:5]
    job = peers(Path(data), names, **json.loads(settings))
    if job.launch.backend == "ray":
        cluster.start_here(num_cpus=4)
    go(job, Path(folder))
