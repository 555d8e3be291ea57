"""Which method: the loss named `kd` is replaced whole, so that each keeps the options of its paper.

raykd sweep jobs/digits_demo.py tune_spaces/methods.py --search grid --scheduler none
"""

from typing import Any

from ray import tune


def space() -> dict[str, Any]:
    """Four methods; the teachers' outputs are kept for all of them in one store."""
    methods = [{"method": "kd"}, {"method": "dkd"}, {"method": "dist"}, {"method": "rkd"}]
    return {"losses.kd": tune.grid_search(methods)}
