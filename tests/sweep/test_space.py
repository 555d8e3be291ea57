"""Spaces: what they may hold, what is drawn from them, how far they go."""

import pytest
from ray import tune

from raykd import Loss
from raykd.errors import ConfigError, JobFaults
from raykd.sweep import plan as plans
from raykd.sweep import space as spaces

SPACE = {"losses.kd.temperature": tune.loguniform(1, 16), "losses.kd.weight": tune.uniform(0, 1)}


def test_a_grid_holds_every_combination_once():
    space = {"a": tune.grid_search([1, 2, 3]), "b": tune.choice(["x", "y"]), "c": 7}
    found = spaces.grid(space)
    assert len(found) == 6
    assert {(s["a"], s["b"]) for s in found} == {(a, b) for a in (1, 2, 3) for b in "xy"}
    assert all(s["c"] == 7 for s in found)
    names = [t.name for t in plans.trials(plans.make(search="grid"), space, 0)]
    assert names == ["000", "001", "002", "003", "004", "005"]


def test_random_search_crosses_grids_with_its_samples():
    found = spaces.draws({"m": tune.grid_search(["kd", "dkd"]), "w": tune.uniform(0, 1)}, 5, 0)
    assert len(found) == 10
    assert [s["m"] for s in found] == ["kd", "dkd"] * 5


def test_draws_are_a_function_of_the_seed_and_stay_inside():
    one, again, other = (spaces.draws(SPACE, 200, seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    temperatures = [s["losses.kd.temperature"] for s in one]
    assert min(temperatures) >= 1
    assert max(temperatures) <= 16
    below_4 = sum(t < 4 for t in temperatures) / 200
    assert 0.4 < below_4 < 0.6, "half of a logarithmic scale from 1 to 16"
    assert len({s["losses.kd.weight"] for s in one}) == 200


def test_integers_quantised_values_and_functions():
    space = spaces.as_space(
        {"n": tune.randint(2, 5), "q": tune.quniform(0, 1, 0.25), "twice": tune.sample_from(lambda spec: 2 * spec.config["n"])},
        "space",
    )
    found = spaces.draws(space, 50, 0)
    assert {s["n"] for s in found} == {2, 3, 4}
    assert all(isinstance(s["n"], int) for s in found)
    assert {s["q"] for s in found} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert all(s["twice"] == 2 * s["n"] for s in found)


def test_extremes_stand_for_a_domain():
    assert spaces.extremes(tune.uniform(0.5, 2)) == [0.5, 2]
    assert spaces.extremes(tune.randint(2, 5)) == [2, 4]
    assert spaces.extremes(tune.choice(["a", "b", "c"])) == ["a", "b", "c"]
    low, high = spaces.extremes(tune.randn(10, 1))
    assert 6 < low < 10 < high < 14


def test_perturbed_numbers_are_moved_into_their_bounds():
    found = spaces.inside(
        {"losses.kd.temperature": 19.2, "losses.kd.weight": -0.1, "n": 9.6}, SPACE | {"n": tune.randint(2, 8)}
    )
    assert found == {"losses.kd.temperature": 16, "losses.kd.weight": 0, "n": 7}
    assert isinstance(found["n"], int)


def test_whole_losses_become_plain_data_and_come_before_their_parts():
    space = spaces.as_space(
        {"losses.kd.weight": 0.5, "losses.kd": tune.choice([Loss("kd", temperature=2.0), Loss("dkd")])}, "s"
    )
    assert list(space) == ["losses.kd", "losses.kd.weight"]
    assert spaces.finite(space["losses.kd"]) == [{"method": "kd", "temperature": 2.0}, {"method": "dkd"}]


@pytest.mark.parametrize("found", [None, [1], {3: tune.uniform(0, 1)}, {}])
def test_what_is_no_space_is_told(found):
    with pytest.raises(ConfigError, match=r"jobs\.py:space: expected"):
        spaces.as_space(found, "jobs.py:space")


def test_columns_have_short_names():
    assert spaces.names(["losses.kd.weight", "losses.at.weight", "training.lr"]) == {
        "losses.kd.weight": "kd.weight",
        "losses.at.weight": "at.weight",
        "training.lr": "lr",
    }


def test_all_faults_of_a_plan_at_once():
    with pytest.raises(JobFaults) as caught:
        plans.make(scheduler="ash", holdout=1.5, seeds=1, samples=0)
    assert str(caught.value).startswith("4 faults")
