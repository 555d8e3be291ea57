"""Learning rate and weight of the loss `kd` for population based training, which changes both while models are trained.

raykd sweep jobs/digits_demo.py tune_spaces/pbt_learning_rate.py --scheduler pbt --samples 8
"""

from typing import Any

from ray import tune


def space() -> dict[str, Any]:
    """Learning rates from 0.001 to 0.3 on a logarithmic scale, weights from 0.1 to 1."""
    return {"training.lr": tune.loguniform(1e-3, 0.3), "losses.kd.weight": tune.uniform(0.1, 1)}
