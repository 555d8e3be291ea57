"""Adversarial methods, a real teacher, real images of CIFAR-10: terms are alive, the teacher makes them, critics learn."""

import math
import os
import signal

import pytest
import torch

from raykd.config import Loss
from raykd.errors import Interrupted
from raykd.launch.checks import inspect
from raykd.roles.recorder import read
from tests.spine.small import At, assert_equal_states, cifar, final_state, go, trace
from tests.spine.test_multi_teacher_methods import movement

OF_CONNECTORS = {"ktan": {"shared"}}  # terms that train these alone
CASES = [
    ("anc", {}),
    ("anc", {"gan": "non_saturating", "regulariser": "l2", "dropout": 0.0}),
    ("anc", {"regulariser": "l1"}),
    ("wang-portable", {}),
    ("wang-portable", {"gan": "least_squares", "logits_weight": 0.0}),
    ("ktan", {}),
    ("ktan", {"shared_by": "student", "gan": "least_squares"}),
]
each_case = pytest.mark.parametrize(("slug", "options"), CASES)
each_method = pytest.mark.parametrize("slug", sorted({slug for slug, _ in CASES}))


def job(slug, root, **options):
    """A real ResNet-20 teaches a ResNet-8 of other widths by one method, as the method weighs the labels."""
    return cifar(root).replace(
        **{
            "student.model": "crd_resnet8",
            "losses": {slug: Loss(slug, **options)},
            "ce_weight": None,
            "data.limit": 128,
            "data.eval_limit": 64,
            "training.batch_size": 32,
            "training.max_steps": 3,
            "training.grad_norms_every": 1,
        }
    )


@each_case
def test_every_term_is_alive(slug, options, real_data, tmp_path):
    go(job(slug, real_data, **options), tmp_path / "run")
    steps = read(tmp_path / "run" / "metrics.jsonl", "step")
    assert len(steps) == 3
    for step in steps:
        assert all(math.isfinite(value) for value in step["terms"].values())
        norms = step["grad_norms"]
        assert ("ce" in norms) == (slug != "anc"), "labels"
        assert f"{slug}.adversarial" in norms
        for name, norm in norms.items():
            assert math.isfinite(norm)
            assert (norm > 0) != (name.rpartition(".")[2] in OF_CONNECTORS.get(slug, ())), f"{name}: {norm}"


@pytest.mark.slow
@each_method
def test_the_teacher_of_other_images_teaches_otherwise(slug, real_data):
    found = inspect(job(slug, real_data).replace(ce_weight=0.0))
    assert not found.faults
    right, again = movement(found.job), movement(found.job)
    wrong = movement(found.job, torch.arange(found.job.training.batch_size).roll(5))
    assert torch.equal(right, again)
    assert right.norm() > 0
    assert (right - wrong).norm() > 1e-3 * right.norm()


@pytest.mark.slow
@each_method
def test_the_critic_learns_to_tell(slug, real_data, tmp_path):
    """Where the student stands still, the adversarial term, which falls as the student passes, rises with the critic."""
    options = {"critic_lr": 3e-3} | ({"regulariser": "none"} if slug == "anc" else {})
    settings = {"training.lr": 1e-12, "training.max_steps": 10, "data.limit": 320, "training.grad_norms_every": 0}
    go(job(slug, real_data, **options).replace(**settings), tmp_path / "run")
    found = [terms[f"{slug}.adversarial"] for _, terms in trace(tmp_path / "run")]
    assert sum(found[-3:]) > sum(found[:3]) + 0.01


@pytest.mark.slow
@each_method
def test_a_resumed_run_is_the_same(slug, real_data, tmp_path):
    """The critic, what its Adam remembers and the dropout of a step come back with the checkpoint."""
    made = job(slug, real_data, critic_lr=1e-3).replace(**{"training.max_steps": 6, "data.limit": 256})
    go(made, tmp_path / "whole")
    stopper = At(2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="checkpoint was written"):
        go(made, tmp_path / "parts", stopper)
    go(made, tmp_path / "parts", resume=True)
    assert stopper.fired_at < 6
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    assert_equal_states(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
