"""A teacher of many sub-networks: the batch's keys choose the sub-network, so that placement and retries change nothing."""

import os
import signal

import pytest
import torch

from raykd.errors import Interrupted
from raykd.launch import assembly
from raykd.resolve import resolve
from raykd.roles.recorder import read
from tests.spine.small import At, assert_equal_states, cifar, final_state, go, trace


def job(root, **settings):
    """mt-nguyen beside a method that asks the whole teacher, and one that asks for a feature of it."""
    losses = {"mt-nguyen": {"method": "mt-nguyen", "drop_rate": 0.5}, "kd": {"method": "kd"}, "at": {"method": "at"}}
    return cifar(root).replace(**{"losses": losses, "training.max_steps": 12, **settings})


def test_every_batch_has_a_sub_network_of_its_own(real_data):
    known = resolve(job(real_data))
    facts = assembly.facts(known)
    plans = assembly.connect(known, facts)
    committee = assembly.make_committee(known, ("big",), facts)
    asks = assembly.asks(known, plans, ("big",))
    (view,) = [s.key for ask in asks.of for s in ask.signals if s.view]
    images = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def answers(index, epoch):
        keys = {"sample_index": torch.tensor(index), "augmentation_seed": torch.full((2,), epoch, dtype=torch.int32)}
        return committee.answer({"images": images, **keys}, asks).teachers["big"].signals[view]["dense"]

    assert (answers([3, 4], 0) == answers([3, 4], 0)).all()
    seen = {answers(index, epoch).tobytes() for index in ([3, 4], [4, 3], [5, 6]) for epoch in (0, 1)}
    assert len(seen) > 3, "the same pixels, other keys: other sub-networks"


def test_inline_and_pickled_are_the_same(real_data, tmp_path):
    go(job(real_data), tmp_path / "local")
    go(job(real_data, **{"teachers.big.placement": "inline"}), tmp_path / "inline")
    assert trace(tmp_path / "inline") == trace(tmp_path / "local")
    steps = read(tmp_path / "local" / "metrics.jsonl", "step")
    assert all(norm > 0 for norm in steps[0]["grad_norms"].values())
    go(job(real_data, **{"losses.mt-nguyen.drop_rate": 0.0}), tmp_path / "whole")
    assert all(terms["mt-nguyen"] == pytest.approx(terms["kd"]) for _, terms in trace(tmp_path / "whole"))
    assert any(terms["mt-nguyen"] != pytest.approx(terms["kd"], rel=0.1) for _, terms in trace(tmp_path / "local"))


def test_resume_draws_the_same(real_data, tmp_path):
    go(job(real_data), tmp_path / "whole")
    stopper = At(5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="checkpoint was written"):
        go(job(real_data), tmp_path / "cut", stopper)
    go(job(real_data), tmp_path / "cut", resume=True)
    assert_equal_states(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


@pytest.mark.ray
@pytest.mark.parametrize("inputs", ["pixels", pytest.param("recipe", marks=pytest.mark.slow)])
def test_a_pool_of_two_is_the_same(inputs, real_data, tmp_path, ray_cluster):
    go(job(real_data), tmp_path / "local")
    pooled = {"launch.backend": "ray", "teachers.big.replicas": 2, "teachers.big.inputs": inputs}
    go(job(real_data, **pooled), tmp_path / "pool")
    assert trace(tmp_path / "pool") == trace(tmp_path / "local")
