"""Temperature and weight of a loss named `kd`, whatever else the job does.

raykd sweep jobs/digits_demo.py tune_spaces/kd_temperature_weight.py --samples 12
"""

from typing import Any

from ray import tune


def space() -> dict[str, Any]:
    """Temperatures from 1 to 16 on a logarithmic scale, weights from 0 to 1."""
    return {"losses.kd.temperature": tune.loguniform(1, 16), "losses.kd.weight": tune.uniform(0, 1)}


def grid() -> dict[str, Any]:
    """The same as a grid of twelve: `tune_spaces/kd_temperature_weight.py:grid`, with --search grid."""
    return {
        "losses.kd.temperature": tune.grid_search([1.0, 2.0, 4.0, 8.0]),
        "losses.kd.weight": tune.grid_search([0.3, 0.6, 0.9]),
    }
