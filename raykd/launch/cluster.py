"""Connecting to Ray: a running cluster, or one started here for the run."""

from __future__ import annotations

import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from raykd.config import Job
from raykd.errors import ResourceError
from raykd.roles.process import environment

NAMESPACE = "raykd"
EXCLUDES = [".git", ".venv", "venv", "runs", "__pycache__", "*.parquet", "*.arrow", "*.safetensors", "*.pt", "*.th"]
OPTIONS: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
INLINE = {"max_direct_call_object_size": 256 * 1024}  # bytes: logits of a batch travel with the call, at half the CPU time
LARGEST_WORKING_DIR_BYTES = 200 * 1024**2


@contextmanager
def connected(job: Job) -> Iterator[None]:
    """Ray for the length of a run: the cluster this process is connected to already, the one at `launch.address` or
    RAY_ADDRESS, or a new one on this machine. A cluster started here is stopped at the end.

    Raises:
        ResourceError: the cluster cannot be reached; the message says what to do.
    """
    address = job.launch.address or os.environ.get("RAY_ADDRESS")
    if not address or ray.is_initialized():
        with here():
            yield
        return
    _prepare()
    _connect(address, OPTIONS | {"runtime_env": _runtime_env()})
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def here(num_cpus: int | None = None) -> Iterator[None]:
    """Ray on this machine for the length of a block, or the cluster this process is connected to already.

    Args:
        num_cpus: logical CPUs of the new cluster; None: what the machine has.
    """
    if ray.is_initialized():
        yield
        return
    start_here(num_cpus)
    try:
        yield
    finally:
        ray.shutdown()


def start_here(num_cpus: int | None = None) -> None:
    """Starts Ray on this machine, for this process.

    Args:
        num_cpus: logical CPUs; None: what the machine has.
    """
    _prepare()
    settings = {} if "RAY_max_direct_call_object_size" in os.environ else INLINE
    env = {"env_vars": _env()}
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, runtime_env=env, _system_config=settings, **OPTIONS)


def _prepare() -> None:
    """Settings that Ray reads from the environment, before it is initialised."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def nodes(free: bool = True) -> dict[str, dict[str, float]]:
    """Live nodes -> what is free on each (what it has in all where Ray does not say), or what each has."""
    now: dict[str, dict[str, float]] = {}
    if free:
        try:
            from ray._private.state import available_resources_per_node

            now = available_resources_per_node()
        except Exception:
            now = {}
    return {n["NodeID"]: dict(now.get(n["NodeID"], n["Resources"])) for n in ray.nodes() if n["Alive"]}


def require_shared(folder: Path, timeout_s: float = 60.0) -> None:
    """Checks that every node sees the run folder.

    Raises:
        ResourceError: a node does not; names it.
    """
    alive = [n for n in ray.nodes() if n["Alive"]]
    if len(alive) < 2:
        return
    token = folder / f".shared-{uuid.uuid4().hex}"
    token.write_text("")
    look = ray.remote(num_cpus=0)(_exists)
    try:
        refs = {n["NodeID"]: look.options(scheduling_strategy=_on(n["NodeID"])).remote(str(token)) for n in alive}
        blind = [n["NodeManagerAddress"] for n in alive if not ray.get(refs[n["NodeID"]], timeout=timeout_s)]
    finally:
        token.unlink()
    if blind:
        raise ResourceError(
            f"Run folder {folder}: expected a path that all {len(alive)} nodes share, and {', '.join(blind)} cannot see it. "
            "Set `runs` to a folder on a shared file system."
        )


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _exists(path: str) -> bool:
    return Path(path).exists()


def _connect(address: str, options: Mapping[str, Any]) -> None:
    if _is_here(address):
        _use_token()
    try:
        _knock(address)
        ray.init(address=address, **options)
    except Exception as error:
        raise ResourceError(_explain(address, error)) from None


def _knock(address: str, timeout_s: float = 10.0) -> None:
    """Raises OSError at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=timeout_s).close()


def _use_token() -> None:
    """Turns on token authentication if this user has a token: Ray does so for clusters it finds itself, not for an address."""
    try:
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    except ImportError:  # a Ray without tokens
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _is_here(address: str) -> bool:
    """Whether an address is of this machine."""
    host = address.rpartition(":")[0].rpartition("/")[2]
    return host in ("127.0.0.1", "localhost", "0.0.0.0", socket.gethostname(), ray.util.get_node_ip_address())


def _explain(address: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": .")
    found = f"Ray cluster at {address!r} cannot be reached ({text}). Check launch.address and RAY_ADDRESS, start one with "
    found += "`ray start --head`, or leave both unset to run on this machine."
    if os.environ.get("RAY_AUTH_MODE") == "token" or "auth" in text.lower():
        return found + " Its token may differ from yours: copy the head's ~/.ray/auth_token here, or set RAY_AUTH_TOKEN to it."
    return found + " If it asks for a token, set RAY_AUTH_MODE=token and copy the head's ~/.ray/auth_token here."


def role_env(job: Job, gpus: float) -> dict[str, Any]:
    """Environment of a role that reserves this many GPUs: the job's threads, and no GPU in sight where it reserves none."""
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {"env_vars": {"OMP_NUM_THREADS": str(job.launch.threads), **hidden}}


def _runtime_env() -> dict[str, Any]:
    """The user's modules travel to other nodes; inside a submitted job Ray has shipped them already."""
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return {"env_vars": {k: v for k, v in _env().items() if k != "PYTHONPATH"}}
    here = Path.cwd()
    env: dict[str, Any] = {"env_vars": _env(), "py_modules": [str(Path(__file__).parents[1])]}
    if _size(here) <= LARGEST_WORKING_DIR_BYTES:
        env |= {"working_dir": str(here), "excludes": EXCLUDES}
    return env


def _size(folder: Path) -> int:
    """Bytes that would be shipped; stops counting at the limit."""
    total = 0
    skip = {".git", ".venv", "venv", "runs", "__pycache__", "node_modules"}
    for place, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in skip]
        for name in files:
            if Path(name).suffix in (".parquet", ".arrow", ".safetensors", ".pt", ".th"):
                continue
            path = Path(place) / name
            total += path.stat().st_size if path.is_file() else 0
        if total > LARGEST_WORKING_DIR_BYTES:
            break
    return total


def _env() -> dict[str, str]:
    """Environment of every process of the run: one thread unless the role asks for more, memory that is kept from step to step,
    this driver's import path."""
    paths = [str(Path(p).resolve()) for p in sys.path if p and Path(p).is_dir() and "site-packages" not in p]
    extra = [p for p in paths if not p.startswith(sys.base_prefix)]
    kept = {name: os.environ[name] for name in ("RAYKD_CACHE", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S") if name in os.environ}
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([str(Path.cwd()), *extra])),
        "OMP_NUM_THREADS": "1",
        **environment(),
        **kept,
    }
