"""Grafting on real images, five of each class: terms, blocks that stand still, adapters that are gone, resume, faults."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from jobs.cifar10_grafting import job as shipped
from raykd import Loss, Student, models
from raykd.config import Branching, Peer
from raykd.data.normalise import Normalise
from raykd.data.splits import open_data
from raykd.errors import Interrupted, JobFaults
from raykd.launch import hosts
from raykd.launch.checks import inspect
from raykd.launch.run import run
from raykd.resolve import resolve
from raykd.roles.learner import Learner
from raykd.roles.recorder import read
from tests.spine.small import assert_equal_states, final_state, go, trace

STEPS = 14
NARROW = Student(model="crd_resnet8", options={"widths": (8, 8, 16, 32)})  # half the teacher's channels


def few(root, student=None, **settings):
    """The job as it is shipped, with smaller networks, for fourteen steps of 25 images."""
    job = shipped(str(root / "cifar10"), str(root / "weights" / "cifar10" / "resnet20-12fca82f.th"))
    job = replace(job, name="few", student=student or Student(model="crd_resnet8"), baseline=False)
    return job.replace(
        **{
            "data.train": "train-00000-of-00005.parquet",
            "data.eval_limit": 64,
            "teachers.resnet56.model": "cifar_resnet20",
            "training.epochs": STEPS // 2,
            "training.batch_size": 25,
            "training.eval_every": STEPS // 2,
            "training.grad_norms_every": 1,
            "training.checkpoint_every": 1,
            "training.keep_checkpoints": STEPS,
            "launch.backend": "local",
            **settings,
        }
    )


def students(folder):
    """The student after each step."""
    places = sorted((folder / "checkpoints").glob("step-*"))
    return [torch.load(place / "rank-0.pt", weights_only=True)["student"] for place in places]


@pytest.mark.parametrize("student", [None, NARROW], ids=["as wide", "narrow"])
def test_every_graft_is_alive_and_the_exported_student_is_the_plain_one(student, real_data, tmp_path):
    job = few(real_data, student)
    result = go(job, tmp_path / "run")
    steps = read(tmp_path / "run" / "metrics.jsonl", "step")
    assert len(steps) == STEPS
    for step in steps:
        assert step["grad_norms"].keys() == {"network-grafting"}
        assert all(0 < norm < math.inf for norm in step["grad_norms"].values())
        assert 0 < step["terms"]["network-grafting"] < 4
    exported = load_file(tmp_path / "run" / "student.safetensors")
    plain = models.build(job.student.model, 10, **job.student.options).eval()
    plain.load_state_dict(exported)
    data = resolve(job).data
    held = open_data(data, "eval")
    images = Normalise.preset("cifar10")(torch.from_numpy(held.read(list(range(len(held))))))
    with torch.no_grad():
        right = plain(images).argmax(1) == torch.tensor(held.labels)
    assert result["student"]["last"]["top1"] == int(right.sum()) / len(held)
    said = json.loads((tmp_path / "run" / "result.json").read_text())["real_data"]
    assert said == "training images (5 a class)"


def test_blocks_stand_still_until_their_turn(real_data, tmp_path):
    """Weights and statistics of batch norm alike."""
    go(few(real_data), tmp_path / "run")
    grafts = [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {0, 1}, {0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    place = {"conv1": 0, "bn1": 0, "layer1": 0, "layer2": 1, "layer3": 2, "fc": 3}
    found = students(tmp_path / "run")
    assert len(found) == STEPS
    for number, (before, after) in enumerate(pairwise(found), 1):
        for name, value in after.items():
            moves = place[name.partition(".")[0]] in grafts[number]
            assert torch.equal(before[name], value) != moves, (number, name)


@pytest.mark.parametrize("at", [6, 7, 10])
def test_stop_and_resume(at, real_data, tmp_path, monkeypatch):
    """In a graft, and where two blocks are to be joined next."""
    job, honest = few(real_data, NARROW), Learner.stepping
    go(job, tmp_path / "whole")

    def stopping(self, *args, **kwargs):
        if self.step_count == at - 1:
            (tmp_path / "cut" / "STOP").touch()
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(hosts, "STOP_POLL_S", 0.0)
    monkeypatch.setattr(Learner, "stepping", stopping)
    with pytest.raises(Interrupted, match="checkpoint was written"):
        go(job, tmp_path / "cut")
    monkeypatch.undo()
    go(job, tmp_path / "cut", resume=True)
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


def test_placement_never_changes_the_result(real_data, tmp_path):
    for placement in ("inline", "pool"):
        go(few(real_data, NARROW, **{"teachers.resnet56.placement": placement}), tmp_path / placement)
    assert trace(tmp_path / "inline") == trace(tmp_path / "pool")
    assert_equal_states(final_state(tmp_path / "inline"), final_state(tmp_path / "pool"))


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_equal_one_with_the_whole_batch(real_data, tmp_path, ray_cluster):
    """Blocks and adapters that learn, and those that have no gradient; maps that go into weights."""
    settings = {"training.optimizer": "sgd", "training.batch_size": 24, "training.lr": 0.05}
    job = few(real_data, Student(model="tests.spine.plain:plain"), **settings)
    go(job, tmp_path / "one")
    go(job.replace(**{"launch.backend": "ray", "launch.workers": 2, "launch.cpus": 0.5}), tmp_path / "two")
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, STEPS + 1))
    for (_, terms), (_, others) in zip(one, two):
        assert terms == pytest.approx(others, rel=2e-5)
    assert_equal_states(final_state(tmp_path / "two", 0), final_state(tmp_path / "two", 1))


TWICE = {"student": ("stem", "stage1"), "teacher": ("stage1", "stage1")}
FAULTS = {
    "layers: expected as many of the student as of the teacher": {"student": Student(model="vgg8")},
    "expected maps [c h w] of the teacher's size": {"layers": {"student": ("stage1",), "teacher": ("stage2",)}},
    "something else reads too": {"student": Student(model="cifar_resnet8", options={"widths": (8, 8, 16, 32)})},
    "is all that they learn from, got kd too": {"losses": {"kd": Loss("kd", ce_weight=0.0)}},
    "is all that they learn from, got cross-entropy too": {"ce_weight": 1.0},
    "in the place of those of one teacher, got resnet56, other": {"two": True},
    "expected a student without branches": {"student": Student(model="crd_resnet8", branching=Branching("exits"))},
    "training.ema: network-grafting trains blocks in turn": {"training.ema": 0.9},
    "in the order in which they run, got stage2, stage1": {"layers": ("stage2", "stage1")},
    "in the order in which they run, got stage1, stage1": {"layers": TWICE},
    "training.accumulate: network-grafting needs the whole batch": {"training.accumulate": 5},
}  # fmt: skip


@pytest.mark.parametrize("told", FAULTS)
def test_what_cannot_be_grafted(told, real_data, tmp_path):
    given = dict(FAULTS[told])
    job = few(real_data, given.pop("student", None))
    job = replace(
        job, losses={"network-grafting": Loss("network-grafting", layers=given.pop("layers", None)), **given.pop("losses", {})}
    )
    if given.pop("two", False):
        job = replace(job, teachers={**job.teachers, "other": job.teachers["resnet56"]})
    job = job.replace(**given)
    found = [fault for fault in inspect(job).faults if told in fault]
    assert len(found) == 1, inspect(job).faults
    with pytest.raises(JobFaults, match="network-grafting"):
        run(job, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_peers_are_not_grafted(real_data):
    job = replace(few(real_data), student=Student(), peers={name: Peer(model="crd_resnet8") for name in "ab"})
    assert any("not those of peers" in fault for fault in inspect(job).faults)


def test_too_few_steps_end_before_the_first_update(real_data, tmp_path):
    with pytest.raises(Exception, match=r"training\.epochs: expected a step or more for each of 7 grafts, got 4 steps in all"):
        go(few(real_data, **{"training.epochs": 2}), tmp_path / "run")
    assert not read(tmp_path / "run" / "metrics.jsonl", "step")


def test_what_a_check_says(real_data):
    found = inspect(few(real_data, NARROW))
    assert found.faults == []
    assert any(note.startswith("Real data: training images (5 a class)") for note in found.notes)
    assert found.connectors == {"network-grafting": 2 * (8 * 16 + 16 * 32 + 32 * 64)}
    assert inspect(few(real_data)).connectors == {}, "as many channels: no adapters"
