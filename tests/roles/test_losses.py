"""Losses at work: schedules, plans, options, keyed randomness."""

import importlib
import math
import sys

import pytest
import torch

from raykd.config import Job, Loss, Teacher
from raykd.errors import ConfigError, SignalError
from raykd.resolve import resolve
from raykd.roles.losses import BoundLoss, plans, schedule
from raykd.signals import Aggregate
from tests.roles import small

EXAMPLES = """
import torch
from torch import nn

def drawn(
    student_logits, generator, epoch, step, num_samples, num_classes, dataset_labels, *, width: int = 3, scale: float = 1.0
):
    facts = torch.tensor([epoch, step, num_samples, num_classes, int(dataset_labels.sum())])
    return {"noise": torch.randn(width, generator=generator) * scale, "facts": facts.float()}

def weighs(student_logits, *, weight: float = 2.0):
    return student_logits.new_full((2,), weight)

def masked(student_logits, mask): ...
def from_before(student_logits, previous_logits): ...
def from_many(student_logits, teachers_logits): ...
def student_only(student_logits): ...

class Strange(nn.Module):
    def __init__(self, student_logits, budget): ...
    def forward(self, student_logits): ...

class Remembers(nn.Module):
    def __init__(self, student_feature, teacher_features, num_classes, *, width: int = 2):
        super().__init__()
        self.seen = student_feature, teacher_features, num_classes, width
        self.layer = nn.Linear(width, width)
    def forward(self, student_feature, teacher_features, *, power: float = 2.0):
        return (self.layer.weight.sum() * power * student_feature).flatten(1).mean(1)
"""


@pytest.fixture(scope="module", autouse=True)
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    (folder / "example_losses.py").write_text(EXAMPLES)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("example_losses", None)


def made(losses, teachers=("big",), **weights):
    given = {name: Teacher(weight=weights.get(name, 1.0)) for name in teachers}
    job = resolve(Job(seed=4, losses=losses, teachers=given, ce_weight=1.0))
    return job, plans(job, {"student": ["stage1", "stage2"], **{name: ["t1", "t2"] for name in teachers}})


def bound(name, seed=4, shapes=None, **options):
    job, (plan,) = made({"mine": Loss(f"example_losses:{name}", **options)}, teachers=())
    job = resolve(Job(seed=seed, losses=job.losses))
    shapes = shapes or {"student": {"logits": (7,)}}
    return BoundLoss(plan, shapes, small.FACTS, small.LABELS, job)


@pytest.mark.parametrize(
    "text, values",
    [
        ("constant", [1, 1, 1, 1]),
        ("linear(20)", [0, 0.5, 1, 1]),
        ("sigmoid(20)", [math.exp(-5), math.exp(-1.25), 1, 1]),
        ("stop(20)", [1, 1, 0, 0]),
        ("decay(20)", [1, 0.5, 0, 0]),
    ],
)
def test_schedules_at_0_half_the_ramp_its_end_and_twice_that(text, values):
    factor = schedule(text)
    assert [factor(e) for e in (0.0, 10.0, 20.0, 40.0)] == pytest.approx(values, abs=1e-12)


def test_schedules_move_within_an_epoch():
    assert schedule("linear(2.5)")(0.5) == pytest.approx(0.2)
    assert schedule("stop(1)")(0.999) == 1.0
    assert schedule("sigmoid(80)")(79.999) < 1.0


@pytest.mark.parametrize("text", ["", "linear", "linear()", "linear(0)", "linear(-1)", "ramp(3)", "linear(3) ", "constant(3)"])
def test_an_unknown_schedule(text):
    with pytest.raises(ConfigError, match="expected constant, linear"):
        schedule(text)


def test_a_plan_a_teacher_and_their_shares():
    _, found = made({"kd": Loss("kd"), "at": Loss("at", teachers="b")}, ("a", "b", "c"), a=1.0, b=2.0, c=1.0)
    assert [(p.label, p.teachers, p.share) for p in found] == [
        ("kd.a", ("a",), 0.25),
        ("kd.b", ("b",), 0.5),
        ("kd.c", ("c",), 0.25),
        ("at", ("b",), 1.0),
    ]


def test_plans_know_what_each_model_is_asked_for():
    _, (plan,) = made({"at": Loss("at", power=4.0)})
    assert [s.key for s in plan.student] == ["attention@stage1(power=4.0)", "attention@stage2(power=4.0)"]
    assert [s.key for s in plan.asks(plan.teachers[0])] == ["attention@t1(power=4.0)", "attention@t2(power=4.0)"]
    _, (plan,) = made({"fitnet": Loss("fitnet", layers={"student": "stage1", "teacher": "t9"})})
    assert [s.key for s in plan.student + plan.asks(plan.teachers[0])] == ["feature@stage1", "feature@t9"]


def test_a_loss_of_lists_hears_all_its_teachers_at_once():
    _, (plan,) = made({"x": Loss("example_losses:from_many", teachers=("c", "a"))}, ("a", "b", "c"))
    assert (plan.label, plan.teachers, plan.share, plan.lists) == ("x", ("c", "a"), 1.0, True)
    assert [[s.key for s in plan.asks(t)] for t in ("a", "b", "c")] == [["logits"], [], ["logits"]]


def test_an_aggregate_is_one_plan_of_several_teachers():
    _, (plan,) = made({"kd": Loss("kd", temperature=2.0, aggregate="mean_probs")}, ("a", "b"), a=1.0, b=3.0)
    assert (plan.label, plan.share) == ("kd", 1.0)
    assert plan.aggregate == Aggregate("mean_probs", ("a", "b"), (1.0, 3.0), 2.0)
    assert [s.key for s in plan.asks("b")] == ["logits"]


def test_a_loss_of_the_student_alone_listens_to_nobody():
    _, found = made({"mine": Loss("example_losses:student_only")}, ("a", "b"))
    assert [(p.label, p.teachers, p.share) for p in found] == [("mine", (), 1.0)]


@pytest.mark.parametrize(
    "losses, teachers, message",
    [
        ({"kd": Loss("kd")}, (), "losses.kd: kd listens to a teacher and the job has none"),
        (
            {"at": Loss("at", layers={"student": ("stage1",), "teacher": ("t1", "t2")})},
            ("a",),
            "expected as many of the student",
        ),
        (
            {"fitnet": Loss("fitnet", layers=("stage1", "stage2"))},
            ("a",),
            "losses.fitnet: student_feature: expected exactly one",
        ),
        ({"at": Loss("at", layers={"student": ("stage1",)})}, ("a",), "teacher_attentions: expected at least one layer"),
        ({"x": Loss("example_losses:from_before")}, ("a",), "losses.x: previous_logits: expected a signal of student, ema"),
        (
            {"kd": Loss("kd", aggregate="mean_prob")},
            ("a", "b"),
            "losses.kd: aggregate: no aggregator 'mean_prob'.*'mean_probs'",
        ),
        ({"at": Loss("at", aggregate="mean_probs")}, ("a", "b"), "losses.at: aggregate: expected a loss whose only signal"),
    ],
)
def test_losses_that_cannot_be_connected(losses, teachers, message):
    with pytest.raises((ConfigError, SignalError), match=message):
        made(losses, teachers)


def call(loss, step=0, rank=0, epoch=0, batch=None):
    signals = {"student": {"logits": torch.zeros(2, 7)}}
    return loss(batch or {"labels": torch.zeros(2)}, signals, epoch, step, rank)


def test_randomness_is_a_function_of_seed_loss_step_and_rank():
    loss = bound("drawn")
    noise = call(loss)["noise"]
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(call(loss)["noise"], noise)
    assert torch.equal(call(bound("drawn"))["noise"], noise)
    others = [call(loss, step=1), call(loss, rank=1), call(bound("drawn", seed=5))]
    assert all(not torch.equal(other["noise"], noise) for other in others)
    job, found = made({"one": Loss("example_losses:drawn"), "two": Loss("example_losses:drawn")}, teachers=())
    one, two = (BoundLoss(p, {"student": {"logits": (7,)}}, small.FACTS, small.LABELS, job) for p in found)
    assert not torch.equal(call(one)["noise"], call(two)["noise"])


def test_options_and_facts_reach_the_loss():
    loss = bound("drawn", width=5, scale=0.0)
    found = call(loss, step=8, epoch=2)
    assert found["noise"].tolist() == [0.0] * 5
    assert found["facts"].tolist() == [2, 8, small.SAMPLES, small.CLASSES, int(small.LABELS.sum())]


def test_the_weight_is_the_learners_to_apply():
    loss = bound("weighs", weight=7.0)
    assert loss.weight == 7.0
    assert call(loss)[""].tolist() == [2.0, 2.0], "not applied twice: the loss sees its own default"


def test_a_teachers_share_is_part_of_the_weight():
    job, found = made({"kd": Loss("kd", weight=8.0)}, ("a", "b"), a=1.0, b=3.0)
    shapes = {"student": {"logits": (7,)}, "teacher": {"logits": (7,)}}
    assert [BoundLoss(p, shapes, small.FACTS, small.LABELS, job).weight for p in found] == [2.0, 6.0]


def test_a_field_that_the_batch_lacks_is_named():
    with pytest.raises(SignalError, match=r"losses\.mine: the batch has no field 'mask'\. It has labels"):
        call(bound("masked"))


def test_an_argument_that_nobody_knows_is_named():
    with pytest.raises(SignalError, match=r"example_losses:Strange: expected .*num_samples.*got 'budget'"):
        bound("Strange")


def test_connectors_are_built_from_shapes_and_keyed_by_the_seed():
    shapes = {"student": {"feature@stage1": (3, 4, 4)}, "teacher": {"feature@t1": (5, 2, 2), "feature@t2": (6, 1, 1)}}
    layers = {"student": "stage1", "teacher": ("t1", "t2")}

    def make(seed=4, **options):
        job, (plan,) = made({"mine": Loss("example_losses:Remembers", layers=layers, **options)})
        job = resolve(Job(seed=seed, losses=job.losses, teachers=job.teachers))
        return BoundLoss(plan, shapes, small.FACTS, small.LABELS, job)

    torch.manual_seed(1)
    loss = make(width=3, power=3.0)
    state = torch.random.get_rng_state()
    assert loss.module.seen == ((3, 4, 4), [(5, 2, 2), (6, 1, 1)], small.CLASSES, 3)
    assert torch.equal(loss.module.layer.weight, make(width=3).module.layer.weight)
    assert not torch.equal(loss.module.layer.weight, make(seed=5, width=3).module.layer.weight)
    assert torch.equal(torch.random.get_rng_state(), state), "building leaves the global generator alone"
    ones = {
        "student": {"feature@stage1": torch.ones(2, 3, 4, 4)},
        "teacher": {k: torch.ones(2, *v) for k, v in shapes["teacher"].items()},
    }
    value = loss({"labels": torch.zeros(2)}, ones, 0, 0, 0)[""]
    torch.testing.assert_close(value, 3.0 * loss.module.layer.weight.sum().expand(2))
    assert set(loss.state_dict()) == {"module.layer.weight", "module.layer.bias"}, "once, as the checkpoint"
