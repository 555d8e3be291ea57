"""Every built-in method is live: the teacher's signals reach the student's gradient, and only that."""

import pytest
import torch

from raykd import catalogue
from raykd.config import Loss, Teacher
from raykd.errors import SignalError
from tests.roles import small

OPTIONS = {"crd": {"num_negatives": 8, "embed_dim": 4}, "fitnet": {"regressor": "conv"}, "dkd": {"schedule": "constant"}}
OPTIONS |= {"network-grafting": {"layers": ("stage1",)}}  # three grafts in six steps
METHODS = {s: m for s, m in catalogue.methods().items() if m.scheme == "offline" and "stages" not in m.hooks}  # chains: spine
OFFLINE = list(METHODS)
every = pytest.mark.parametrize("slug", OFFLINE)


def job(slug, **settings):
    loss = Loss(slug, weight=1.0, **OPTIONS.get(slug, {}))
    names = ("big", "other") if METHODS[slug].teacher_role == "teachers" else ("big",)
    if slug == "mt-nguyen":  # needs blocks to drop
        settings["teacher"] = Teacher(model="cifar_resnet14")
    return small.job({slug: loss}, ce_weight=0.0, names=names, **settings)


def movement(slug, order=None):
    """What two steps on one batch move, with the teacher's signals in another order; two, since a memory speaks a step late."""
    learner, taught = small.learner(job(slug))
    signals = taught.request(small.batch()).result()
    if order is not None:
        signals = {name: {key: shuffled(value, order) for key, value in own.items()} for name, own in signals.items()}
    before = small.weights(learner)
    report = learner.step(small.batch(), signals, small.BATCH)
    learner.step(small.batch(), signals, small.BATCH)
    return before - small.weights(learner), report, taught


def shuffled(value, order):
    """Samples in another order; both axes of a signal of pairs."""
    return value[order][:, order] if value.shape == (small.BATCH, small.BATCH) else value[order]


def test_all_methods_are_here():
    assert {"kd", "kd-mse", "dkd", "dist", "fitnet", "at", "pkt", "vid", "crd", "rkd", "sp"} <= set(OFFLINE)


@every
def test_the_signals_of_another_sample_teach_otherwise(slug):
    right, report, taught = movement(slug)
    again, _, _ = movement(slug)
    wrong, _, _ = movement(slug, torch.arange(small.BATCH).roll(3))
    assert torch.equal(right, again), "the same signals give the same gradient"
    assert right.norm() > 0
    assert (right - wrong).norm() > 1e-3 * right.norm()
    assert all(name.split(".")[0] == slug and norm > 0 for name, norm in report.grad_norms.items())
    assert report.grad_norms


@every
def test_no_gradient_reaches_the_teacher(slug):
    _, _, taught = movement(slug)
    model = taught.committee.teachers["big"].model
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(value.requires_grad for value in taught.request(small.batch()).result()["big"].values())


@every
def test_a_teacher_that_is_trainable_is_still_not_trained(slug):
    """Signals with a graph behind them (a user's source) change nothing in the model they came from."""
    learner, taught = small.learner(job(slug))
    model = taught.committee.teachers["big"].model.requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    small.step(learner, taught)
    assert all(torch.equal(a, p) and p.grad is None for a, p in zip(before, model.parameters()))


@pytest.mark.parametrize("slug", [s for s in OFFLINE if catalogue.method(s).parameters[0] != "student_logits"])
def test_a_layer_that_never_fires_is_an_error(slug):
    with pytest.raises(SignalError, match="never fired"):
        small.learner(job(slug, model="tests.roles.nets:silent"))
