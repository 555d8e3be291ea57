"""Trials in other circumstances: data-parallel, on a shared pool, diverging, other schedulers, methods, optuna."""

import math
from pathlib import Path

import pytest
import torch
from ray import tune

from raykd.errors import SourceError
from raykd.resolve import resolve_training
from raykd.roles import recorder
from raykd.sweep.run import sweep
from raykd.sweep.trial import retuned
from tests.sweep.leftovers import NOTHING, assert_becomes, on_cluster
from tests.sweep.small import HOLDOUT, digits

SPACE = {"losses.kd.temperature": tune.loguniform(1, 16)}


def go(job, space, **settings):
    return sweep(job, space, holdout=HOLDOUT, **settings)


@pytest.mark.ray
@pytest.mark.slow
def test_trials_with_two_workers_share_a_pool_and_free_their_places(teacher, tmp_path, ray_cluster):
    job = digits(teacher, tmp_path / "runs", **{"training.epochs": 2, "launch.workers": 2, "launch.cpus": 0.5})
    result = go(job, SPACE, samples=3, share="pool", grace=1, reduction=2)
    assert {t["status"] for t in result["trials"]} <= {"finished", "stopped"}
    assert result["forwards"]["sweep"] >= 800 * sum(t["epoch"] for t in result["trials"])
    assert result["forwards"]["one_trial"] == 800 * 2
    assert_becomes(on_cluster, NOTHING, "cluster")


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_diverges_is_told_and_the_others_go_on(teacher, tmp_path, ray_cluster):
    job = digits(teacher, tmp_path / "runs", **{"training.epochs": 1})
    space = {"training.lr": tune.grid_search([0.05, 1e30])}
    result = go(job, space, search="grid", scheduler="none")
    assert [t["status"] for t in result["trials"]] == ["finished", "diverged"]
    assert "not finite" in result["trials"][1]["error"]["message"]
    assert result["winner"]["trial"] == "000"
    with pytest.raises(SourceError, match=r"All 2 trials failed\. DivergenceError"):
        go(job, {"training.lr": tune.grid_search([1e30, 2e30])}, search="grid", scheduler="none")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["hyperband", "median", "none"])
def test_other_schedulers_end_every_trial(scheduler, teacher, tmp_path, ray_cluster):
    job = digits(teacher, tmp_path / "runs", **{"training.epochs": 3})
    result = go(job, SPACE, samples=5, scheduler=scheduler)
    assert {t["status"] for t in result["trials"]} <= {"finished", "stopped"}
    assert result["winner"]["epoch"] == 3
    for trial in result["trials"]:
        path = Path(result["folder"]) / "trials" / trial["trial"] / "metrics.jsonl"
        steps = [r["step"] for r in recorder.read(path, "step")]
        assert steps == list(range(1, 25 * trial["epoch"] + 1))


@pytest.mark.ray
@pytest.mark.slow
def test_methods_are_searched_on_one_store(teacher, tmp_path, ray_cluster):
    job = digits(teacher, tmp_path / "runs", **{"training.epochs": 1})
    methods = [{"method": "kd"}, {"method": "dkd"}, {"method": "rkd"}, {"method": "at"}]
    result = go(job, {"losses.kd": tune.grid_search(methods)}, search="grid", scheduler="none")
    assert [t["settings"]["losses.kd"]["method"] for t in result["trials"]] == ["kd", "dkd", "rkd", "at"]
    assert {t["status"] for t in result["trials"]} == {"finished"}
    assert result["forwards"]["sweep"] == 800, "once for all four"


@pytest.mark.ray
@pytest.mark.slow
def test_optuna_chooses_as_it_goes(teacher, tmp_path, ray_cluster):
    pytest.importorskip("optuna")
    job = digits(teacher, tmp_path / "runs", **{"training.epochs": 1})
    result = go(job, SPACE, samples=4, search="optuna", scheduler="none", max_concurrent=2)
    values = {t["settings"]["losses.kd.temperature"] for t in result["trials"]}
    assert len(values) == 4
    assert all(1 <= v <= 16 for v in values)
    assert result["winner"]["last"] == max(t["last"] for t in result["trials"])


def test_a_copied_checkpoint_takes_the_settings_of_its_new_job():
    layer = torch.nn.Linear(2, 2)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict()}
    training = resolve_training(digits(Path("w"), Path("r")).training)
    changed = retuned(state, training.__class__(**{**vars(training), "momentum": 0.5, "weight_decay": 1e-3}))
    assert [g["momentum"] for g in changed["optimizer"]["param_groups"]] == [0.5, 0.5]
    assert [g["weight_decay"] for g in changed["optimizer"]["param_groups"]] == [1e-3, 0.0], "biases stay without"
    optimizer.load_state_dict(changed["optimizer"])
    assert math.isclose(optimizer.param_groups[0]["weight_decay"], 1e-3)
    assert optimizer.state[layer.weight]["momentum_buffer"].abs().sum() > 0
