"""Batch norms: found in the order of the forward, and their statistics as a signal with gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from raykd.config import Data, Job, Loss, Student
from raykd.config import Teacher as TeacherSpec
from raykd.errors import SignalError
from raykd.models import build, norm_statistics, norms
from raykd.resolve import resolve
from raykd.roles.losses import plans
from raykd.roles.network import Facts, Tapped
from raykd.roles.teacher import Teacher
from raykd.signals import Signal, wires

CPU = torch.device("cpu")


class Odd(nn.Module):
    """Registers its norms in another order than it calls them, one of them twice, one without running statistics."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.last = nn.BatchNorm1d(4)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.idle = nn.BatchNorm2d(4)
        self.twice = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Linear(4, num_classes)

    def forward(self, images):
        x = self.twice(self.conv(images))
        x = self.twice(self.free(x).relu())
        return self.head(self.last(x.mean((2, 3))))


def odd(num_classes, **_):
    torch.manual_seed(0)
    model = Odd(num_classes)
    for module in (model.last, model.twice):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    return model


def test_in_the_order_of_the_forward():
    assert norms(Odd(), (2, 5, 5)) == ["twice#1", "twice#2", "last"]
    with torch.device("meta"):
        assert norms(Odd(), (2, 5, 5)) == ["twice#1", "twice#2", "last"]
        found = norms(build("wrn_16_2", 10), (3, 32, 32))
    assert len(found) == len(set(found)) == 13
    assert norms(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), (2, 5, 5)) == []


def test_all_of_a_resnet():
    model = build("cifar_resnet20", 10)
    found = norms(model, (3, 32, 32))
    assert found[:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    assert set(found) == {p for p, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 4), (5, 3, 7)])
def test_statistics_against_numpy(shape):
    rng = np.random.default_rng(0)
    given = rng.normal(2.0, 3.0, shape)
    module = nn.BatchNorm1d(3)
    module.running_mean, module.running_var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    found = norm_statistics(module, torch.from_numpy(given))
    for channel in range(3):
        values = [float(v) for v in given[:, channel].ravel()]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        np.testing.assert_allclose(found[:, channel].numpy(), [mean, variance, 1.0 + channel, 4.0 + channel], rtol=1e-12)
    x = torch.from_numpy(given).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm_statistics(module, x), x)
    assert not torch.autograd.grad(norm_statistics(module, x)[2:].sum(), x, allow_unused=True)[0].any()


def test_a_teacher_answers_with_them_at_every_firing():
    facts = Facts(10, 3, (2, 5, 5), ((0.0,), (1.0,)))
    teacher = Teacher(TeacherSpec(model="tests.models.test_norms:odd"), facts, CPU)
    model = teacher.model
    images = torch.rand(4, 2, 5, 5, requires_grad=True)
    wanted = tuple(Signal("norm", name) for name in norms(model, (2, 5, 5)))
    found = teacher.live(images, wanted)
    inputs = [model.conv(images)]
    inputs.append(model.free(model.twice(inputs[0])).relu())
    inputs.append(model.twice(inputs[1]).mean((2, 3)))
    for signal, given, module in zip(wanted, inputs, (model.twice, model.twice, model.last)):
        torch.testing.assert_close(found[signal.key], norm_statistics(module, given))
        assert found[signal.key].shape == (4, 4)
        assert found[signal.key].requires_grad
    assert "norm@twice#2" in found
    assert set(teacher.signals((images * 255).byte(), wanted)) == set(found)


def test_of_a_model_without_running_statistics():
    with pytest.raises(SignalError, match="expected a batch norm with running statistics, got GroupNorm"):
        norm_statistics(nn.GroupNorm(1, 3), torch.zeros(2, 3))
    tapped = Tapped(TeacherSpec(model="x"), odd(3), [Signal("norm", "free")], Facts(1, 3, (2, 5, 5), ((0.0,), (1.0,))), CPU)
    with pytest.raises(SignalError, match="got BatchNorm2d"):
        tapped(torch.rand(2, 2, 5, 5))


def test_a_loss_that_reads_norms_gets_all_of_them():
    layers = {"student": ("stage1",), "teacher": ("stage1", "stage2")}
    parameters = ["teacher_norms", "teacher_features", "student_logits"]
    own, features, _ = wires(parameters, layers, {}, {}, norms={"teacher": ("bn1", "bn2#1")})
    assert [s.key for s in own.signals] == ["norm@bn1", "norm@bn2#1"]
    assert [s.layer for s in features.signals] == ["stage1", "stage2"]
    (several,) = wires(["teachers_norms"], {"teachers": ((), ())}, {}, {}, norms={"teachers": (("a",), ("b", "c"))})
    assert [[s.layer for s in model[0]] for model in several.models] == [["a"], ["b", "c"]]
    with pytest.raises(SignalError, match=r"teacher_norms: expected a teacher with at least one batch norm .*got 0"):
        wires(["teacher_norms"], layers, {}, {}, norms={"teacher": ()})
    with pytest.raises(SignalError, match=r"teacher_norm: expected a teacher with exactly one batch norm .*got 2"):
        wires(["teacher_norm"], layers, {}, {}, norms={"teacher": ("a", "b")})


def reading(student_logits, teacher_norms, *, weight=1.0, ce_weight=1.0):
    """A user's loss."""
    return sum((n[0] - n[2]).square().sum() + (n[1] - n[3]).square().sum() for n in teacher_norms)


def test_a_plan_connects_them_without_layers():
    job = Job(
        name="norms",
        data=Data(kind="digits"),
        student=Student(model="digits_cnn"),
        teachers={"a": TeacherSpec(model="digits_cnn"), "b": TeacherSpec(model="mlp")},
        losses={"own": Loss("tests.models.test_norms:reading", teachers=("a",))},
    )
    job = resolve(job)
    stages = {name: [] for name in ("student", "a", "b")}
    (plan,) = plans(job, stages, norms={"a": ["stem.bn", "layer1.bn"], "b": []})
    assert [s.key for s in plan.asks("a")] == ["norm@stem.bn", "norm@layer1.bn"]
    other = job.replace(**{"losses.own.teachers": ("b",)})
    with pytest.raises(SignalError, match=r"losses\.own: teacher_norms: expected a teacher with at least one batch norm"):
        plans(other, stages, norms={"a": ["stem.bn"], "b": []})
