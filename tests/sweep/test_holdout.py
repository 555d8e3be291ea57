"""The held-out split: its share of each class, disjoint from what is learnt, the same wherever it is opened."""

import numpy as np
import pytest

from raykd import Job, Student, Training
from raykd.config import Data
from raykd.data.sets import open_split
from raykd.data.splits import has_split, open_data
from raykd.data.views import held_out
from raykd.errors import DataError
from raykd.launch.checks import inspect
from raykd.launch.run import run

SPEC = Data(kind="digits", holdout=0.2)


def images(dataset) -> list[bytes]:
    return [image.tobytes() for image in dataset.read(np.arange(len(dataset)))]


def test_a_share_of_each_class_is_held_out_and_both_parts_make_the_whole():
    whole, rest, held = (open_data(Data(kind="digits"), "train"), open_data(SPEC, "train", 3), open_data(SPEC, "holdout", 3))
    counts = np.bincount(whole.labels, minlength=10)
    assert np.bincount(held.labels, minlength=10).tolist() == [round(0.2 * c) for c in counts]
    assert np.bincount(rest.labels, minlength=10).tolist() == [c - round(0.2 * c) for c in counts]
    assert sorted([*rest.rows, *held.rows]) == list(range(len(whole)))
    assert not set(rest.rows) & set(held.rows)
    assert sorted(images(rest) + images(held)) == sorted(images(whole))


def test_it_is_a_function_of_the_seed_alone():
    again, other = open_data(SPEC, "holdout", 3), open_data(SPEC, "holdout", 4)
    assert open_data(SPEC, "holdout", 3).rows.tolist() == again.rows.tolist()
    assert again.rows.tolist() != other.rows.tolist()
    assert open_data(SPEC, "train", 3).fingerprint != open_data(SPEC, "train", 4).fingerprint


def test_positions_in_the_reduced_set_count_from_0():
    rest = open_data(SPEC, "train", 0)
    base = open_split(SPEC, "train")
    assert (rest.read(np.array([0, len(rest) - 1])) == base.read(rest.rows[[0, -1]])).all()
    assert (rest.labels == base.labels[rest.rows]).all()


def test_eval_can_be_the_held_out_split():
    spec = Data(kind="digits", holdout=0.1, eval="holdout", eval_limit=5)
    assert open_data(spec, "eval", 1).rows.tolist() == open_data(spec, "holdout", 1).rows.tolist()
    assert has_split(spec, "eval")
    assert has_split(spec, "holdout")
    assert not has_split(Data(kind="digits"), "holdout")
    assert not has_split(Data(kind="digits", eval="holdout"), "eval")


def test_labels_of_the_held_out_part_stay_true_where_training_labels_are_noise():
    noisy = Data(kind="digits", holdout=0.2, noisy_labels=True)
    assert (open_data(noisy, "holdout", 3).labels == open_data(SPEC, "holdout", 3).labels).all()
    assert (open_data(noisy, "train", 3).labels != open_data(SPEC, "train", 3).labels).any()


def test_limits_come_first():
    assert len(open_data(Data(kind="digits", per_class=10, holdout=0.3), "train", 0)) == 70
    assert len(open_data(Data(kind="digits", per_class=10, holdout=0.3), "holdout", 0)) == 30


def test_a_class_too_small_for_both_parts_is_named():
    with pytest.raises(DataError, match=r"data\.holdout: expected samples of class 0 on both sides of a share of 0\.5, got 1"):
        open_data(Data(kind="digits", per_class=1, holdout=0.5), "train", 0)
    with pytest.raises(DataError, match=r"data\.holdout: expected a share above 0"):
        open_data(Data(kind="digits"), "holdout", 0)


def test_small_shares_hold_out_at_least_one_of_each_class():
    _, held = held_out(open_data(Data(kind="digits", per_class=5), "train"), 0.01, 0)
    assert np.bincount(held.labels).tolist() == [1] * 10


def test_any_job_can_be_measured_on_what_it_holds_out(tmp_path):
    data = {"data.holdout": 0.25, "data.eval": "holdout", "data.per_class": 40, "training.max_steps": 4}
    job = Job(data=Data(kind="digits"), student=Student(model="digits_cnn"), training=Training(epochs=1, batch_size=32))
    job = job.replace(**data, **{"launch.backend": "local"})
    assert inspect(job).faults == []
    assert run(job, folder=tmp_path / "run")["student"]["last"]["count"] == 100
