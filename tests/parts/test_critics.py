import copy
import io

import critic_ranks
import pytest
import torch
from torch import nn

from raykd.config import Training
from raykd.parts.critics import MapCritic, VectorCritic
from raykd.roles.optimisation import optimizer


def made(kind, seed=0):
    torch.manual_seed(seed)
    if kind is MapCritic:
        return MapCritic(3, width=4, lr=0.01, weight_decay=0.1), torch.randn(6, 3, 8, 8)
    return VectorCritic(5, width=4, lr=0.01, betas=(0.5, 0.9)), torch.randn(6, 5)


def update(critic, signal):
    critic.update((1 - critic(signal[:3])).square() + critic(signal[3:]).square())


kinds = pytest.mark.parametrize("kind", [MapCritic, VectorCritic])


@kinds
def test_one_score_a_sample_each_its_own(kind):
    critic, signal = made(kind)
    assert critic(signal).shape == (6,)
    torch.testing.assert_close(critic(signal[:1]), critic(signal)[:1])
    assert critic(signal.bfloat16()).dtype is torch.float32


@kinds
def test_update_is_adam_on_the_mean(kind):
    critic, signal = made(kind)
    other = copy.deepcopy(critic.layers)
    options = {"lr": 0.01, "weight_decay": 0.1} if kind is MapCritic else {"lr": 0.01, "betas": (0.5, 0.9)}
    adam = torch.optim.Adam(other.parameters(), **options)
    for _ in range(3):
        update(critic, signal)
        adam.zero_grad()
        ((1 - other(signal[:3])) ** 2 + other(signal[3:]) ** 2).mean().backward()
        adam.step()
    for own, wanted in zip(critic.layers.parameters(), other.parameters()):
        torch.testing.assert_close(own, wanted)


@kinds
def test_a_checkpoint_goes_round(kind):
    critic, signal = made(kind)
    update(critic, signal)
    file = io.BytesIO()
    torch.save(critic.state_dict(), file)
    file.seek(0)
    again, _ = made(kind, seed=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    for one in (critic, again):
        update(one, signal)
    for name, value in critic.layers.state_dict().items():
        assert torch.equal(value, again.layers.state_dict()[name]), name


@kinds
def test_a_copy_goes_its_own_way(kind):
    critic, signal = made(kind)
    update(critic, signal)
    before, other = copy.deepcopy(critic.layers.state_dict()), copy.deepcopy(critic)
    update(other, signal)
    assert all(torch.equal(value, before[name]) for name, value in critic.layers.state_dict().items())
    assert all(not torch.equal(value, before[name]) for name, value in other.layers.state_dict().items())


def test_the_learners_optimizer_leaves_it_out_and_the_student_feels_it():
    critic, signal = made(VectorCritic)
    student = nn.Linear(5, 5)
    before = copy.deepcopy(critic.layers.state_dict())
    found = optimizer(Training(lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.1, optimizer="sgd"), [student, critic])
    assert {id(p) for group in found.param_groups for p in group["params"]} == {id(p) for p in student.parameters()}
    (1 - critic(student(signal))).square().mean().backward()
    assert student.weight.grad.abs().max() > 0
    found.step()
    assert all(torch.equal(value, before[name]) for name, value in critic.layers.state_dict().items())
    gradient = student.weight.grad.clone()
    critic.update(critic(student(signal)).square())
    assert torch.equal(student.weight.grad, gradient)  # an update of the critic leaves the student alone


def test_two_workers_are_one(tmp_path):
    torch.multiprocessing.spawn(critic_ranks.rank, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    alone = critic_ranks.critic()
    for _ in range(2):
        alone.update((1 - alone(critic_ranks.rows())).square())
    for name, value in alone.layers.state_dict().items():
        assert torch.equal(first[f"layers.{name}"], second[f"layers.{name}"])
        torch.testing.assert_close(first[f"layers.{name}"], value)
