"""What a sweep may leave behind on a cluster and on this machine, and waiting until it is gone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import ray

PATIENCE_S = 40.0
NOTHING = {"actors": [], "groups": 0, "cpus": 0.0}
# Ray Data's own, one of each a driver, reserving nothing; they go with the driver (the SIGKILL test sees them gone)
RAY_DATA = ("ActorLocationTracker", "_AutoscalingCoordinatorActor", "_StatsActor")


def shared_memory() -> set[str]:
    """Entries of /dev/shm that no living process has mapped or open."""
    held = ""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held += (process / "maps").read_text() + " ".join(os.readlink(fd) for fd in (process / "fd").iterdir())
        except OSError:
            continue
    return {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in held}


def on_cluster() -> dict[str, object]:
    """What is in use on the cluster this process is connected to: actors, placement groups, logical CPUs."""
    from ray._private.state import actors

    alive = sorted(a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD")
    groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
    total, free = ray.cluster_resources().get("CPU", 0.0), ray.available_resources().get("CPU", 0.0)
    return {"actors": [name for name in alive if name not in RAY_DATA], "groups": len(groups), "cpus": round(total - free, 3)}


def assert_becomes(read, wanted, what: str) -> None:
    """Waits until `read()` is what is wanted."""
    deadline = time.monotonic() + PATIENCE_S
    while (seen := read()) != wanted:
        assert time.monotonic() < deadline, f"{what}: {seen} is left, expected {wanted}"
        time.sleep(0.2)


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # hold nothing, and notice after a minute that their raylet has gone


def alive(pids: list[int]) -> list[str]:
    """Those of the processes that still run, Ray's agents left out."""
    running = [pid for pid in pids if (status := _status(pid)) and status != "Z"]
    return [name for pid in running if (name := _name(pid)) and not name.startswith(AGENTS)]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""
