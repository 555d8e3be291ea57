"""What sharing teachers saves a sweep: the same trials on one store, and each with teachers of its own.

python -m benchmarks --rows sweeps
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from ray import tune

from benchmarks.scene import Scene, job
from raykd.launch import cluster
from raykd.sweep import run as sweeps
from raykd.sweep.observer import SweepObserver

TRIALS, EPOCHS, IMAGES = 6, 3, 2000
SHARES = ("store", "none")


class _Trials(SweepObserver):
    """Notes when the trials are over: what follows, the winner's seeds, is the same for both."""

    def __init__(self) -> None:
        self.ended = 0.0

    def update(self, trials: Any) -> None:  # noqa: ARG002
        """Keeps the time."""
        self.ended = time.perf_counter()


def measure(scene: Scene) -> dict[str, Any]:
    """Seconds until the last trial has ended, building the store included, for each way of sharing; and their ratio.

    No trial is stopped early, so that both do the same steps.
    """
    seconds, forwards = {}, {}
    space = {"losses.kd.temperature": tune.loguniform(1, 16), "losses.kd.weight": tune.uniform(0, 1)}
    with tempfile.TemporaryDirectory(prefix="raykd-sweeps-") as runs:
        own = job(scene, "pool").replace(
            **{
                "runs": runs,
                "data.limit": IMAGES,
                "data.eval": "cifar10/test_first1000.parquet",
                "training.epochs": EPOCHS,
                "training.eval_every": 1,
                "training.checkpoint_every": 0,
                "training.batch_size": 50,
                "launch.host": "actors",
            }
        )
        with cluster.here():
            for share in SHARES:
                trials, started = _Trials(), time.perf_counter()
                found = sweeps.sweep(
                    own, space, scheduler="none", samples=TRIALS, share=share, folder=Path(runs) / share, observer=trials
                )
                seconds[share], forwards[share] = trials.ended - started, found["forwards"]["sweep"]
    return {
        "trials": TRIALS,
        "epochs": EPOCHS,
        "seconds": seconds,
        "forwards": forwards,
        "ratio": seconds["store"] / seconds["none"],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What was measured, in words."""
    parts = [f"{share} {found['seconds'][share]:.1f} s, {found['forwards'][share]:,} teacher images" for share in SHARES]
    what = f"sweep of {found['trials']} trials x {found['epochs']} epochs"
    return [f"{what}: {'; '.join(parts)}; store / none {found['ratio']:.3f} in time"]
