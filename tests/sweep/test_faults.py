"""Static faults of job, space and plan: all at once, before anything starts."""

import sys

import pytest
from ray import tune

from raykd.cli import main
from raykd.errors import JobFaults
from raykd.sweep import plan as plans
from raykd.sweep import space as spaces
from raykd.sweep.faults import found
from raykd.sweep.run import sweep
from tests.sweep.small import digits

GOOD = {"losses.kd.temperature": tune.loguniform(1, 16)}
ROOM = {"node": {"CPU": 4.0}}


@pytest.fixture
def job(teacher, tmp_path):
    return digits(teacher, tmp_path / "runs")


def told(job, space, nodes=ROOM, **settings) -> list[str]:
    plan = plans.make(**settings)
    space = spaces.as_space(space, "space")
    planned = plans.trials(plan, space, 0) if all(spaces.finite(d) for d in space.values()) or plan.search != "grid" else []
    return found(job, space, plan, planned, nodes)


def one(job, space, **settings) -> str:
    faults = told(job, space, **settings)
    assert len(faults) == 1, faults
    return faults[0]


def test_a_sound_sweep_has_none(job):
    assert told(job, GOOD) == []
    assert told(job, {"losses.kd": tune.choice([{"method": "kd"}, {"method": "dkd"}, {"method": "rkd"}])}) == []


def test_everything_that_is_wrong_is_told_together_and_nothing_is_left(job, tmp_path):
    space = {
        "losses.kd.temprature": tune.uniform(1, 4),
        "losses.kd.weight": tune.uniform(-1, 1),
        "training.batch_size": tune.uniform(1, 4),
        "training.lrr": tune.uniform(0, 1),
        "seed": tune.randint(0, 9),
    }
    with pytest.raises(JobFaults) as caught:
        sweep(job, space)
    text = str(caught.value)
    for part in (
        "losses.kd.temprature: kd has no such option. Did you mean 'temperature'?",
        "losses.kd.weight: expected a weight of at least 0, got -1",
        "training.batch_size",
        "training.lrr: no such setting. Did you mean 'lr'",
        "seed: the seed is not searched",
    ):
        assert part in text, text
    assert not (tmp_path / "runs").exists()


def test_a_fault_of_the_job_is_told_beside_those_of_the_space(job):
    faults = told(job.replace(**{"student.model": "no_such"}), {"seed": 3})
    assert any("student" in f for f in faults)
    assert any("the seed is not searched" in f for f in faults)


def test_values_that_make_a_trial_wrong_are_found_by_what_check_knows(job):
    assert "training.batch_size: expected at most the" in " ".join(told(job, {"training.batch_size": tune.choice([32, 4096])}))
    fault = one(job, {"student.model": tune.choice(["digits_cnn", "crd_resnet9000"])})
    assert fault.startswith("space: student")


@pytest.mark.parametrize(
    "path, why",
    [
        ("data.eval_limit", "judged on the same held-out images"),
        ("launch.cpus", "it says where a trial runs"),
        ("training.max_steps", "compared epoch by epoch"),
        ("stages.wide.training.lr", "stages are run once"),
    ],
)
def test_paths_that_are_not_searched(job, path, why):
    assert why in one(job, {path: tune.choice([1, 2])})


def test_what_changes_the_kept_outputs_is_refused_with_advice(job):
    crop = {"data.augmentation.crop": tune.choice([1, 2])}
    assert "set share='none'" in one(job, crop)
    assert told(job, crop, share="pool") == []
    assert told(job, crop, share="none") == []
    weights = {"teachers.wide.dtype": tune.choice(["float32", "bfloat16"])}
    assert "changes what the shared teachers answer" in one(job, weights, share="pool")
    assert told(job, {"teachers.wide.weight": tune.uniform(0.1, 1)}) == []


def test_a_store_cut_at_one_temperature_cannot_serve_several(job):
    cut = job.replace(**{"teachers.wide.codec": "topk:3"})
    assert "at one temperature" in one(cut, GOOD)
    assert told(cut, GOOD, share="pool") == []


def test_too_few_cpus_for_one_trial_name_the_setting(job):
    fault = one(job.replace(**{"launch.cpus": 8}), GOOD)
    assert fault.startswith("launch.cpus: one trial does not fit.")
    assert "trial workers: 1 x (CPU 8)" in fault
    assert "teacher wide" in one(job.replace(**{"launch.cpus": 3.8}), GOOD, share="pool")


def test_a_grid_needs_values(job):
    assert "expected tune.grid_search or tune.choice" in one(job, GOOD, search="grid")


def test_pbt_changes_only_what_a_trained_model_survives(job):
    assert "with scheduler='pbt'" in one(job, {"losses.kd.method": tune.choice(["kd", "dkd"])}, scheduler="pbt")
    assert "with scheduler='pbt'" in one(job, {"training.epochs": tune.choice([2, 4])}, scheduler="pbt")
    assert told(job, {"training.lr": tune.loguniform(0.01, 0.1), **GOOD}, scheduler="pbt") == []
    assert "at least 4 trials" in one(job, GOOD, scheduler="pbt", samples=2)


def test_a_method_with_stages_of_its_own_is_refused(job):
    assert "takd trains stages of its own" in " ".join(
        told(job, {"losses.kd": tune.choice([{"method": "kd"}, {"method": "takd", "assistants": ["digits_cnn"]}])})
    )


def test_optuna_is_an_extra_with_one_clear_error(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert one(job, GOOD, search="optuna") == (
        "sweep.search: 'optuna' needs the package optuna. Install it: pip install 'raykd[optuna]'."
    )


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("x = 1\n", "no function that returns a space"),
        ("def space():\n    return 3\n", "expected a mapping from job paths to distributions, got int"),
        ("def a():\n    return {}\ndef b():\n    return {}\n", "several functions: a, b. Name one"),
        ("def space():\n    return {'losses.kd.weight': nothing}\n", "space.py:2: NameError"),
        ("def space(:\n", "space.py:1"),
    ],
)
def test_mistakes_of_a_space_file_are_one_line_beside_those_of_the_job(text, wanted, tmp_path, capsys):
    (tmp_path / "space.py").write_text(text)
    assert main(["sweep", str(tmp_path / "no_job.py"), str(tmp_path / "space.py")]) == 2
    err = capsys.readouterr().err
    assert "2 faults" in err
    assert "no_job.py: no such file" in err
    assert wanted in err
