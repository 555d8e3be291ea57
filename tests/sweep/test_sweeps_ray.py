"""Whole sweeps on a real cluster: trials stopped early on shared teachers, exploits, the winner, what is on disk."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray import tune

from raykd.data.splits import open_data
from raykd.report.sweeps import finish, lines
from raykd.resolve import read
from raykd.roles import recorder
from raykd.sweep.observer import SweepObserver
from raykd.sweep.run import resume, sweep
from tests.sweep.leftovers import NOTHING, assert_becomes, on_cluster, shared_memory
from tests.sweep.small import HOLDOUT, digits

pytestmark = pytest.mark.ray
SPACE = {"losses.kd.temperature": tune.loguniform(1, 16), "losses.kd.weight": tune.uniform(0, 1)}


class Log(SweepObserver):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.notes, self.tables, self.about = [], [], None

    def begin(self, folder, about) -> None:  # noqa: ARG002
        self.about = about

    def note(self, text) -> None:
        self.notes.append(text)

    def update(self, trials) -> None:
        self.tables.append([(r["trial"], r["status"], r["epoch"]) for r in trials])


@pytest.fixture(scope="module")
def asha(teacher, tmp_path_factory, ray_cluster):
    """Twelve trials over temperature and weight, with ASHA, on one store: (result, what was heard, /dev/shm before)."""
    before, log = shared_memory(), Log()
    job = digits(teacher, tmp_path_factory.mktemp("asha") / "runs")
    result = sweep(job, SPACE, samples=12, holdout=HOLDOUT, grace=1, reduction=2, max_concurrent=3, observer=log)
    return result, log, before


def test_trials_are_stopped_early_and_the_rest_went_all_the_way(asha):
    result, log, _ = asha
    trials = result["trials"]
    assert len(trials) == 12
    stopped = [t for t in trials if t["status"] == "stopped"]
    finished = [t for t in trials if t["status"] == "finished"]
    assert len(stopped) + len(finished) == 12
    assert stopped
    assert finished
    assert all(1 <= t["epoch"] < 4 for t in stopped)
    assert all(t["epoch"] == 4 and len(t["curve"]) == 4 for t in finished)
    temperatures = {t["settings"]["losses.kd.temperature"] for t in trials}
    assert len(temperatures) == 12
    assert log.about["at_once"] == 3
    assert any(status == "running" for table in log.tables for _, status, _ in table)


def test_teachers_are_paid_for_once(asha):
    forwards = asha[0]["forwards"]
    assert forwards["share"] == "store"
    assert forwards["sweep"] == forwards["one_trial"] == 800 * 4
    epochs = sum(t["epoch"] for t in asha[0]["trials"])
    assert forwards["unshared"] == 800 * epochs
    assert sum(t["forwards"] for t in asha[0]["trials"]) == 0
    assert (
        "3,200 images for the whole sweep (kept once, read by all), 3,200 for one trial by itself: 1.00 x" in lines(asha[0])[0]
    )


def test_the_winner_is_the_best_finished_trial_and_is_run_with_three_seeds_on_all_images(asha):
    result = asha[0]
    finished = [t for t in result["trials"] if t["status"] == "finished"]
    assert result["winner"]["last"] == max(t["last"] for t in finished)
    assert [s["seed"] for s in result["seeds"]] == [0, 1, 2]
    values = [s["last"]["top1"] for s in result["seeds"]]
    assert result["spread"]["last"]["mean"] == pytest.approx(np.mean(values))
    assert result["spread"]["last"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert min(values) > 0.3, "three times chance"
    for seed in result["seeds"]:
        job = read_job(seed["folder"])
        assert job.data.holdout == 0
        assert job.data.eval is None
        records = recorder.read(Path(seed["folder"]) / "metrics.jsonl")
        assert [r["epoch"] for r in records if r["kind"] == "eval"] == [3], "measured once, at the end"
        assert job.losses["kd"].options["temperature"] == result["winner"]["settings"]["losses.kd.temperature"]


def read_job(folder):
    return read(Path(folder) / "job.json")


def metrics(result, trial):
    return recorder.read(Path(result["folder"]) / "trials" / trial / "metrics.jsonl")


def test_trials_never_see_the_test_set_nor_what_they_are_judged_on(asha):
    for trial in asha[0]["trials"]:
        job = read_job(f"{asha[0]['folder']}/trials/{trial['trial']}")
        assert job.data.test is None
        assert job.data.eval == "holdout"
        train, held = open_data(job.data, "train", job.seed), open_data(job.data, "eval", job.seed)
        assert len(train) == 800
        assert np.bincount(held.labels).tolist() == [20] * 10
        assert not set(train.rows) & set(held.rows)


def test_what_is_on_disk(asha):
    result, log, _ = asha
    folder = Path(result["folder"])
    assert folder.name == "small-sweep-001"
    kept = json.loads((folder / "sweep.json").read_text())
    assert kept == json.loads(json.dumps(result))
    assert {"commit", "hardware", "seconds", "space", "job"} <= kept.keys()
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [float(r["last"]) for r in rows] == [t["last"] for t in kept["trials"]]
    best = read(folder / "best_job.json")
    assert best.losses["kd"].options["weight"] == kept["winner"]["settings"]["losses.kd.weight"]
    assert best.data.holdout == 0
    finish(result, log)
    with Image.open(folder / "sweep.png") as picture:
        assert picture.width > 600
        assert np.asarray(picture.convert("L")).std() > 5, "something is drawn"


def test_nothing_is_left_on_the_cluster(asha):
    _, _, memory = asha
    assert_becomes(on_cluster, NOTHING, "cluster")
    assert_becomes(lambda: shared_memory() - memory, set(), "/dev/shm")


def test_a_finished_sweep_is_not_run_again(asha):
    log = Log()
    assert resume(asha[0]["folder"], observer=log) == json.loads(json.dumps(asha[0]))
    assert log.tables == []
    assert "Finished earlier" in log.notes[0]


@pytest.mark.slow
def test_pbt_copies_a_better_trial_over_a_worse_one(teacher, tmp_path, ray_cluster):
    job = digits(teacher, tmp_path / "runs", **{"training.epochs": 5})
    space = {"training.lr": tune.grid_search([0.0001, 0.0002, 0.05, 0.1]), "losses.kd.weight": tune.uniform(0.5, 1)}
    result = sweep(job, space, scheduler="pbt", samples=1, perturb_every=1, holdout=HOLDOUT)
    by_name = {t["trial"]: t for t in result["trials"]}
    exploits = [(name, e) for name, t in by_name.items() for e in t["exploits"]]
    assert exploits
    for name, exploit in exploits:
        donor = exploit["from"]
        assert donor in by_name
        assert donor != name
        records = metrics(result, name)
        marks = [r for r in records if r["kind"] == "exploit" and r["from"] == donor and r["step"] == exploit["step"]]
        assert marks, "the receiver's metrics name the donor and its step"
        steps = [r["step"] for r in records if r["kind"] == "step"]
        assert steps == sorted(set(steps)), "cut back to the donor's step, each step appears once"
    name, last = exploits[-1]
    after = [r for r in metrics(result, name) if r["kind"] == "step"]
    following = [r for r in after if r["step"] > last["step"]]
    if following and last is by_name[name]["exploits"][-1]:
        # cosine over 125 steps: the rate that was really used is that of the settings the trial took over
        lr, step = last["settings"]["training.lr"], following[0]["step"] - 1
        assert following[0]["lr"] == pytest.approx(lr * 0.5 * (1 + np.cos(np.pi * step / 125)), rel=1e-6)
    assert result["forwards"]["sweep"] == result["forwards"]["one_trial"] == 800 * 5
