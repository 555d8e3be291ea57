"""Learning rates as functions of time, and who is decayed."""

import itertools
import math

import pytest
import torch
from torch import nn

from raykd.config import Training
from raykd.errors import ConfigError
from raykd.roles.optimisation import all_sum, average_buffers, optimizer, rate, sync_gradients


def training(**settings):
    given = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "decay_norms": True}
    return Training(**given | settings)


def test_multistep_falls_exactly_at_its_milestones():
    factor = rate(training(scheduler="multistep", milestones=(2.0, 3.5), gamma=0.1))
    assert [factor(e) for e in (0.0, 1.999, 2.0, 3.499)] == pytest.approx([1, 1, 0.1, 0.1])
    assert [factor(e) for e in (3.5, 100.0)] == pytest.approx([0.01, 0.01])
    steps = 7  # 14/7 and 24.5/7 are the milestones, hit in spite of rounding
    assert sum(factor(s / steps) == 1.0 for s in range(40)) == 14


def test_cosine():
    factor = rate(training(scheduler="cosine", epochs=10))
    assert [factor(e) for e in (0.0, 2.5, 5.0, 10.0, 11.0)] == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0, 0])


def test_linear_and_constant():
    factor = rate(training(scheduler="linear", epochs=10))
    assert [factor(e) for e in (0.0, 2.5, 10.0, 12.0)] == pytest.approx([1, 0.75, 0, 0])
    assert rate(training(scheduler="constant"))(1e6) == 1.0


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "multistep"])
def test_warm_up(scheduler):
    factor = rate(training(scheduler=scheduler, epochs=10, warmup_epochs=2.0, milestones=(9.0,)))
    rising = [factor(e / 10) for e in range(20)]
    assert 0 < rising[0] < 0.01
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert factor(1.0) == pytest.approx(0.5, abs=1e-3)
    assert factor(2.0) == 1.0
    if scheduler in ("cosine", "linear"):
        assert factor(6.0) == pytest.approx(0.5)
        assert factor(10.0) == pytest.approx(0.0)


def test_timm_schedulers():
    factor = rate(training(scheduler="timm:cosine", epochs=10))
    expected = [(1 + math.cos(math.pi * e / 10)) / 2 for e in (0, 2, 3, 9)]
    assert [factor(e) for e in (0.0, 2.9, 3.0, 9.5)] == pytest.approx(expected)
    assert factor(0.0) == pytest.approx(1.0), "a function of time: it can be asked again"


@pytest.mark.parametrize(
    "name, message",
    [
        ("cosin", "Did you mean 'cosine'"),
        ("timm:nothing", "timm has no scheduler 'nothing'"),
        ("timm:plateau", "no function of time"),
        ("timm:none", "no function of time"),
    ],
)
def test_unknown_scheduler(name, message):
    with pytest.raises(ConfigError, match=message):
        rate(training(scheduler=name))


def norm_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2))


def decay_of(found, module):
    of = {id(p): group["weight_decay"] for group in found.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in module.named_parameters()}


def test_norms_and_biases_are_spared():
    net = norm_net()
    spared = decay_of(optimizer(training(decay_norms=False), [net]), net)
    assert {name for name, decay in spared.items() if decay == 5e-4} == {"0.weight", "4.weight"}
    assert {decay for name, decay in spared.items() if name not in ("0.weight", "4.weight")} == {0.0}
    assert set(decay_of(optimizer(training(), [net]), net).values()) == {5e-4}


def test_frozen_and_shared_parameters():
    net, other = norm_net(), nn.Linear(2, 2)
    net[0].weight.requires_grad_(False)
    found = optimizer(training(), [net, other, other])
    held = [id(p) for group in found.param_groups for p in group["params"]]
    assert id(net[0].weight) not in held
    assert len(held) == len(set(held)) == len(list(net.parameters())) + 1


@pytest.mark.parametrize("name, cls", [("sgd", "SGD"), ("adamw", "AdamW"), ("SGD", "SGD"), ("lamb", "Lamb"), ("lion", "Lion")])
def test_optimizers_by_name(name, cls):
    found = optimizer(training(optimizer=name, lr=0.25), [norm_net()])
    assert type(found).__name__ == cls
    assert all(group["lr"] == 0.25 and group["weight_decay"] == 5e-4 for group in found.param_groups)


def test_options_reach_the_optimizer():
    found = optimizer(training(optimizer="adamw", optimizer_options={"betas": (0.5, 0.6)}), [norm_net()])
    assert found.param_groups[0]["betas"] == (0.5, 0.6)
    assert optimizer(training(nesterov=True), [norm_net()]).param_groups[0]["nesterov"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optimizer": "sdg"}, "no optimizer 'sdg'. Did you mean 'sgd'"),
        ({"optimizer_options": {"betas": (0.9, 0.9)}}, "sgd has no 'betas'"),
        ({"nesterov": True, "momentum": 0.0}, "needs a momentum above 0"),
    ],
)
def test_what_an_optimizer_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        optimizer(training(**settings), [norm_net()])


def test_alone_nothing_is_summed():
    flags = torch.tensor([1.0, 0.0])
    assert sync_gradients([], flags) is flags
    assert all_sum(flags) is flags
    net = norm_net()
    net[1].running_mean += 3
    average_buffers(net)
    assert net[1].running_mean.tolist() == [3.0] * 4
