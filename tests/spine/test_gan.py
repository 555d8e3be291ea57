"""A generator that learns the training images beside a critic: what both see, how they learn, what a job must have for it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raykd.config import Loss, Synthesis
from raykd.data.splits import open_data
from raykd.launch import settings as checked
from raykd.launch.checks import inspect
from raykd.resolve import resolve
from raykd.roles.recorder import read
from raykd.roles.synthesizer import Synthesizer
from tests.spine.small import assert_equal_states, final_state, go, trace
from tests.spine.test_data_free import small, stopped_and_resumed

STEPS, BATCH, LIMIT = 8, 16, 40


def compared(root, loss=(), **settings):
    """MNIST's first images: two steps of critic and generator before the student's first, one every two after that."""
    spec = Synthesis(options={"width": 4}, before=2, generator_steps=1, student_steps=2, steps_per_epoch=STEPS // 2, show=8)
    job = small(root).replace(losses={"tsc-gan": Loss("tsc-gan", **{"width": 2} | dict(loss))}, synthesis=spec)
    return job.replace(**{"data.train": "train.parquet", "data.limit": LIMIT} | settings)


def terms_of(folder):
    return [step["images_terms"] for step in read(folder / "metrics.jsonl", "step") if "images_terms" in step]


@pytest.fixture
def seen(monkeypatch):
    """What each step of critic and generator sees."""
    found, honest = [], Synthesizer._judge

    def noted(self, batch, number, epoch):
        found.append({name: value.detach().clone() for name, value in batch.items()} | {"number": number})
        return honest(self, batch, number, epoch)

    monkeypatch.setattr(Synthesizer, "_judge", noted)
    return found


def test_every_term_is_alive_and_the_run_says_what_it_read(real_data, tmp_path):
    go(compared(real_data, {"ce_weight": 0.5}), tmp_path / "run")
    steps = read(tmp_path / "run" / "metrics.jsonl", "step")
    assert len(steps) == STEPS
    for step in steps:
        assert step["grad_norms"].keys() == {"ce", "tsc-gan"}
        assert all(0 < norm < math.inf for norm in step["grad_norms"].values())
    made = terms_of(tmp_path / "run")
    assert len(made) == STEPS // 2
    assert all(terms.keys() == {"critic", "source", "classes"} for terms in made)
    assert all(math.isfinite(value) for terms in made for value in terms.values())
    assert all(len({terms[name] for terms in made}) == len(made) for name in made[0])
    said = json.loads((tmp_path / "run" / "result.json").read_text())
    assert said["real_data"] == f"training images ({LIMIT} of them)"
    assert [sum(record["shown"]["classes"]) for record in read(tmp_path / "run" / "metrics.jsonl", "eval")] == [8, 8]


def test_the_critic_sees_training_images_with_their_classes(real_data, tmp_path, seen):
    job = compared(real_data)
    go(job, tmp_path / "run")
    spec = resolve(job)
    train = open_data(spec.data, "train", spec.data_seed)
    images, labels = torch.from_numpy(train.read(list(range(LIMIT)))) / 255, torch.from_numpy(train.labels)
    assert [batch["number"] for batch in seen] == list(range(2 + STEPS // 2))
    rows = []
    for batch in seen:
        assert batch["real_images"].shape == batch["images"].shape == (BATCH, 1, 28, 28)
        apart = (batch["real_images"][:, None] - images[None]).abs().amax((2, 3, 4))
        own = apart.argmin(1)
        assert float(apart.amin(1).max()) < 1e-6
        assert torch.equal(batch["real_labels"], labels[own])
        rows += own.tolist()
    assert sorted(rows[:LIMIT]) == list(range(LIMIT)), "each once, before any twice"
    assert sorted(rows[LIMIT : 2 * LIMIT]) == list(range(LIMIT))
    assert rows[:LIMIT] != rows[LIMIT : 2 * LIMIT], "in another order"


def test_the_critic_learns_from_a_generator_that_stands_still(real_data, tmp_path):
    lively = {"synthesis.lr": 1e-12, "synthesis.before": 30, "synthesis.student_steps": 1}
    for name, before in (("first", 1), ("later", 30)):
        job = compared(real_data, {"dropout": 0.0, "critic_lr": 2e-3, "width": 4}, **lively | {"synthesis.before": before})
        go(job.replace(**{"training.max_steps": 1}), tmp_path / name)
    first, later = (terms_of(tmp_path / name)[0] for name in ("first", "later"))
    assert later["critic"] < first["critic"] - 1
    assert later["source"] > first["source"], "it is no longer taken in"


def test_without_a_share_the_student_sees_what_is_made_alone(real_data, tmp_path, seen):
    go(compared(real_data, **{"synthesis.real": 0.0}), tmp_path / "run")
    assert len(seen) == 2 + STEPS // 2, "critic and generator read all the same"
    said = json.loads((tmp_path / "run" / "result.json").read_text())
    assert said["real_data"] == f"training images ({LIMIT} of them)"


@pytest.mark.parametrize("at", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_is_exact(at, real_data, tmp_path, monkeypatch):
    """The critic, what its Adam remembers and its dropout go on too."""
    whole, cut = stopped_and_resumed(compared(real_data), at, tmp_path, monkeypatch)
    assert any("critic" in name for name in final_state(cut))
    assert terms_of(cut) == terms_of(whole)


@pytest.mark.slow
def test_placement_never_changes_the_result(real_data, tmp_path):
    for name, placement in (("inline", "inline"), ("pool", "pool")):
        go(compared(real_data, **{"teachers.lenet5.placement": placement}), tmp_path / name)
    assert trace(tmp_path / "inline") == trace(tmp_path / "pool")
    assert_equal_states(final_state(tmp_path / "inline"), final_state(tmp_path / "pool"))


@pytest.mark.ray
def test_two_workers_have_one_critic_and_one_generator(real_data, tmp_path, ray_cluster):
    job = compared(real_data, **{"launch.backend": "ray", "launch.workers": 2, "launch.cpus": 0.5})
    go(job, tmp_path / "run")
    assert len(terms_of(tmp_path / "run")) == STEPS // 2
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    one, other = (torch.load(last / f"rank-{rank}.pt", weights_only=True)["feed"] for rank in (0, 1))
    for name, value in one["losses"]["tsc-gan"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other["losses"]["tsc-gan"][name]), name
    weights = {name for name in one["generator"] if not name.rpartition(".")[2].startswith(("running", "num"))}
    assert all(torch.equal(one["generator"][name], other["generator"][name]) for name in weights)
    assert weights


FAULTS = {
    "synthesis.mode: training images are read where": {"synthesis.mode": "bank"},
    "data.augmentation: images of a bank, or beside made ones, are not mixed": {"data.augmentation.cutmix": 1.0},
    "data.augmentation: these images are made anew": {"synthesis.real": 0.0, "data.augmentation.flip": True},
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_such_a_job_cannot_have(told):
    found = checked.synthesis(resolve(compared(Path("data"), **FAULTS[told])))
    assert any(fault.startswith(told) for fault in found), found


def test_without_training_images_there_is_one_fault(real_data):
    job = compared(real_data)
    (fault,) = inspect(job.replace(**{"data.train": None})).faults
    assert fault.startswith("data.train: expected a value for kind 'parquet', got none")
    (fault,) = inspect(replace(job, data=replace(job.data, train="none"))).faults
    assert fault.startswith("data.train: expected images to read beside made ones, got none")


def test_training_images_of_another_size_are_a_fault(real_data):
    other = {"data.root": str(real_data), "data.train": "cifar10/test_first1000.parquet", "data.eval": "mnist/test.parquet"}
    other |= {"data.test": None}
    (fault,) = inspect(compared(real_data, **other)).faults
    assert fault.startswith(
        "data.train: expected images of (1, 28, 28), as those that are measured on and made, got (1, 32, 32)"
    )


def test_training_images_keep_their_size(real_data):
    (fault,) = inspect(compared(real_data, **{"data.augmentation.resized_crop": 20})).faults
    assert fault.startswith("data.augmentation.resized_crop: expected 28, as images are without it, got 20")
    assert inspect(compared(real_data, **{"data.augmentation.resized_crop": 28})).faults == []


def test_options_of_the_critic_are_checked_without_a_run(real_data):
    for options, told in (
        ({"dropout": 1.0}, "dropout: expected 0"),
        ({"width": 0}, "width: expected at"),
        ({"gan": "x"}, "gan"),
    ):
        (fault,) = inspect(compared(real_data, options)).faults
        assert fault.startswith("losses.tsc-gan")
        assert told in fault


def test_a_job_as_it_is_has_no_fault(real_data):
    found = inspect(compared(real_data))
    assert found.faults == []
    assert any(f"training images ({LIMIT} of them)" in note for note in found.notes)
    assert checked.synthesis(resolve(compared(real_data, **{"launch.workers": 2}))) == []


@pytest.mark.slow
def test_digits_are_made_as_they_are_wanted(real_data, tmp_path):
    """A minute of MNIST: the teacher sees the class wanted in nearly all images, and the student learns from these alone."""
    options = {"width": 8, "critic_lr": 1e-3, "dropout": 0.25}
    settings = {"synthesis.lr": 1e-3, "synthesis.options.width": 8, "synthesis.show": 64, "synthesis.steps_per_epoch": 300}
    settings |= {"synthesis.before": 800, "synthesis.generator_steps": 0, "synthesis.real": 0.0, "training.batch_size": 32}
    settings |= {"data.limit": None, "data.eval_limit": 500, "training.epochs": 1, "training.scheduler": "constant"}
    result = go(compared(real_data, options, **settings), tmp_path / "run")
    (record,) = read(tmp_path / "run" / "metrics.jsonl", "eval")
    assert record["shown"]["wanted"] > 0.6, record
    assert record["top1"] > 0.6, result
